"""Attention over the KV caches: grouped heads without repeating keys or values, softmax in float32.

One idea serves all: a running softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022),
only as far as keys are visible. ``attend_causal`` applies it to whole prompts and to the growing cache, block
of queries by block of queries, so that memory does not grow with the square of the length and keys in the
future cost nothing. ``attend_two_part`` applies it to a decode step over the fixed cache, first the prompt's
part and then the sequence's own, which are never concatenated; it costs what is valid and not what is
allocated, and its temporaries do not grow with the cache. (Read whole, XLA on CPU copies each layer's cache
every step at batch 1.) In bfloat16 on CPU, where the machine can run it, ``cpu_attention`` does both instead
and reads each sequence's keys where they lie; on GPUs ``gpu_attention`` does the decode step without a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvcache_utils import ARCache, KVCache, PrefillCache, get_attention_kv
from qwen2_core.kernels.cpu.attention import cpu_attention, cpu_attention_causal
from qwen2_core.kernels.gpu_attention import gpu_attention
from qwen2_core.kernels.matmul import einsum_f32, is_for_our_own

DECODE_KEYS = 128  # keys a decode step reads at once
_PREFILL_KEYS = 512  # keys a block of queries reads at once
_SCORE_BYTES = 32 * 2**20  # scores of a block of queries and a block of keys
_MASKED = float(jnp.finfo(jnp.float32).min)
_TINY = float(jnp.finfo(jnp.float32).tiny)


class PartialSoftmax(NamedTuple):
    """Attention over some of the keys: what a further block of them can be merged into."""

    peak: Array  # [rows, queries, kv_heads, G] largest score so far
    total: Array  # [rows, queries, kv_heads, G] sum of exp(score - peak)
    weighted: Array  # [rows, queries, kv_heads, G, head_dim] sum of exp(score - peak) * v

    @property
    def attended(self) -> Array:
        """The attention output; zero for a query that sees no key (padding on the left)."""
        return self.weighted / jnp.maximum(self.total, _TINY)[..., None]


def attend_causal(q: Array, k: Array, v: Array, key_valid: Array | None) -> Array:
    """Causal attention of the last ``tokens`` slots over all ``slots``.

    Query i sits in slot ``slots - tokens + i`` and sees the valid slots up to its own.

    Args:
        q: [B, tokens, heads, head_dim].
        k, v: [B, kv_heads, slots, head_dim].
        key_valid: [B, slots] bool, or None where every slot is valid.

    Returns:
        [B, tokens, heads, head_dim] in q's dtype.
    """
    if not is_for_our_own(q, k):
        return _causal_by_blocks(q, k, v, key_valid)
    if key_valid is None:
        key_valid = jnp.ones((k.shape[0], k.shape[2]), bool)
    return lax.platform_dependent(q, k, v, key_valid, cpu=_causal_on_cpu, default=_causal_by_blocks)


@jax.custom_jvp
def _causal_on_cpu(q: Array, k: Array, v: Array, key_valid: Array) -> Array:
    return cpu_attention_causal(q, k, v, key_valid)


@_causal_on_cpu.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    *activations, key_valid = primals
    _, tangent = jax.jvp(
        lambda q, k, v: _causal_by_blocks(q, k, v, key_valid), tuple(activations), tangents[:3]
    )
    return _causal_on_cpu(*primals), tangent


def _causal_by_blocks(q: Array, k: Array, v: Array, key_valid: Array | None) -> Array:
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    keys = min(_PREFILL_KEYS, slots)
    block = _query_block(batch * heads * keys * 4, tokens)
    starts = jnp.arange(0, tokens, block, dtype=jnp.int32)
    padded = jnp.pad(q, ((0, 0), (0, len(starts) * block - tokens), (0, 0), (0, 0)))
    padded = padded.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)

    def read(start: Array) -> tuple[Array, Array]:
        return lax.dynamic_slice_in_dim(k, start, keys, 2), lax.dynamic_slice_in_dim(v, start, keys, 2)

    def attend_block(start: int | Array) -> Array:
        own_slot = slots - tokens + start + jnp.arange(block, dtype=jnp.int32)

        def visible(key_slots: Array) -> Array:
            causal = key_slots <= own_slot[:, None]
            if key_valid is None:
                return causal[None]
            return causal & jnp.take(key_valid, key_slots, axis=1)[:, None]

        queries = lax.dynamic_slice_in_dim(padded, start, block, axis=1)
        # Where it is known now how many blocks of keys there are, GPUs need not wait for it.
        one = len(starts) == 1 or keys == slots
        seen = slots if one else jnp.minimum(slots - tokens + start + block, slots)
        partial = _accumulate(_nothing(queries), queries, read, visible, keys, slots, seen)
        return partial.attended.astype(q.dtype)

    out = attend_block(0)[None] if len(starts) == 1 else lax.map(attend_block, starts)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, len(starts) * block, heads, head_dim)
    return out[:, :tokens]


def attend_two_part(q: Array, cache: KVCache, layer: int | Array) -> Array:
    """Attention of one token per sequence over its prompt's slots and its own decode slots.

    Args:
        q: [B, heads, head_dim]; sequence b continues prompt ``b // (B // P)``.
        cache: the token's own key and value are already written at ``ar.index``.

    Returns:
        [B, heads, head_dim] in q's dtype.
    """
    forms = {"cuda": gpu_attention, "rocm": gpu_attention, "default": _two_part_by_blocks}
    if is_for_our_own(q, jax.tree.leaves(cache.ar.k)[0]):
        forms["cpu"] = cpu_attention
    static = isinstance(layer, int)

    def of_layer(form: Callable[..., Array]) -> Callable[..., Array]:
        return lambda q, cache, traced: form(q, cache, layer if static else traced)

    forms = {platform: of_layer(form) for platform, form in forms.items()}
    return lax.platform_dependent(q, cache, jnp.int32(layer), **forms)


def _two_part_by_blocks(q: Array, cache: KVCache, layer: int | Array) -> Array:
    batch, _, head_dim = q.shape
    prompts, samples = cache.prefill.length.shape[0], cache.samples_per_prompt
    kv_heads = get_attention_kv(cache.ar, layer, 0, 1)[0].shape[1]
    by_prompt = q.reshape(prompts, samples, kv_heads, -1, head_dim)
    by_row = q.reshape(batch, 1, kv_heads, -1, head_dim)
    partial = _accumulate_prompt(_nothing(by_prompt), by_prompt, cache.prefill, layer)
    partial = PartialSoftmax(*(a.reshape(*by_row.shape[:4], *a.shape[4:]) for a in partial))
    partial = _accumulate_steps(partial, by_row, cache.ar, layer)
    return partial.attended.reshape(q.shape).astype(q.dtype)


def _accumulate_prompt(
    partial: PartialSoftmax, q: Array, part: PrefillCache, layer: int | Array
) -> PartialSoftmax:
    """Merges the prompts' part of the cache, as far as the longest prompt."""
    keys = min(DECODE_KEYS, part.capacity)

    def read(start: Array) -> tuple[Array, Array]:
        return get_attention_kv(part, layer, start, keys)

    def visible(key_slots: Array) -> Array:
        return (key_slots < part.length[:, None])[:, None]

    return _accumulate(partial, q, read, visible, keys, part.capacity, jnp.max(part.length))


def _accumulate_steps(partial: PartialSoftmax, q: Array, part: ARCache, layer: int | Array) -> PartialSoftmax:
    """Merges the decode steps' part, around its ring from the oldest sequence's first step to this one.

    Where rows begin at different times, blocks are summed in pieces of ``begin_every`` steps, merged in their
    order; one that holds nothing of a row's sequence changes not a bit of that row. So neither the place in
    the ring nor the rows beside it show in what a sequence computes, if the ring's capacity is a multiple of
    a piece.
    """
    capacity = part.capacity
    keys = min(DECODE_KEYS, capacity)
    blocks = -(-capacity // keys)
    piece = part.begin_every or keys
    pieces = keys // piece if keys % piece == 0 else 1

    def block_of(step: Array) -> Array:
        return step // capacity * blocks + step % capacity // keys

    def merge(block: Array, partial: PartialSoftmax) -> PartialSoftmax:
        # The last block of the ring may have to start early to stay inside.
        start = jnp.minimum(block % blocks * keys, capacity - keys)
        k, v = get_attention_kv(part, layer, start, keys)
        slots = start + jnp.arange(keys, dtype=jnp.int32)
        steps = part.index - (part.index - slots) % capacity  # at which each slot was last written
        visible = (block_of(steps) == block) & (steps >= part.start[:, None])
        return _merge(partial, q, k, v, visible[:, None], pieces)

    oldest = jnp.maximum(jnp.min(part.start), part.index - capacity + 1)
    return lax.fori_loop(block_of(oldest), block_of(part.index) + 1, merge, partial)


def _accumulate(
    partial: PartialSoftmax,
    q: Array,
    read: Callable[[Array], tuple[Array, Array]],
    visible: Callable[[Array], Array],
    keys: int,
    capacity: int,
    seen: int | Array,
) -> PartialSoftmax:
    """Merges slots 0 to ``seen`` in blocks of ``keys``.

    Args:
        q: [rows, queries, kv_heads, G, head_dim].
        read: first slot -> k, v [rows, kv_heads, keys, head_dim].
        visible: slots [keys] -> bool [rows or 1, queries or 1, keys].
        capacity: slots that there are; ``seen`` may be fewer.
    """

    def merge(i: Array, partial: PartialSoftmax) -> PartialSoftmax:
        # The last block may have to start early to stay inside; what it repeats is masked.
        first = i * keys
        start = jnp.minimum(first, capacity - keys)
        k, v = read(start)
        slots = start + jnp.arange(keys, dtype=jnp.int32)
        return _merge(partial, q, k, v, visible(slots) & (slots >= first))

    return lax.fori_loop(0, (seen + keys - 1) // keys, merge, partial)


def _merge(
    partial: PartialSoftmax, q: Array, k: Array, v: Array, visible: Array, pieces: int = 1
) -> PartialSoftmax:
    """``partial`` and one block of keys, in equal ``pieces`` that are summed alone and merged in their order.

    The result is that of as many smaller blocks, bit for bit, at nearly the speed of one.

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
    """The sums of a block's values, of each of its pieces alone.

    Args:
        weights: [rows, queries, kv_heads, G, pieces, keys].
        v: [rows, kv_heads, pieces x keys, head_dim].

    Returns:
        [pieces, rows, queries, kv_heads, G, head_dim] float32.
    """
    return lax.platform_dependent(weights, v, tpu=_sums_by_masks, default=_sums_by_cuts)


def _sums_by_cuts(weights: Array, v: Array) -> Array:
    v = v.reshape(*v.shape[:2], weights.shape[4], -1, v.shape[-1])
    return einsum_f32("rqkgpl,rkpld->prqkgd", weights, v)


def _sums_by_masks(weights: Array, v: Array) -> Array:
    # A TPU has the slots in its lanes. To cut them, it would lay out all values anew, in twice the memory;
    # the zeros cost it nothing, in rows of its matrix unit that stayed empty.
    own = jnp.eye(weights.shape[4], dtype=weights.dtype)[:, :, None]
    spread = (weights[..., None, :, :] * own).reshape(*weights.shape[:-1], -1)
    return einsum_f32("rqkgpl,rkld->prqkgd", spread, v)


def _nothing(q: Array) -> PartialSoftmax:
    return PartialSoftmax(
        jnp.full(q.shape[:-1], _MASKED, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )


def _query_block(bytes_per_query: int, tokens: int) -> int:
    """Queries a block: a power of two whose scores take at most ``_SCORE_BYTES``, at least 16."""
    block = 16
    while 2 * block * bytes_per_query <= _SCORE_BYTES:
        block *= 2
    return min(block, tokens)
