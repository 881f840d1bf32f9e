"""Every product of the model, in one place: what the hardware is asked to multiply, and how.

All products accumulate in float32. Float32 operands are multiplied as float32 everywhere: TPUs and
GPUs would by default round them to bfloat16 or TF32, a hundred times coarser than the captured
activations claim to be. GPU and TPU get plain dots. On CPU, bfloat16 needs care:

- XLA's dot of several rows packs the weights anew at each call and reads them at a third of what memory
  gives; ``cpu_product`` does not, where the machine can run it;
- its dot of a single row (decoding at batch 1) falls back to scalar code, 30 times under the memory
  bandwidth. Without ``cpu_product`` it is written as elementwise products of slices of the weights, which XLA
  turns into vector code that reads nearly as fast as the memory gives;
- batched bfloat16 dots with a float32 result are not implemented: without ``cpu_product`` attention
  converts its operands, which are blocks of activations, never weights;
- in a loop, the conversion of a bfloat16 weight to float32 is hoisted and the copy kept: the whole
  embedding, 545 MB at 0.5B, for a lookup of one row. ``compiler_options`` switches that off.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qwen2_core.kernels.cpu.matmul import cpu_product, why_not

_MOST_SLICES = (8, 14)  # of a kernel, of a tied embedding; XLA fuses no longer sums
_PARTIAL_BYTES = 2**22  # of partial sums at once, to stay in the cache


def einsum_f32(subscripts: str, a: Array, b: Array) -> Array:
    """``einsum`` of activations with float32 accumulation and result.

    Sums over one axis, the last of ``a`` and one of the last two of ``b``; all axes of ``b`` before these are
    axes of ``a`` too, in the same order.
    """
    axes, out_axes = subscripts.split("->")
    a_axes, b_axes = axes.split(",")
    matrices, summed = b_axes[:-2], a_axes[-1]
    rows = "".join(axis for axis in a_axes if axis not in b_axes)

    def plain(a: Array, b: Array) -> Array:
        return jnp.einsum(subscripts, a, b, precision=_precision(a, b), preferred_element_type=jnp.float32)

    def widened(a: Array, b: Array) -> Array:
        return plain(a.astype(jnp.float32), b.astype(jnp.float32))

    def our_own(a: Array, b: Array) -> Array:
        a = jnp.einsum(f"{a_axes}->{matrices}{rows}{summed}", a)
        row_sizes = a.shape[len(matrices) : -1]
        a = a.reshape(*a.shape[: len(matrices)], -1, a.shape[-1])
        out = cpu_product(a, b, transposed=b_axes[-1] == summed)
        out = out.reshape(*out.shape[: len(matrices)], *row_sizes, out.shape[-1])
        return jnp.einsum(f"{matrices}{rows}{b_axes[-2:].replace(summed, '')}->{out_axes}", out)

    cpu = our_own if is_for_our_own(a, b) else widened
    return lax.platform_dependent(a, b, cpu=cpu, default=plain)


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """``x @ kernel + bias`` in x's dtype: x [..., in], kernel [in, out], bias [out]."""
    if bias is None:
        return _product(x, kernel, 0, x.dtype)
    out = _product(x, kernel, 0, jnp.float32) + bias.astype(jnp.float32)
    return out.astype(x.dtype)


def logits_f32(x: Array, kernel: Array, *, tied: bool) -> Array:
    """Float32 logits of x [..., hidden]; kernel [hidden, vocab] or, tied, the embedding [vocab, hidden]."""
    return _product(x, kernel, 1 if tied else 0, jnp.float32)


def embed(token_ids: Array, table: Array) -> Array:
    """Rows of ``table [vocab, hidden]``; an id outside it gives NaN, never a neighbour's row."""
    # jnp.take would count negative ids from the end.
    return table.at[token_ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _product(x: Array, weights: Array, contract: int, dtype: Any) -> Array:
    """x [..., in] times a weight matrix along its axis ``contract``, summed in float32; dtype [..., out]."""

    def plain(x: Array, weights: Array) -> Array:
        dimensions = (((x.ndim - 1,), (contract,)), ((), ()))
        precision = _precision(x, weights)
        out = lax.dot_general(x, weights, dimensions, precision, preferred_element_type=jnp.float32)
        return out.astype(dtype)

    def our_own(x: Array, weights: Array) -> Array:
        rows = cpu_product(x.reshape(-1, x.shape[-1]), weights, contract == 1, dtype)
        return rows.reshape(*x.shape[:-1], -1)

    def by_slices(x: Array, weights: Array) -> Array:
        return _row_by_slices(x, weights, contract).astype(dtype)

    cpu = plain
    if is_for_our_own(x, weights):
        cpu = our_own
    elif math.prod(x.shape[:-1]) == 1 and x.dtype != jnp.float32:
        cpu = by_slices
    return lax.platform_dependent(x, weights, cpu=cpu, default=plain)


def is_for_our_own(x: Array, weights: Array) -> bool:
    """Whether our kernels for CPU take these; not what a mesh may split: XLA would gather it for the call."""
    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
        return False
    return x.dtype == weights.dtype == jnp.bfloat16 and x.shape[-1] % 2 == 0 and not why_not()


def _row_by_slices(x: Array, weights: Array, contract: int) -> Array:
    """One row x [1, ..., in] times a matrix of 16-bit weights along its axis ``contract``; float32.

    The contracted axis is cut into slices, which are multiplied by their part of the row and added to each
    other elementwise; the remaining sum is a float32 dot with ones, which is fast. Partial sums are a
    fraction of the weights, and those of many outputs (a vocabulary) are made some thousand at a time.
    """
    size, outputs = weights.shape[contract], weights.shape[1 - contract]
    slices = max(n for n in range(1, _MOST_SLICES[contract] + 1) if size % n == 0)
    width = size // slices
    parts = jnp.expand_dims(x.reshape(slices, width).astype(jnp.float32), 2 - contract)
    chunks = -(-width * outputs * 4 // _PARTIAL_BYTES)
    chunk = -(-outputs // chunks)

    def outputs_from(start: int | Array) -> Array:
        def product(n: int) -> Array:
            first = (n * width, start) if contract == 0 else (start, n * width)
            shape = (width, chunk) if contract == 0 else (chunk, width)
            # One slice of two dimensions: a slice of a slice would not be fused.
            return lax.dynamic_slice(weights, first, shape).astype(jnp.float32) * parts[n]

        partial = functools.reduce(jnp.add, map(product, range(slices)))
        return jnp.tensordot(jnp.ones(width), partial, ((0,), (contract,)), precision=lax.Precision.HIGHEST)

    def write(i: Array, out: Array) -> Array:
        start = jnp.minimum(i * chunk, outputs - chunk)  # the last chunk repeats some of the one before
        return lax.dynamic_update_slice(out, outputs_from(start), (start,))

    nothing = jnp.zeros(outputs, jnp.float32)
    out = outputs_from(0) if chunks == 1 else lax.fori_loop(0, chunks, write, nothing)
    return out.reshape(*x.shape[:-1], outputs)


def compiler_options() -> dict[str, Any]:
    """What XLA must be told when a program with these products in a loop is compiled for this platform."""
    if jax.default_backend() == "cpu":
        return {
            "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
            "xla_cpu_prefer_vector_width": 512,  # a preference: narrower machines use what they have
        }
    return {}


def _precision(a: Array, b: Array) -> lax.Precision:
    return lax.Precision.HIGHEST if jnp.float32 in (a.dtype, b.dtype) else lax.Precision.DEFAULT
