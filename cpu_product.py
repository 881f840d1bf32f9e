"""Products of bfloat16 matrices on CPUs with AVX-512 BF16 (since Zen 4 and Cooper Lake): cpu_product.cc.

It is compiled, with ``cpu_attention``, when the package is installed. Where no compiler was found, or the
machine has no such instructions, ``why_not`` says so, and XLA is asked instead: the same sums, up to twice as
slow.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
from jax import Array

_TARGET = "qwen2_cpu_product"


@functools.cache
def why_not() -> str:
    """Why this machine cannot run ``cpu_product`` and ``cpu_attention``; empty where it can."""
    spec = importlib.util.find_spec("_cpu_product")
    if spec is None or spec.origin is None:
        return "it was not compiled when this package was installed, which needs a C++20 compiler"
    library = ctypes.CDLL(spec.origin)
    if not library.CpuProductSupported():
        return "this CPU has no AVX-512 BF16 instructions"
    for target, handler in ((_TARGET, library.CpuProduct), ("qwen2_cpu_attention", library.CpuAttention)):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return ""


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def cpu_product(x: Array, weights: Array, transposed: bool) -> Array:
    """x [..., rows, in] times weights [..., in, out] or, transposed, [..., out, in]; bfloat16 to float32.

    Sums run over ``in``, an even number, in order and in float32, with denormals taken as zero; a row's bits
    do not depend on how many rows there are (transposed, if there are at least two). Leading axes are those
    of as many separate products.
    """
    *leading, rows, inputs = x.shape
    outputs = weights.shape[-2 if transposed else -1]
    out = jax.ShapeDtypeStruct((math.prod(leading), rows, outputs), jnp.float32)
    call = jax.ffi.ffi_call(_TARGET, out, vmap_method="sequential")
    product = call(
        x.reshape(-1, rows, inputs), weights.reshape(-1, *weights.shape[-2:]), transposed=transposed
    )
    return product.reshape(*leading, rows, outputs)


@cpu_product.defjvp
def _(transposed: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    def dot(x: Array, weights: Array) -> Array:
        weights = weights.swapaxes(-1, -2) if transposed else weights
        return jnp.matmul(x, weights, preferred_element_type=jnp.float32)

    (x, weights), (dx, dweights) = primals, tangents
    return cpu_product(x, weights, transposed), dot(dx, weights) + dot(x, dweights)
