"""The machine under a benchmark: what it is, and how fast it reads memory, as JAX, torch and numpy see it.

The limit that every figure is set against is what the fastest of several large reductions over more memory
than any cache holds sustains, measured in the same run: decoding reads every weight once a step and can do no
better.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_ARRAY_BYTES = 2**29
_ACCELERATOR_ARRAY_BYTES = 2**31


def describe() -> dict[str, Any]:
    """Processor, cores, memory and versions, for the head of a results file."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {}
    for package in ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "libtpu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        **versions,
    }


def usable_cores() -> int:
    """Cores this process may run on: what both frameworks are given as threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sustained(runs: list[Callable[[], Any]], repeats: int = 8) -> float:
    """Seconds that the fastest of ``runs`` takes, the mean of ``repeats`` calls in a row.

    Where others share the memory, its fastest moment says nothing of what a second of work can expect.
    """

    def seconds(run: Callable[[], Any], calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls

    for run in runs:
        run()  # compiles, or makes what it needs
    return seconds(min(runs, key=lambda run: seconds(run, 2)), repeats)


def jax_bandwidth() -> float:
    """Bytes a second that JAX reads on its default device: a sum, a maximum or a product, the fastest."""
    import jax
    import jax.numpy as jnp

    size = _ARRAY_BYTES if jax.default_backend() == "cpu" else _ACCELERATOR_ARRAY_BYTES
    rows = jnp.ones((size // 4 // 8192, 8192), jnp.float32)
    vector = jnp.ones(rows.shape[0], jnp.float32)
    reductions = [
        jax.jit(jnp.sum),
        jax.jit(jnp.max),
        jax.jit(lambda a: a.sum(0)),
        jax.jit(lambda a: vector @ a),
    ]
    runs = [lambda reduce=reduce: reduce(rows).block_until_ready() for reduce in reductions]
    return rows.nbytes / sustained(runs)


def torch_bandwidth(device: str) -> float:
    """As ``jax_bandwidth``, for torch on ``device``."""
    import torch

    size = _ARRAY_BYTES if device == "cpu" else _ACCELERATOR_ARRAY_BYTES
    rows = torch.ones((size // 4 // 8192, 8192), device=device)
    vector = torch.ones(rows.shape[0], device=device)
    reductions: list[Callable[[Any], Any]] = [torch.sum, torch.max, lambda a: a.sum(0), lambda a: vector @ a]
    # .item() waits for the device
    runs = [lambda reduce=reduce: reduce(rows).flatten()[0].item() for reduce in reductions]
    return rows.nbytes / sustained(runs)


def numpy_bandwidth() -> float:
    """As ``jax_bandwidth``, for a process that has neither JAX nor torch: a thread for each core."""
    import numpy as np

    parts = np.array_split(np.ones(_ARRAY_BYTES // 4, np.float32), usable_cores())
    with ThreadPoolExecutor(len(parts)) as pool:
        runs = [lambda reduce=reduce: list(pool.map(reduce, parts)) for reduce in (np.sum, np.max)]
        return _ARRAY_BYTES / sustained(runs)


class PeakMemory:
    """Peak bytes of this process between ``start`` and ``read``: resident, and on the accelerator if any.

    Linux can forget a process's peak, elsewhere it is that since the process began; JAX never forgets the
    accelerator's. ``what`` in the reading says which it is.
    """

    def start(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._reset = True
        except OSError:
            self._reset = False

    def read(self) -> tuple[int, str]:
        status = Path("/proc/self/status")
        if self._reset and status.exists():
            found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
            if found:
                return int(found[1]) * 1024, "resident"
        import resource

        scale = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "resident, since the worker began"
