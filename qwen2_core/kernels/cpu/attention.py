"""Attention on CPUs with AVX-512 BF16: cpu_attention.cc, compiled with ``cpu_product``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kvcache_utils import KVCache
from qwen2_core.kernels.cpu.matmul import has_tiles


def cpu_attention(q: Array, cache: KVCache, layer: int | Array) -> Array:
    """Attention of one token per sequence over its prompt's slots and its own decode slots.

    What is not valid is not read. Keys and values are taken in the sequence's order, so that its bits depend
    neither on its place in the ring nor on other rows. Not differentiable.

    Args:
        q: [B, heads, head_dim] bfloat16, head_dim even; sequence b continues prompt ``b // (B // P)``.
        cache: in bfloat16; the token's own key and value are already written at ``ar.index``.

    Returns:
        [B, heads, head_dim] bfloat16; zero for a sequence without any key.
    """

    def buffers(part: Array | tuple[Array, ...]) -> Array:
        """One layer's, or all of a stacked cache's behind each other: a reshape and not a copy."""
        if isinstance(part, tuple):
            return part[layer]  # pyright: ignore[reportArgumentType, reportCallIssue]
        return part.reshape(-1, *part.shape[2:])

    call = jax.ffi.ffi_call("qwen2_cpu_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))
    prefill, ar = cache.prefill, cache.ar
    return call(
        q,
        buffers(prefill.k),
        buffers(prefill.v),
        prefill.length,
        buffers(ar.k),
        buffers(ar.v),
        ar.start,
        ar.index,
        jnp.int32(0 if isinstance(ar.k, tuple) else layer),
        tiles=has_tiles(),
    )


def cpu_attention_causal(q: Array, k: Array, v: Array, key_valid: Array) -> Array:
    """``attention.attend_causal`` in bfloat16, head_dim even. Not differentiable."""
    call = jax.ffi.ffi_call(
        "qwen2_cpu_attention_causal", jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential"
    )
    return call(q, k, v, key_valid, tiles=has_tiles())
