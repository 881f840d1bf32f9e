"""A decode step's attention on GPUs: one softmax over all slots of both parts of the cache, valid or not.

A loop over the blocks that are valid, as elsewhere, has a length that the host does not know; on GPUs it
waits for the device at each turn, some hundred times a token. Reading all of a task's cache costs less.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from kvcache_utils import KVCache, get_attention_kv
from products import einsum_f32

_BLOCK = 128  # keys summed alone where rows begin at different times
_LOWEST = float(jnp.finfo(jnp.float32).min)
_TINY = float(jnp.finfo(jnp.float32).tiny)


def gpu_attention(q: Array, cache: KVCache, layer: int | Array) -> Array:
    """``attention.attend_two_part`` without a loop; its arguments and result.

    Where rows begin at different times, each is summed in the order of its own steps, from a copy of its
    values, in blocks: neither the place in the ring, nor the rows beside it, nor the capacity of either part
    show in what a sequence computes, if the prompts' part is made of whole blocks.
    """
    batch, _, head_dim = q.shape
    (prompt_k, prompt_v), (k, v) = (get_attention_kv(part, layer) for part in (cache.prefill, cache.ar))
    prompts, kv_heads = prompt_k.shape[:2]

    def by_prompt(a: Array) -> Array:  # [B, kv_heads, G, n] -> [P, kv_heads, samples x G, n]
        a = a.reshape(prompts, -1, *a.shape[1:]).swapaxes(1, 2)
        return a.reshape(prompts, kv_heads, -1, a.shape[-1])

    def by_row(a: Array) -> Array:
        a = a.reshape(prompts, kv_heads, batch // prompts, -1, a.shape[-1]).swapaxes(1, 2)
        return a.reshape(batch, kv_heads, -1, a.shape[-1])

    q_rows = q.reshape(batch, kv_heads, -1, head_dim)
    # The barrier, as of two products with the same q XLA makes one, for which it copies all keys together.
    prompt_scores = einsum_f32("rkgd,rkld->rkgl", by_prompt(lax.optimization_barrier(q_rows)), prompt_k)
    prompt_scores = by_row(_masked(prompt_scores, head_dim, cache.prefill.valid))
    scores = einsum_f32("rkgd,rkld->rkgl", q_rows, k)
    steps = jnp.arange(cache.ar.capacity, dtype=jnp.int32)
    if cache.ar.begin_every is None:
        written = cache.ar.index - (cache.ar.index - steps) % cache.ar.capacity
        scores = _masked(scores, head_dim, written >= cache.ar.start[:, None])
    else:
        steps = jnp.arange(-(-cache.ar.capacity // _BLOCK) * _BLOCK, dtype=jnp.int32)  # of each row's own
        slots = (cache.ar.start[:, None] + steps) % cache.ar.capacity
        visible = (steps < cache.ar.capacity) & (steps <= cache.ar.tokens_read[:, None])
        scores = _masked(jnp.take_along_axis(scores, slots[:, None, None], axis=-1), head_dim, visible)
        v = jnp.take_along_axis(v, slots[:, None, :, None], axis=2)
    peak = jnp.maximum(jnp.maximum(prompt_scores.max(-1), scores.max(-1)), _LOWEST)[..., None]
    block = None if cache.ar.begin_every is None else _BLOCK
    prompt_weights, weights = jnp.exp(prompt_scores - peak), jnp.exp(scores - peak)
    total = _total(prompt_weights, block) + _total(weights, block)
    attended = by_row(_weighted(by_prompt(prompt_weights), prompt_v, block)) + _weighted(weights, v, block)
    return (attended / jnp.maximum(total, _TINY)[..., None]).reshape(q.shape).astype(q.dtype)


def _masked(scores: Array, head_dim: int, visible: Array) -> Array:
    return jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf)


def _total(weights: Array, block: int | None) -> Array:
    """The sums of weights [rows, kv_heads, G, keys], block by block in their order."""
    return _in_order(_cut(weights, 3, block).sum(-1), axis=3)


def _weighted(weights: Array, v: Array, block: int | None) -> Array:
    """The sums of weights [rows, kv_heads, G, keys] times v [rows, kv_heads, keys, head_dim], likewise."""
    weights, v = _cut(weights.astype(v.dtype), 3, block), _cut(v, 2, block)
    return _in_order(einsum_f32("rkgbl,rkbld->rkbgd", weights, v), axis=2)


def _cut(a: Array, axis: int, block: int | None) -> Array:
    """``axis`` as two, of blocks and of what is in them; one block if it is not made of whole ones."""
    blocks = a.shape[axis] // block if block and a.shape[axis] % block == 0 else 1
    return a.reshape(*a.shape[:axis], blocks, -1, *a.shape[axis + 1 :])


def _in_order(sums: Array, axis: int) -> Array:
    return functools.reduce(jnp.add, jnp.unstack(sums, axis=axis))
