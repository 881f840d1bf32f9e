"""Finds, loads and registers the compiled kernels for x86 CPUs.

The C++ in ``csrc`` is compiled when the package is installed, if a compiler is there. The kernels multiply
bfloat16 matrices, compute attention and summarize logits, with the best instructions that the CPU has. Where
they cannot run, ``unavailable_reason`` says why, and XLA computes the same sums, more slowly. On accelerators
nothing is loaded.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.util

import jax

MATMUL, ATTENTION, CAUSAL_ATTENTION, LOGITS = (
    "qwen2_cpu_matmul",
    "qwen2_cpu_attention",
    "qwen2_cpu_attention_causal",
    "qwen2_cpu_logits",
)
# The version of the handlers, as in csrc/matmul.cc: a library of another version must not be called.
_INTERFACE = 8


class Instructions(enum.IntEnum):
    """What the kernels compute with, from slow to fast; a CPU with one has those before it too."""

    AVX2 = 0  # nearly all x86 CPUs since 2015; weights are widened to float32 as they are read
    AVX512_BF16 = 1  # AMD since Zen 4, Intel Xeons of Cooper Lake and since Sapphire Rapids
    AMX = 2  # Intel Xeons since Sapphire Rapids: several rows by tiles, up to ten times as fast as by vectors


def is_available() -> bool:
    """Returns whether JAX computes on this CPU by default, and the CPU can run the kernels."""
    return jax.default_backend() == "cpu" and not unavailable_reason()


def unavailable_reason() -> str:
    """Returns one line: what is missing to run the kernels, and how to get it.

    Empty where they run, and on accelerators, which have no use for them.
    """
    return "" if jax.default_backend() != "cpu" else _load()[1]


def instructions() -> Instructions:
    """Returns what the kernels compute with on this CPU, which can run them."""
    library = _load()[0]
    assert library is not None, "the kernels cannot run here"
    return Instructions(library.CpuInstructions())


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Loads the library and registers its handlers with XLA: (library, ""), or (None, why it cannot be)."""
    spec = importlib.util.find_spec("qwen2_core.kernels.cpu._kernels")
    if spec is None or spec.origin is None:
        return None, (
            "the kernels for CPU were not compiled when this package was installed; install a C++20 compiler "
            "(such as g++), then this package again"
        )
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"the compiled kernels cannot be loaded ({error}); install this package again"
    if not hasattr(library, "CpuInterface") or library.CpuInterface() != _INTERFACE:
        return None, "the kernels were compiled from other sources than these; install this package again"
    if library.CpuInstructions() < 0:
        return None, "this CPU has no AVX2 instructions; use an x86 CPU of the last ten years"
    handlers = {
        MATMUL: library.CpuMatmul,
        ATTENTION: library.CpuAttention,
        CAUSAL_ATTENTION: library.CpuCausalAttention,
        LOGITS: library.CpuLogits,
    }
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return library, ""
