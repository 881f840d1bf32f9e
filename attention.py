"""Attention over the KV caches, grouped heads without repeating keys or values, softmax in float32.

``attend_causal`` serves whole prompts and the growing cache, in blocks of queries, so that memory
grows with the length and not with its square. ``attend_two_part`` serves a decode step over the
fixed cache, in blocks of keys: one running softmax over the prompt's blocks and then the decode
part's, only as far as they are valid. It never concatenates the parts, costs what is valid and not
what is allocated, and its temporaries do not grow with the cache. (Read whole, XLA on CPU copies
each layer's cache every step at batch 1.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvcache_utils import ARCache, KVCache, PrefillCache, get_attention_kv
from products import einsum_f32

# Scores of one block of queries: small enough to stay cheap beside any model, large enough to be fast.
_SCORE_BYTES = 64 * 2**20
# Keys a decode step reads at once.
_KEY_BLOCK = 128
_MASKED = float(jnp.finfo(jnp.float32).min)


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
    slots = k.shape[2]
    block = _query_block(batch * heads * slots * 4, tokens)
    starts = jnp.arange(0, tokens, block, dtype=jnp.int32)
    padded = jnp.pad(q, ((0, 0), (0, len(starts) * block - tokens), (0, 0), (0, 0)))

    def attend_block(start: Array) -> Array:
        queries = lax.dynamic_slice_in_dim(padded, start, block, axis=1)
        queries = queries.reshape(batch, block, k.shape[1], -1, head_dim)
        scores = einsum_f32("btkgd,bksd->bkgts", queries, k) * head_dim**-0.5
        own_slot = slots - tokens + start + jnp.arange(block, dtype=jnp.int32)
        visible = jnp.arange(slots, dtype=jnp.int32)[None, :] <= own_slot[:, None]
        if key_valid is not None:
            visible = visible[None, None, None] & key_valid[:, None, None, None, :]
        probs = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1)
        return einsum_f32("bkgts,bksd->btkgd", probs.astype(v.dtype), v).astype(q.dtype)

    out = attend_block(starts[0])[None] if len(starts) == 1 else lax.map(attend_block, starts)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, len(starts) * block, heads, head_dim)
    return out[:, :tokens]


class PartialSoftmax(NamedTuple):
    """Attention over some of the keys: what another block can be merged into (Milakov & Gimelshein 2018)."""

    peak: Array  # [..., G] largest score so far
    total: Array  # [..., G] sum of exp(score - peak)
    weighted: Array  # [..., G, head_dim] sum of exp(score - peak) * v


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

    partial = PartialSoftmax(
        jnp.full(by_prompt.shape[:-1], _MASKED, jnp.float32),
        jnp.zeros(by_prompt.shape[:-1], jnp.float32),
        jnp.zeros(by_prompt.shape, jnp.float32),
    )
    partial = _accumulate(partial, by_prompt, cache.prefill, layer, cache.prefill.length)
    partial = PartialSoftmax(*(a.reshape(*by_row.shape[:4], *a.shape[4:]) for a in partial))
    partial = _accumulate(partial, by_row, cache.ar, layer, cache.ar.index[None] + 1)
    return (partial.weighted / partial.total[..., None]).reshape(q.shape).astype(q.dtype)


def _accumulate(
    partial: PartialSoftmax, q: Array, part: PrefillCache | ARCache, layer: int | Array, valid: Array
) -> PartialSoftmax:
    """Merges one part's slots below ``valid`` ([rows] or [1]); q [rows, samples, kv_heads, G, head_dim]."""
    block = min(_KEY_BLOCK, part.capacity)

    def merge(i: Array, partial: PartialSoftmax) -> PartialSoftmax:
        # The last block may have to start early to stay inside; what it repeats is masked.
        first = i * block
        start = jnp.minimum(first, part.capacity - block)
        k, v = get_attention_kv(part, layer, start, block)
        slots = start + jnp.arange(block, dtype=jnp.int32)
        visible = (slots >= first) & (slots < valid[:, None])
        scores = einsum_f32("rskgd,rkld->rskgl", q, k) * q.shape[-1] ** -0.5
        scores = jnp.where(visible[:, None, None, None, :], scores, -jnp.inf)
        peak = jnp.maximum(partial.peak, scores.max(-1))
        old, new = jnp.exp(partial.peak - peak), jnp.exp(scores - peak[..., None])
        return PartialSoftmax(
            peak,
            partial.total * old + new.sum(-1),
            partial.weighted * old[..., None] + einsum_f32("rskgl,rkld->rskgd", new.astype(v.dtype), v),
        )

    return lax.fori_loop(0, (jnp.max(valid) + block - 1) // block, merge, partial)


def _query_block(bytes_per_query: int, tokens: int) -> int:
    """Queries a block: a power of two whose scores take at most ``_SCORE_BYTES``, at least 16."""
    block = 16
    while 2 * block * bytes_per_query <= _SCORE_BYTES:
        block *= 2
    return min(block, tokens)
