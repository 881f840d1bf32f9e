"""Products of bfloat16 matrices on CPUs with AVX-512 BF16 (since Zen 4 and Cooper Lake): cpu_product.cc.

Several rows are multiplied by tiles where the machine has AMX (Intel Xeons since Sapphire Rapids), up to ten
times as fast as by vectors. The kernels are compiled, with those of ``cpu_attention``, when the package is
installed. Where no compiler was found, or the machine has no such instructions, ``why_not`` says so, and XLA
is asked instead: the same sums, slower.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

_TARGET = "qwen2_cpu_product"
_INTERFACE = 2  # of the handlers, as in cpu_product.cc: a library compiled before a change must not be called


def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("qwen2_core.kernels.cpu._kernels")
    return ctypes.CDLL(spec.origin) if spec and spec.origin else None


@functools.cache
def why_not() -> str:
    """Why this machine cannot run ``cpu_product`` and ``cpu_attention``; empty where it can."""
    library = _library()
    if library is None:
        return "it was not compiled when this package was installed, which needs a C++20 compiler"
    if not hasattr(library, "CpuInterface") or library.CpuInterface() != _INTERFACE:
        return "it was compiled from other sources than these; install the package again"
    if not library.CpuProductSupported():
        return "this CPU has no AVX-512 BF16 instructions"
    handlers = {
        _TARGET: library.CpuProduct,
        "qwen2_cpu_attention": library.CpuAttention,
        "qwen2_cpu_attention_causal": library.CpuCausalAttention,
    }
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return ""


@functools.cache
def has_tiles() -> bool:
    """Whether this machine multiplies several rows by tiles (AMX: Intel Xeons since Sapphire Rapids)."""
    library = _library()
    return library is not None and not why_not() and bool(library.CpuTilesSupported())


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def cpu_product(x: Array, weights: Array, transposed: bool, dtype: Any = jnp.float32) -> Array:
    """x [..., rows, in] times weights [..., in, out] or, transposed, [..., out, in], in bfloat16.

    Sums run over ``in``, an even number, in order and in float32, with denormals taken as zero; a row's bits
    do not depend on how many rows there are, if at least two. Leading axes are those of as many separate
    products. The result is float32 or, rounded, bfloat16.
    """
    *leading, rows, inputs = x.shape
    outputs = weights.shape[-2 if transposed else -1]
    out = jax.ShapeDtypeStruct((math.prod(leading), rows, outputs), dtype)
    call = jax.ffi.ffi_call(_TARGET, out, vmap_method="sequential")
    product = call(
        x.reshape(-1, rows, inputs),
        weights.reshape(-1, *weights.shape[-2:]),
        transposed=transposed,
        tiles=has_tiles(),
    )
    return product.reshape(*leading, rows, outputs)


@cpu_product.defjvp
def _(
    transposed: bool, dtype: Any, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    def dot(x: Array, weights: Array) -> Array:
        weights = weights.swapaxes(-1, -2) if transposed else weights
        return jnp.matmul(x, weights, preferred_element_type=jnp.float32)

    (x, weights), (dx, dweights) = primals, tangents
    tangent = dot(dx, weights) + dot(x, dweights)
    return cpu_product(x, weights, transposed, dtype), tangent.astype(dtype)
