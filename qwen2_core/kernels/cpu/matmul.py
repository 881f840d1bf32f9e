"""Multiplies bfloat16 matrices on x86 CPUs, by the kernel in csrc/matmul.cc."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import BFloat16, Float, Int32

from qwen2_core.kernels.cpu.library import MATMUL, instructions


def cpu_matmul(
    x: BFloat16[Array, "*products rows inputs"],
    weights: BFloat16[Array, "*stack _ _"],
    transposed: bool,
    dtype: Any = jnp.float32,
    layer: Int32[Array, ""] | None = None,
) -> Float[Array, "*products rows outputs"]:
    """Multiplies x by ``weights [..., inputs, outputs]`` or, transposed, ``[..., outputs, inputs]``.

    Products are summed over the inputs in order and in float32; the instructions for bfloat16 take denormals
    as zero. A row's bits do not depend on how many rows there are, if there are at least two.

    Args:
        x: the number of inputs is even.
        weights: leading axes are those of as many separate products.
        dtype: of the result: float32 or, rounded, bfloat16.
        layer: which one to take of a stack of layers, the first axis of ``weights``. It is read where it
            lies.
    """
    if layer is None:
        weights, layer = weights[None], jnp.int32(0)
    return _product_of_layer(x, weights, layer, transposed, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _product_of_layer(x: Array, stack: Array, layer: Array, transposed: bool, dtype: Any) -> Array:
    *leading, rows, inputs = x.shape
    outputs = stack.shape[-2 if transposed else -1]
    out = jax.ShapeDtypeStruct((math.prod(leading), rows, outputs), dtype)
    call = jax.ffi.ffi_call(MATMUL, out, vmap_method="sequential")
    product = call(
        x.reshape(-1, rows, inputs),
        stack.reshape(-1, *stack.shape[-2:]),
        layer,
        transposed=transposed,
        instructions=int(instructions()),
    )
    return product.reshape(*leading, rows, outputs)


@_product_of_layer.defjvp
def _(
    transposed: bool, dtype: Any, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    (x, stack, layer), (dx, dstack, _) = primals, tangents

    def dot(x: Array, stack: Array) -> Array:
        weights = lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        weights = weights.swapaxes(-1, -2) if transposed else weights
        return jnp.matmul(x, weights, preferred_element_type=jnp.float32)

    tangent = dot(dx, stack) + dot(x, dstack)
    return _product_of_layer(x, stack, layer, transposed, dtype), tangent.astype(dtype)
