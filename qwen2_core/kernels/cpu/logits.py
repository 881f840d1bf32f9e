"""Summarizes logits on x86 CPUs, by the kernel in csrc/logits.cc."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32

from qwen2_core.kernels.cpu.library import LOGITS, instructions


def cpu_summarize(
    logits: Float32[Array, "rows vocab"],
) -> tuple[Float32[Array, " rows"], Int32[Array, " rows"], Float32[Array, " rows"]]:
    """Does what ``logits.summarize`` does, reading the logits from memory once.

    A row's bits depend neither on other rows nor on the number of threads.
    """
    rows = logits.shape[:1]
    results = [jax.ShapeDtypeStruct(rows, dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32)]
    call = jax.ffi.ffi_call(LOGITS, results, vmap_method="sequential")
    peak, first, log_sum = call(logits, instructions=int(instructions()))
    return peak, first, log_sum
