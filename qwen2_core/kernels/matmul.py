"""Computes every matrix product of the model, in the form that suits the hardware.

All products accumulate in float32. Float32 operands are multiplied as float32 everywhere: by default TPUs and
GPUs would round them to bfloat16 or TF32, which is a hundred times coarser than the precision that captured
activations claim. TPUs get plain dots, and GPUs too, but for a single row of 16 bits: XLA would multiply it
elementwise with the weights and write products of their size in between. Doubled, it is a dot that the GPU's
units for matrices compute. On CPU, bfloat16 needs care:

- XLA's dot of several rows packs the weights anew at each call, and reads them at a third of the memory
  bandwidth. ``cpu_matmul``, where the machine can run it, does not.
- XLA's dot of a single row (decoding at batch 1) is scalar code, at a thirtieth of the memory bandwidth.
  Without ``cpu_matmul`` it is written as elementwise products of slices of the weights. XLA makes vector code
  of these, which reads nearly as fast as the memory allows.
- XLA has no batched bfloat16 dot with a float32 result. Without ``cpu_matmul`` attention converts its
  operands, which are blocks of activations and never weights.
- XLA hoists the conversion of a bfloat16 weight to float32 out of a loop and keeps the copy: of the whole
  embedding, 545 MB at 0.5B, to look up one row. ``compiler_options`` switches that off.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int, Int32

from qwen2_core.kernels.cpu.library import is_available
from qwen2_core.kernels.cpu.matmul import cpu_matmul
from qwen2_core.kernels.platforms import by_platform, may_be_split

_MOST_SLICES = (8, 14)  # of a kernel, of a tied embedding; XLA does not fuse longer sums
_PARTIAL_BYTES = 2**22  # of partial sums at once, which stay in the processor's cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixInStack:
    """One layer's matrix, left where it lies among those of all layers. ``linear`` takes it as a kernel."""

    stack: Float[Array, "layers _ _"]
    layer: Int32[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's own shape."""
        return self.stack.shape[1:]

    @property
    def dtype(self) -> Any:
        """The matrix's dtype."""
        return self.stack.dtype


def einsum_f32(subscripts: str, a: Float[Array, "*a"], b: Float[Array, "*b"]) -> Float32[Array, "*out"]:
    """Returns ``jnp.einsum(subscripts, a, b)`` of activations, accumulated in float32.

    The sum is over one axis: the last of ``a`` and one of the last two of ``b``. All other leading axes of
    ``b`` are axes of ``a`` too, in the same order.
    """
    axes, out_axes = subscripts.split("->")
    a_axes, b_axes = axes.split(",")
    matrices, summed = b_axes[:-2], a_axes[-1]
    rows = "".join(axis for axis in a_axes if axis not in b_axes)

    def plain(a: Array, b: Array) -> Array:
        return jnp.einsum(subscripts, a, b, precision=_precision(a, b), preferred_element_type=jnp.float32)

    def widened(a: Array, b: Array) -> Array:
        return plain(a.astype(jnp.float32), b.astype(jnp.float32))

    def cpu_kernel(a: Array, b: Array) -> Array:
        a = jnp.einsum(f"{a_axes}->{matrices}{rows}{summed}", a)
        row_sizes = a.shape[len(matrices) : -1]
        a = a.reshape(*a.shape[: len(matrices)], -1, a.shape[-1])
        out = cpu_matmul(a, b, transposed=b_axes[-1] == summed)
        out = out.reshape(*out.shape[: len(matrices)], *row_sizes, out.shape[-1])
        return jnp.einsum(f"{matrices}{rows}{b_axes[-2:].replace(summed, '')}->{out_axes}", out)

    cpu = cpu_kernel if uses_cpu_kernel(a, b) else widened
    return by_platform(a, b, cpu=cpu, default=plain)


def linear(
    x: Float[Array, "*rows inputs"],
    kernel: Float[Array, "inputs outputs"] | MatrixInStack,
    bias: Float[Array, " outputs"] | None = None,
    dtype: Any = None,
) -> Float[Array, "*rows outputs"]:
    """Returns ``x @ kernel + bias`` in ``dtype`` (x's by default). The bias is added in float32."""
    dtype = x.dtype if dtype is None else dtype
    if bias is None:
        return _product(x, kernel, 0, dtype)
    out = _product(x, kernel, 0, jnp.float32) + bias.astype(jnp.float32)
    return out.astype(dtype)


def logits_f32(
    x: Float[Array, "*rows hidden"], kernel: Float[Array, "_ _"], *, tied: bool
) -> Float32[Array, "*rows vocab"]:
    """Returns the logits of x; kernel is the head [hidden, vocab] or, tied, the embedding [vocab, hidden]."""
    return _product(x, kernel, 1 if tied else 0, jnp.float32)


def embed(
    token_ids: Int[Array, "*rows"], table: Float[Array, "vocab hidden"]
) -> Float[Array, "*rows hidden"]:
    """Looks up rows of the table. An id outside the vocabulary gives NaN, never another token's row."""
    # jnp.take would count negative ids from the end.
    return table.at[token_ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _product(x: Array, weights: Array | MatrixInStack, contract: int, dtype: Any) -> Array:
    """Multiplies x [..., in] by a matrix along the matrix's axis ``contract``: dtype [..., out]."""

    def plain(x: Array, weights: Array | MatrixInStack) -> Array:
        weights = _copied_out(weights)
        dimensions = (((x.ndim - 1,), (contract,)), ((), ()))
        precision = _precision(x, weights)
        out = lax.dot_general(x, weights, dimensions, precision, preferred_element_type=jnp.float32)
        return out.astype(dtype)

    def cpu_kernel(x: Array, weights: Array | MatrixInStack) -> Array:
        stack, layer = (
            (weights.stack, weights.layer) if isinstance(weights, MatrixInStack) else (weights, None)
        )
        rows = cpu_matmul(x.reshape(-1, x.shape[-1]), stack, contract == 1, dtype, layer)
        return rows.reshape(*x.shape[:-1], -1)

    def by_slices(x: Array, weights: Array | MatrixInStack) -> Array:
        return _row_by_slices(x, _copied_out(weights), contract).astype(dtype)

    def one_as_two(x: Array, weights: Array | MatrixInStack) -> Array:
        # The barrier keeps XLA from seeing that the rows are equal.
        rows = lax.optimization_barrier(jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1])))
        return plain(rows, weights)[0].reshape(*x.shape[:-1], -1)

    cpu, gpu = plain, {}
    one_row = math.prod(x.shape[:-1]) == 1 and x.dtype != jnp.float32
    if one_row:
        cpu, gpu = by_slices, {"cuda": one_as_two, "rocm": one_as_two}
    if uses_cpu_kernel(x, weights):
        cpu = cpu_kernel
    return by_platform(x, weights, cpu=cpu, **gpu, default=plain)


def _copied_out(weights: Array | MatrixInStack) -> Array:
    if isinstance(weights, MatrixInStack):
        return lax.dynamic_index_in_dim(weights.stack, weights.layer, keepdims=False)
    return weights


def uses_cpu_kernel(x: Float[Array, "*x"], weights: Float[Array, "*weights"] | MatrixInStack) -> bool:
    """Returns whether the compiled kernels for CPU multiply (or attend with) these.

    They take bfloat16 of an even number of inputs, and nothing that a mesh may split.
    """
    bfloat16 = x.dtype == weights.dtype == jnp.bfloat16
    return bfloat16 and x.shape[-1] % 2 == 0 and is_available() and not may_be_split()


def _row_by_slices(x: Array, weights: Array, contract: int) -> Array:
    """Multiplies a row x [1, ..., in] by a matrix of 16-bit weights along its axis ``contract``, in float32.

    Cuts the contracted axis into slices, multiplies each by its part of the row, and adds these products
    elementwise. What is left to sum is a float32 dot with ones, which is fast. The partial sums are a
    fraction of the weights' size; those of many outputs (a vocabulary) are made some thousand at a time.
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
            # One slice in two dimensions: XLA would not fuse a slice of a slice.
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
    """Returns the options that a program with these products in a loop must be compiled with."""
    if jax.default_backend() == "cpu":
        return {
            "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
            "xla_cpu_prefer_vector_width": 512,  # a preference: narrower machines use what they have
        }
    return {}


def _precision(a: Array, b: Array) -> lax.Precision:
    return lax.Precision.HIGHEST if jnp.float32 in (a.dtype, b.dtype) else lax.Precision.DEFAULT
