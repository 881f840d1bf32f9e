"""Computes attention on x86 CPUs, by the kernels in csrc/attention.cc.

Neither can be differentiated; :mod:`qwen2_core.kernels.attention` gives the causal one a derivative.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import BFloat16, Bool, Int32

from kvcache_utils import KVCache
from qwen2_core.kernels.cpu.library import ATTENTION, CAUSAL_ATTENTION, instructions


def cpu_attention(
    q: BFloat16[Array, "batch heads head_dim"],
    cache: KVCache,
    layer: int | Int32[Array, ""],
    window: Int32[Array, ""] | None = None,
) -> BFloat16[Array, "batch heads head_dim"]:
    """Attends from one token per sequence to its prompt and to its own decode steps.

    Reads valid positions only. Takes keys and values in the sequence's order, so that the result's bits
    depend neither on the sequence's place in the ring nor on other rows. Reads a prompt's keys and values
    once for all sequences that continue it.

    Args:
        q: one query a sequence; head_dim is even.
        cache: in bfloat16; the token's own key and value are already written at ``ar.index``.
        window: how many positions each token sees at most, its own included; None for all.

    Returns:
        Zero for a sequence without any key.
    """

    def buffers(part: Array | tuple[Array, ...]) -> Array:
        """Returns one layer's buffer, or the stack as it is: XLA would copy it to reshape it."""
        return part[layer] if isinstance(part, tuple) else part  # pyright: ignore[reportArgumentType, reportCallIssue]

    call = jax.ffi.ffi_call(ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype))
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
        *_operands(cache.prompt_row),
        *_operands(window),
        instructions=int(instructions()),
    )


def cpu_attention_causal(
    q: BFloat16[Array, "batch tokens heads head_dim"],
    k: BFloat16[Array, "batch kv_heads positions head_dim"],
    v: BFloat16[Array, "batch kv_heads positions head_dim"],
    key_valid: Bool[Array, "batch positions"],
    window: Int32[Array, ""] | None = None,
) -> BFloat16[Array, "batch tokens heads head_dim"]:
    """Does what ``attention.attend_causal`` does, in bfloat16; head_dim is even."""
    call = jax.ffi.ffi_call(
        CAUSAL_ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential"
    )
    return call(q, k, v, key_valid, *_operands(window), instructions=int(instructions()))


def _operands(optional: Array | None) -> tuple[Array, ...]:
    return () if optional is None else (optional,)
