"""Multiplies bfloat16 matrices on CPUs with AVX-512 BF16, by the kernel in csrc/matmul.cc.

Several rows are multiplied by tiles where the machine has AMX (Intel Xeons since Sapphire Rapids), up to ten
times as fast as by vectors.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import BFloat16, Float

from qwen2_core.kernels.cpu.library import MATMUL, has_tiles


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def cpu_matmul(
    x: BFloat16[Array, "*products rows inputs"],
    weights: BFloat16[Array, "*products _ _"],
    transposed: bool,
    dtype: Any = jnp.float32,
) -> Float[Array, "*products rows outputs"]:
    """Multiplies x by ``weights [..., inputs, outputs]`` or, transposed, ``[..., outputs, inputs]``.

    Products are summed over the inputs in order and in float32, with denormals taken as zero. A row's bits do
    not depend on how many rows there are, if there are at least two.

    Args:
        x: the number of inputs is even.
        weights: leading axes are those of as many separate products.
        dtype: of the result: float32 or, rounded, bfloat16.
    """
    *leading, rows, inputs = x.shape
    outputs = weights.shape[-2 if transposed else -1]
    out = jax.ShapeDtypeStruct((math.prod(leading), rows, outputs), dtype)
    call = jax.ffi.ffi_call(MATMUL, out, vmap_method="sequential")
    product = call(
        x.reshape(-1, rows, inputs),
        weights.reshape(-1, *weights.shape[-2:]),
        transposed=transposed,
        tiles=has_tiles(),
    )
    return product.reshape(*leading, rows, outputs)


@cpu_matmul.defjvp
def _(
    transposed: bool, dtype: Any, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    def dot(x: Array, weights: Array) -> Array:
        weights = weights.swapaxes(-1, -2) if transposed else weights
        return jnp.matmul(x, weights, preferred_element_type=jnp.float32)

    (x, weights), (dx, dweights) = primals, tangents
    tangent = dot(dx, weights) + dot(x, dweights)
    return cpu_matmul(x, weights, transposed, dtype), tangent.astype(dtype)
