"""Computes attention over KV caches: grouped heads without repeated keys or values, softmax in float32.

Everything here is a *running softmax over blocks of keys* (online softmax: Milakov & Gimelshein 2018; as in
FlashAttention: Dao et al. 2022). One block of keys is read at a time. Three numbers per query are kept: the
largest score so far, the sum of ``exp(score - largest)``, and the same sum weighted by the values. When a new
block has a larger score, what was summed before is scaled down to it. After the last block, the weighted sum
divided by the sum is the softmax over all keys, though their scores were never in memory together. So blocks
that no query sees can be left out, and temporaries do not grow with the number of keys.

``attend_causal`` does whole prompts and the growing cache, block of queries by block of queries. Memory does
not grow with the square of the length, and keys in the future cost nothing.

``attend_two_part`` does a decode step over the fixed cache: first the prompt's part, then the sequence's own.
The two are never concatenated. It costs what is valid, not what is allocated. (If the cache is read whole,
XLA on CPU copies each layer's cache at every step at batch 1.)

Both may be limited to a sliding window, as Transformers' Qwen2 has it: a token sees its own position and the
``window - 1`` before it. It counts tokens, never padding. Blocks of keys outside of it are not read. It is a
number or, where layers are scanned, a traced one. Without a window programs have no trace of it.

Two platforms have forms of their own. In bfloat16 on CPU, where the machine can run them, the kernels of
:mod:`qwen2_core.kernels.cpu.attention` do both, and read keys where they lie, those of a prompt once for all
of its sequences. On GPUs :mod:`qwen2_core.kernels.gpu_attention` does the decode step without a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32

from kvcache_utils import ARCache, KVCache, get_attention_kv
from qwen2_core.kernels.cpu.attention import cpu_attention, cpu_attention_causal
from qwen2_core.kernels.gpu_attention import gpu_attention
from qwen2_core.kernels.matmul import einsum_f32, uses_cpu_kernel
from qwen2_core.kernels.platforms import by_platform

DECODE_KEYS = 128  # keys that a decode step reads at once
_PREFILL_KEYS = 512  # keys that a block of queries reads at once
_SCORE_BYTES = 32 * 2**20  # of the scores of a block of queries and a block of keys
_LOWEST = float(jnp.finfo(jnp.float32).min)  # the largest score of none; finite, so that differences are too
_TINY = float(jnp.finfo(jnp.float32).tiny)  # least divisor: a query without keys divides 0 by it


class PartialSoftmax(NamedTuple):
    """Attention over some of the keys, into which further blocks of keys are merged.

    ``group`` are the query heads that share one head of keys and values.
    """

    peak: Float32[Array, "rows queries kv_heads group"]  # the largest score so far
    total: Float32[Array, "rows queries kv_heads group"]  # the sum of exp(score - peak)
    weighted: Float32[Array, "rows queries kv_heads group head_dim"]  # the sum of exp(score - peak) * v

    @property
    def attended(self) -> Float32[Array, "rows queries kv_heads group head_dim"]:
        """Returns the attention output; zero for a query that sees no key (padding on the left)."""
        return self.weighted / jnp.maximum(self.total, _TINY)[..., None]


class _KeyBlocks(NamedTuple):
    """Keys and values at ``capacity`` positions, to be read in blocks of ``size``."""

    read: Callable[[Array], tuple[Array, Array]]  # first position -> k, v [rows, kv_heads, size, head_dim]
    visible: Callable[[Array], Array]  # positions [size] -> bool [rows or 1, queries or 1, size]
    size: int
    capacity: int


def attend_causal(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch kv_heads positions head_dim"],
    v: Float[Array, "batch kv_heads positions head_dim"],
    key_valid: Bool[Array, "batch positions"] | None,
    window: int | Int32[Array, ""] | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Attends causally from the last ``tokens`` positions to all ``positions``, those of a cache included.

    Query i is at position ``positions - tokens + i``, and sees the valid positions up to its own. Query heads
    that are neighbours share a head of keys and values.

    Args:
        key_valid: whether each position holds a token; None where all do.
        window: how many positions each query sees at most, its own included; None for all.

    Returns:
        The attention output in q's dtype; zero for a query that sees no key.
    """
    if not uses_cpu_kernel(q, k):
        return _causal_by_blocks(q, k, v, key_valid, window)
    if key_valid is None:
        key_valid = jnp.ones((k.shape[0], k.shape[2]), bool)
    operands = (q, k, v, key_valid, *_operands(window))
    return by_platform(*operands, cpu=_causal_on_cpu, default=_causal_by_blocks)


@jax.custom_jvp
def _causal_on_cpu(q: Array, k: Array, v: Array, key_valid: Array, window: Array | None = None) -> Array:
    return cpu_attention_causal(q, k, v, key_valid, window)


@_causal_on_cpu.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    *activations, key_valid, window = primals
    _, tangent = jax.jvp(
        lambda q, k, v: _causal_by_blocks(q, k, v, key_valid, window), tuple(activations), tangents[:3]
    )
    return _causal_on_cpu(*primals), tangent


def _causal_by_blocks(
    q: Array, k: Array, v: Array, key_valid: Array | None, window: int | Array | None = None
) -> Array:
    batch, tokens, heads, head_dim = q.shape
    kv_heads, positions = k.shape[1:3]
    keys = min(_PREFILL_KEYS, positions)
    block = _query_block(batch * heads * keys * 4, tokens)
    starts = jnp.arange(0, tokens, block, dtype=jnp.int32)
    padded = jnp.pad(q, ((0, 0), (0, len(starts) * block - tokens), (0, 0), (0, 0)))
    padded = padded.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)

    places = jnp.arange(positions, dtype=jnp.int32)[None]  # of each position among its row's tokens
    if window is not None and key_valid is not None:
        places = jnp.cumsum(key_valid, axis=1, dtype=jnp.int32)

    def read(start: Array) -> tuple[Array, Array]:
        return lax.dynamic_slice_in_dim(k, start, keys, 2), lax.dynamic_slice_in_dim(v, start, keys, 2)

    def attend_block(start: int | Array) -> Array:
        own_positions = positions - tokens + start + jnp.arange(block, dtype=jnp.int32)
        begin, unseen = 0, None
        if window is not None:
            unseen = jnp.take(places, own_positions, axis=1, mode="clip")[..., None] - window
            begin = jnp.min(jnp.sum(places <= unseen[:, 0], axis=1)) // keys

        def visible(key_positions: Array) -> Array:
            causal = key_positions <= own_positions[:, None]
            if unseen is not None:
                causal &= jnp.take(places, key_positions, axis=1)[:, None] > unseen
            if key_valid is None:
                return causal if causal.ndim == 3 else causal[None]
            return causal & jnp.take(key_valid, key_positions, axis=1)[:, None]

        queries = lax.dynamic_slice_in_dim(padded, start, block, axis=1)
        # Where the number of blocks of keys is known while tracing, GPUs need not wait for it.
        all_are_seen = len(starts) == 1 or keys == positions
        seen = positions if all_are_seen else jnp.minimum(positions - tokens + start + block, positions)
        blocks = _KeyBlocks(read, visible, keys, positions)
        partial = _accumulate(_nothing(queries), queries, blocks, seen, begin)
        return partial.attended.astype(q.dtype)

    out = attend_block(0)[None] if len(starts) == 1 else lax.map(attend_block, starts)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, len(starts) * block, heads, head_dim)
    return out[:, :tokens]


def attend_two_part(
    q: Float[Array, "batch heads head_dim"],
    cache: KVCache,
    layer: int | Int32[Array, ""],
    window: int | Int32[Array, ""] | None = None,
) -> Float[Array, "batch heads head_dim"]:
    """Attends from one token per sequence to its prompt and to its own decode steps.

    Samples of one prompt share the prompt's keys and values ("bifurcated attention", Athiwaratkun et al.
    2024). Which sequences share a prompt changes not a bit of them.

    Args:
        q: one query a sequence.
        cache: says which prompt each sequence continues; the token's own key and value are already written
            at ``ar.index``.
        layer: may be traced if the cache is stacked.
        window: how many positions each token sees at most, its own included; None for all.

    Returns:
        The attention output in q's dtype.
    """
    forms = {"cuda": gpu_attention, "rocm": gpu_attention, "default": _two_part_by_blocks}
    if uses_cpu_kernel(q, jax.tree.leaves(cache.ar.k)[0]):
        forms["cpu"] = cpu_attention
    static = isinstance(layer, int)

    def of_layer(form: Callable[..., Array]) -> Callable[..., Array]:
        return lambda q, cache, traced, *window: form(q, cache, layer if static else traced, *window)

    forms = {platform: of_layer(form) for platform, form in forms.items()}
    return by_platform(q, cache, jnp.int32(layer), *_operands(window), **forms)


def reads_prompts_by_index(platform: str) -> bool:
    """Returns whether sequences should share their prompt's row by an index (``KVCache.prompt_row``).

    On CPU the compiled kernel reads a row where it lies, once for all of its sequences, and XLA copies each
    block of keys anyway. TPUs and GPUs read keys where they lie only if they are to read all rows in turn.
    With an index they would copy the keys of every sequence, at every step.
    """
    return platform == "cpu"


def attend_tokens_two_part(
    q: Float[Array, "batch tokens heads head_dim"],
    cache: KVCache,
    layer: int | Int32[Array, ""],
    window: int | Int32[Array, ""] | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Attends from several tokens of each sequence, as :func:`attend_two_part` does from one after the other.

    Their keys and values are already written, from ``ar.index`` on. What lies past them in the cache, or past
    a token's own position, is not read by it.
    """
    return _two_part_by_blocks(q, cache, layer, *_operands(window))


def _operands(window: int | Array | None) -> tuple[Array, ...]:
    """Returns a window as arguments: none where there is no window, so that programs have no trace of it."""
    return () if window is None else (jnp.asarray(window, jnp.int32),)


def _two_part_by_blocks(q: Array, cache: KVCache, layer: int | Array, window: Array | None = None) -> Array:
    """Attends from q [batch, heads, head_dim], or of several tokens [batch, tokens, heads, head_dim]."""
    batch, head_dim = len(q), q.shape[-1]
    tokens = 1 if q.ndim == 3 else q.shape[1]
    prompts = batch if cache.prompt_row is not None else cache.prefill.length.shape[0]
    samples = batch // prompts
    kv_heads = get_attention_kv(cache.ar, layer, 0, 1)[0].shape[1]
    by_prompt = q.reshape(prompts, samples * tokens, kv_heads, -1, head_dim)
    by_row = q.reshape(batch, tokens, kv_heads, -1, head_dim)
    first = None
    if window is not None:
        first = (cache.positions - window + 1).reshape(prompts, samples)
        if tokens > 1:
            first = first[..., None] + jnp.arange(tokens, dtype=jnp.int32)
            first = first.reshape(prompts, samples * tokens)
    partial = _accumulate_prompt(_nothing(by_prompt), by_prompt, cache, layer, first)
    partial = PartialSoftmax(*(a.reshape(*by_row.shape[:4], *a.shape[4:]) for a in partial))
    partial = _accumulate_steps(partial, by_row, cache.ar, layer, window)
    return partial.attended.reshape(q.shape).astype(q.dtype)


def _accumulate_prompt(
    partial: PartialSoftmax, q: Array, cache: KVCache, layer: int | Array, first: Array | None
) -> PartialSoftmax:
    """Merges the prompts' part of the cache, up to the longest prompt's end.

    Where an index says which row each sequence continues, each block's keys are copied for every sequence.

    Args:
        q: [prompts, samples, kv_heads, group, head_dim]; with an index, each sequence as a prompt's only one.
        first: [prompts, samples] the first position that each sequence sees; None: all of them see all.
    """
    part, rows = cache.prefill, cache.prompt_row
    length = part.length if rows is None else cache.prompt_lengths
    keys, begin = min(DECODE_KEYS, part.capacity), 0
    if first is not None:
        seen = jnp.where(first < length[:, None], first, part.capacity)
        begin = jnp.maximum(jnp.min(seen), 0) // keys

    def read(start: Array) -> tuple[Array, Array]:
        return get_attention_kv(part, layer, start, keys, rows)

    def visible(positions: Array) -> Array:
        valid = (positions < length[:, None])[:, None]
        return valid if first is None else valid & (positions >= first[..., None])

    blocks = _KeyBlocks(read, visible, keys, part.capacity)
    return _accumulate(partial, q, blocks, jnp.max(length), begin)


def _accumulate_steps(
    partial: PartialSoftmax, q: Array, part: ARCache, layer: int | Array, window: Array | None
) -> PartialSoftmax:
    """Merges the decode steps' part, around its ring: from the oldest sequence's first step to this one.

    Where rows begin at different steps, those are multiples of ``step_alignment``. Each block is summed in
    pieces of so many steps, which are merged in their order. A piece that holds nothing of a row's sequence
    changes not a bit of that row. So neither the place in the ring nor the other rows change a bit of a
    sequence, if the ring's capacity is a multiple of ``step_alignment``.
    """
    capacity, tokens = part.capacity, q.shape[1]
    own, last = part.index, part.index  # the steps of each token, and of the last one
    if tokens > 1:
        own, last = own + jnp.arange(tokens, dtype=jnp.int32)[:, None], last + (tokens - 1)
    keys = min(DECODE_KEYS, capacity)
    blocks = -(-capacity // keys)
    piece = part.step_alignment or keys
    pieces = keys // piece if keys % piece == 0 else 1

    def block_of(step: Array) -> Array:
        return step // capacity * blocks + step % capacity // keys

    def merge(block: Array, partial: PartialSoftmax) -> PartialSoftmax:
        # The last block of the ring may have to start early to stay inside.
        start = jnp.minimum(block % blocks * keys, capacity - keys)
        k, v = get_attention_kv(part, layer, start, keys)
        positions = start + jnp.arange(keys, dtype=jnp.int32)
        steps = last - (last - positions) % capacity  # at which each position was last written
        visible = (block_of(steps) == block) & (steps >= part.start[:, None])
        if tokens > 1:
            visible = visible[:, None] & (steps <= own)
        if window is not None:
            visible &= steps > own - window
        return _merge(partial, q, k, v, visible if tokens > 1 else visible[:, None], pieces)

    oldest = jnp.maximum(jnp.min(part.start), last - capacity + 1)
    if window is not None:
        oldest = jnp.maximum(oldest, part.index - window + 1)
    return lax.fori_loop(block_of(oldest), block_of(last) + 1, merge, partial)


def _accumulate(
    partial: PartialSoftmax, q: Array, blocks: _KeyBlocks, seen: int | Array, begin: int | Array = 0
) -> PartialSoftmax:
    """Merges positions 0 to ``seen``, which may be fewer than the blocks' capacity.

    Args:
        q: [rows, queries, kv_heads, group, head_dim].
        begin: the first block that any query sees.
    """

    def merge(i: Array, partial: PartialSoftmax) -> PartialSoftmax:
        # The last block may have to start early to stay inside; what it repeats is masked.
        first = i * blocks.size
        start = jnp.minimum(first, blocks.capacity - blocks.size)
        k, v = blocks.read(start)
        positions = start + jnp.arange(blocks.size, dtype=jnp.int32)
        return _merge(partial, q, k, v, blocks.visible(positions) & (positions >= first))

    return lax.fori_loop(begin, (seen + blocks.size - 1) // blocks.size, merge, partial)


def _merge(
    partial: PartialSoftmax, q: Array, k: Array, v: Array, visible: Array, pieces: int = 1
) -> PartialSoftmax:
    """Merges one block of keys, in equal ``pieces`` that are summed by themselves and merged in their order.

    The result equals, bit for bit, that of merging as many smaller blocks; the speed is nearly that of one.

    Args:
        visible: [rows or 1, queries or 1, keys] bool.
    """
    scores = einsum_f32("rqkgd,rkld->rqkgl", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, :, None, None], scores, -jnp.inf)
    scores = scores.reshape(*scores.shape[:-1], pieces, -1)
    peaks = [partial.peak]
    for own_peak in jnp.unstack(scores.max(-1), axis=-1):
        peaks.append(jnp.maximum(peaks[-1], own_peak))
    weights = jnp.exp(scores - jnp.stack(peaks[1:], axis=-1)[..., None])
    totals = jnp.unstack(weights.sum(-1), axis=-1)
    sums = _sums_of_pieces(weights.astype(v.dtype), v)
    total, weighted = partial.total, partial.weighted
    for before, peak, own_total, own_sum in zip(peaks, peaks[1:], totals, sums, strict=False):
        kept = jnp.exp(before - peak)
        total, weighted = total * kept + own_total, weighted * kept[..., None] + own_sum
    return PartialSoftmax(peaks[-1], total, weighted)


def _sums_of_pieces(weights: Array, v: Array) -> Array:
    """Returns the weighted sums of a block's values, for each of its pieces by itself.

    Args:
        weights: [rows, queries, kv_heads, group, pieces, keys].
        v: [rows, kv_heads, pieces * keys, head_dim].

    Returns:
        [pieces, rows, queries, kv_heads, group, head_dim] float32.
    """
    return by_platform(weights, v, tpu=_sums_by_masks, default=_sums_by_cuts)


def _sums_by_cuts(weights: Array, v: Array) -> Array:
    v = v.reshape(*v.shape[:2], weights.shape[4], -1, v.shape[-1])
    return einsum_f32("rqkgpl,rkpld->prqkgd", weights, v)


def _sums_by_masks(weights: Array, v: Array) -> Array:
    # A TPU has the positions in its lanes. To cut them, it would lay out all values anew, in twice the
    # memory. The zeros cost nothing: they are in rows of the matrix unit that would otherwise stay empty.
    own = jnp.eye(weights.shape[4], dtype=weights.dtype)[:, :, None]
    spread = (weights[..., None, :, :] * own).reshape(*weights.shape[:-1], -1)
    return einsum_f32("rqkgpl,rkld->prqkgd", spread, v)


def _nothing(q: Array) -> PartialSoftmax:
    """Returns the partial softmax over no keys."""
    return PartialSoftmax(
        jnp.full(q.shape[:-1], _LOWEST, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )


def _query_block(bytes_per_query: int, tokens: int) -> int:
    """Returns how many queries a block has: a power of two whose scores fit ``_SCORE_BYTES``, 16 or more."""
    block = 16
    while 2 * block * bytes_per_query <= _SCORE_BYTES:
        block *= 2
    return min(block, tokens)
