"""A decode step's attention on GPUs: one softmax over all slots of both parts of the cache, valid or not.

A loop over the blocks that are valid, as elsewhere, has a length that the host does not know; on GPUs it
waits for the device at each turn, some hundred times a token. Reading all of a task's cache costs less.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from kvcache_utils import KVCache, get_attention_kv
from qwen2_core.kernels.matmul import einsum_f32

_LOWEST = float(jnp.finfo(jnp.float32).min)
_TINY = float(jnp.finfo(jnp.float32).tiny)


def gpu_attention(q: Array, cache: KVCache, layer: int | Array) -> Array:
    """``attention.attend_two_part`` without a loop; its arguments and result.

    Where rows begin at different times, each is summed in the order of its own steps, from a copy of its
    values: neither the place in the ring nor the rows beside it show in what a sequence computes.
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
        slots = (cache.ar.start[:, None] + steps) % cache.ar.capacity  # of each row's own steps
        scores = jnp.take_along_axis(scores, slots[:, None, None], axis=-1)
        scores = _masked(scores, head_dim, steps <= cache.ar.tokens_read[:, None])
        v = jnp.take_along_axis(v, slots[:, None, :, None], axis=2)
    peak = jnp.maximum(jnp.maximum(prompt_scores.max(-1), scores.max(-1)), _LOWEST)[..., None]
    prompt_weights, weights = jnp.exp(prompt_scores - peak), jnp.exp(scores - peak)
    total = prompt_weights.sum(-1) + weights.sum(-1)
    attended = by_row(einsum_f32("rkgl,rkld->rkgd", by_prompt(prompt_weights.astype(v.dtype)), prompt_v))
    attended = attended + einsum_f32("rkgl,rkld->rkgd", weights.astype(v.dtype), v)
    return (attended / jnp.maximum(total, _TINY)[..., None]).reshape(q.shape).astype(q.dtype)


def _masked(scores: Array, head_dim: int, visible: Array) -> Array:
    return jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf)
