"""Computes a decode step's attention on GPUs: one softmax over all positions of both parts of the cache.

Elsewhere a loop reads the valid blocks of keys only. The host does not know how many those are, and on GPUs
such a loop waits for the device at each turn, some hundred times a token. Reading all of a task's cache,
valid or not, costs less.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int32

from kvcache_utils import KVCache, get_attention_kv
from qwen2_core.kernels.matmul import einsum_f32

_LOWEST = float(jnp.finfo(jnp.float32).min)  # the largest score of none; finite, so that differences are too
_TINY = float(jnp.finfo(jnp.float32).tiny)  # least divisor: a query without keys divides 0 by it


def gpu_attention(
    q: Float[Array, "batch heads head_dim"],
    cache: KVCache,
    layer: int | Int32[Array, ""],
    window: Int32[Array, ""] | None = None,
) -> Float[Array, "batch heads head_dim"]:
    """Does what ``attention.attend_two_part`` does, without a loop.

    Where rows begin at different steps, each row's scores and values are first copied into the order of its
    own steps. So neither its place in the ring nor the other rows change a bit of a sequence.
    """
    batch, _, head_dim = q.shape
    read = cache.prefill
    if cache.prompt_row is not None:
        read = dataclasses.replace(read, length=cache.prompt_lengths)
    prompt_k, prompt_v = get_attention_kv(read, layer, rows=cache.prompt_row)
    k, v = get_attention_kv(cache.ar, layer)
    prompts, kv_heads = prompt_k.shape[:2]

    def by_prompt(a: Array) -> Array:  # [B, kv_heads, G, n] -> [P, kv_heads, samples x G, n]
        a = a.reshape(prompts, -1, *a.shape[1:]).swapaxes(1, 2)
        return a.reshape(prompts, kv_heads, -1, a.shape[-1])

    def by_row(a: Array) -> Array:  # the way back
        a = a.reshape(prompts, kv_heads, batch // prompts, -1, a.shape[-1]).swapaxes(1, 2)
        return a.reshape(batch, kv_heads, -1, a.shape[-1])

    q_rows = q.reshape(batch, kv_heads, -1, head_dim)
    # Without the barrier XLA makes one product of the two with q, and for it copies all keys into one array.
    prompt_scores = einsum_f32("rkgd,rkld->rkgl", by_prompt(lax.optimization_barrier(q_rows)), prompt_k)
    prompt_scores = by_row(_masked(prompt_scores, head_dim, read.valid))
    if window is not None:
        own = jnp.arange(cache.prefill.capacity, dtype=jnp.int32) > (cache.positions - window)[:, None]
        prompt_scores = jnp.where(own[:, None, None], prompt_scores, -jnp.inf)
    scores = einsum_f32("rkgd,rkld->rkgl", q_rows, k)
    steps = jnp.arange(cache.ar.capacity, dtype=jnp.int32)
    if cache.ar.step_alignment is None:
        written = cache.ar.index - (cache.ar.index - steps) % cache.ar.capacity  # the step at each position
        visible = written >= cache.ar.start[:, None]
        if window is not None:
            visible &= written > cache.ar.index - window
        scores = _masked(scores, head_dim, visible)
    else:
        own = (cache.ar.start[:, None] + steps) % cache.ar.capacity  # the position of each row's own steps
        scores = jnp.take_along_axis(scores, own[:, None, None], axis=-1)
        visible = steps <= cache.ar.tokens_read[:, None]
        if window is not None:
            visible &= steps > cache.ar.tokens_read[:, None] - window
        scores = _masked(scores, head_dim, visible)
        v = jnp.take_along_axis(v, own[:, None, :, None], axis=2)
    peak = jnp.maximum(jnp.maximum(prompt_scores.max(-1), scores.max(-1)), _LOWEST)[..., None]
    prompt_weights, weights = jnp.exp(prompt_scores - peak), jnp.exp(scores - peak)
    total = prompt_weights.sum(-1) + weights.sum(-1)
    attended = by_row(einsum_f32("rkgl,rkld->rkgd", by_prompt(prompt_weights.astype(v.dtype)), prompt_v))
    attended = attended + einsum_f32("rkgl,rkld->rkgd", weights.astype(v.dtype), v)
    return (attended / jnp.maximum(total, _TINY)[..., None]).reshape(q.shape).astype(q.dtype)


def _masked(scores: Array, head_dim: int, visible: Array) -> Array:
    """Scales the scores [rows, kv_heads, G, n]; those not ``visible [rows, n]`` become minus infinity."""
    return jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf)
