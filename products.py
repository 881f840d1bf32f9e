"""Every product of the model, in one place: what the hardware is asked to multiply, and how.

All products accumulate in float32. Float32 operands are multiplied as float32 everywhere: TPUs and
GPUs would by default round them to bfloat16 or TF32, a hundred times coarser than the captured
activations claim to be. GPU and TPU get plain dots. XLA's CPU backend needs care with bfloat16:

- a dot of fewer than 8 rows falls back to scalar code, 30 times under the memory bandwidth: rows are
  padded to 8, where the native instructions begin;
- batched bfloat16 dots with a float32 result are not implemented: attention converts its operands,
  which are blocks of activations, never weights;
- in a loop, the conversion of a bfloat16 weight to float32 is hoisted and the copy kept: the whole
  embedding, 545 MB at 0.5B, for a lookup of one row. ``compiler_options`` switches that off.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

_CPU_ROWS = 8


def einsum_f32(subscripts: str, a: Array, b: Array) -> Array:
    """``einsum`` of activations with float32 accumulation and result."""

    def plain(a: Array, b: Array) -> Array:
        return jnp.einsum(subscripts, a, b, precision=_precision(a, b), preferred_element_type=jnp.float32)

    def widened(a: Array, b: Array) -> Array:
        return plain(a.astype(jnp.float32), b.astype(jnp.float32))

    return lax.platform_dependent(a, b, cpu=widened, default=plain)


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """``x @ kernel + bias`` in x's dtype: x [..., in], kernel [in, out], bias [out]."""
    out = _product(x, kernel, contract=0)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)


def logits_f32(x: Array, kernel: Array, *, tied: bool) -> Array:
    """Float32 logits of x [..., hidden]; kernel [hidden, vocab] or, tied, the embedding [vocab, hidden]."""
    return _product(x, kernel, contract=1 if tied else 0)


def embed(token_ids: Array, table: Array) -> Array:
    """Rows of ``table [vocab, hidden]``; an id outside it gives NaN, never a neighbour's row."""
    # jnp.take would count negative ids from the end.
    return table.at[token_ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _product(x: Array, weights: Array, contract: int) -> Array:
    """x [..., in] times a weight matrix along its axis ``contract``; float32 [..., out]."""

    def plain(x: Array, weights: Array) -> Array:
        dimensions = (((x.ndim - 1,), (contract,)), ((), ()))
        precision = _precision(x, weights)
        return lax.dot_general(x, weights, dimensions, precision, preferred_element_type=jnp.float32)

    def padded(x: Array, weights: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        missing = max(_CPU_ROWS - rows.shape[0], 0)
        out = plain(jnp.pad(rows, ((0, missing), (0, 0))), weights)
        return out[: rows.shape[0]].reshape(*x.shape[:-1], -1)

    cpu = plain if x.dtype == jnp.float32 else padded
    return lax.platform_dependent(x, weights, cpu=cpu, default=plain)


def compiler_options() -> dict[str, str]:
    """What XLA must be told when a program with these products in a loop is compiled for this platform."""
    if jax.default_backend() == "cpu":
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return {}


def _precision(a: Array, b: Array) -> lax.Precision:
    return lax.Precision.HIGHEST if jnp.float32 in (a.dtype, b.dtype) else lax.Precision.DEFAULT
