"""Attention over the KV caches: grouped heads without repeating keys or values, softmax in float32.

One idea serves all: a running softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022),
only as far as keys are visible. ``attend_causal`` applies it to whole prompts and to the growing cache, block
of queries by block of queries, so that memory does not grow with the square of the length and keys in the
future cost nothing. ``attend_two_part`` applies it to a decode step over the fixed cache, first the prompt's
part and then the sequence's own, which are never concatenated; it costs what is valid and not what is
allocated, and its temporaries do not grow with the cache. (Read whole, XLA on CPU copies each layer's cache
every step at batch 1.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kvcache_utils import ARCache, KVCache, PrefillCache, get_attention_kv
from products import einsum_f32

_DECODE_KEYS = 128  # keys a decode step reads at once
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
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    keys = min(_PREFILL_KEYS, slots)
    block = _query_block(batch * heads * keys * 4, tokens)
    starts = jnp.arange(0, tokens, block, dtype=jnp.int32)
    padded = jnp.pad(q, ((0, 0), (0, len(starts) * block - tokens), (0, 0), (0, 0)))
    padded = padded.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)

    def read(start: Array) -> tuple[Array, Array]:
        return lax.dynamic_slice_in_dim(k, start, keys, 2), lax.dynamic_slice_in_dim(v, start, keys, 2)

    def attend_block(start: Array) -> Array:
        own_slot = slots - tokens + start + jnp.arange(block, dtype=jnp.int32)

        def visible(key_slots: Array) -> Array:
            causal = key_slots <= own_slot[:, None]
            if key_valid is None:
                return causal[None]
            return causal & jnp.take(key_valid, key_slots, axis=1)[:, None]

        queries = lax.dynamic_slice_in_dim(padded, start, block, axis=1)
        seen = jnp.minimum(own_slot[-1] + 1, slots)
        partial = _accumulate(_nothing(queries), queries, read, visible, keys, slots, seen)
        return partial.attended.astype(q.dtype)

    out = attend_block(starts[0])[None] if len(starts) == 1 else lax.map(attend_block, starts)
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
    batch, _, head_dim = q.shape
    prompts, samples = cache.prefill.length.shape[0], cache.samples_per_prompt
    kv_heads = get_attention_kv(cache.ar, layer, 0, 1)[0].shape[1]
    by_prompt = q.reshape(prompts, samples, kv_heads, -1, head_dim)
    by_row = q.reshape(batch, 1, kv_heads, -1, head_dim)
    partial = _accumulate_part(_nothing(by_prompt), by_prompt, cache.prefill, layer, cache.prefill.length)
    partial = PartialSoftmax(*(a.reshape(*by_row.shape[:4], *a.shape[4:]) for a in partial))
    partial = _accumulate_part(partial, by_row, cache.ar, layer, cache.ar.index[None] + 1)
    return partial.attended.reshape(q.shape).astype(q.dtype)


def _accumulate_part(
    partial: PartialSoftmax, q: Array, part: PrefillCache | ARCache, layer: int | Array, valid: Array
) -> PartialSoftmax:
    """Merges one part of the cache, its slots below ``valid`` ([rows] or [1])."""
    keys = min(_DECODE_KEYS, part.capacity)

    def read(start: Array) -> tuple[Array, Array]:
        return get_attention_kv(part, layer, start, keys)

    def visible(key_slots: Array) -> Array:
        return (key_slots < valid[:, None])[:, None]

    return _accumulate(partial, q, read, visible, keys, part.capacity, jnp.max(valid))


def _accumulate(
    partial: PartialSoftmax,
    q: Array,
    read: Callable[[Array], tuple[Array, Array]],
    visible: Callable[[Array], Array],
    keys: int,
    capacity: int,
    seen: Array,
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
        mask = (visible(slots) & (slots >= first))[:, :, None, None]
        scores = einsum_f32("rqkgd,rkld->rqkgl", q, k) * q.shape[-1] ** -0.5
        scores = jnp.where(mask, scores, -jnp.inf)
        peak = jnp.maximum(partial.peak, scores.max(-1))
        old, new = jnp.exp(partial.peak - peak), jnp.exp(scores - peak[..., None])
        return PartialSoftmax(
            peak,
            partial.total * old + new.sum(-1),
            partial.weighted * old[..., None] + einsum_f32("rqkgl,rkld->rqkgd", new.astype(v.dtype), v),
        )

    return lax.fori_loop(0, (seen + keys - 1) // keys, merge, partial)


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
