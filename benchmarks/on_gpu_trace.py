"""Kernel times of a JAX profile, from the ``trace.json.gz`` that ``jax.profiler`` writes."""

from __future__ import annotations

import collections
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """All runs of one kernel."""

    name: str
    microseconds: float
    runs: int


def profile(run: Callable[[], Any]) -> list[Kernel]:
    """Returns the kernels of one call of ``run``, which must wait for the device; the longest first.

    Raises:
        RuntimeError: the profiler wrote no trace, or one without any kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = sorted(Path(folder).rglob("*.trace.json.gz"))
        if not files:
            names = sorted(path.name for path in Path(folder).rglob("*") if path.is_file())
            raise RuntimeError(f"The profiler wrote no trace.json.gz, only {names or 'nothing'}.")
        with gzip.open(files[0], "rt", encoding="utf-8") as file:
            kernels = kernels_of(json.load(file)["traceEvents"])
    if not kernels:
        raise RuntimeError("The profiler's trace holds no kernel.")
    return kernels


def kernels_of(events: list[dict[str, Any]]) -> list[Kernel]:
    """Adds up the events of the GPU's streams, or on CPU those of XLA's operations, by name.

    A GPU's other lines (modules, operations, steps) hold the same time again.
    """
    processes, threads = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    on_gpu = {pid for pid, name in processes.items() if "GPU" in name}
    streams = {place for place, name in threads.items() if place[0] in on_gpu and "Stream" in name}
    seconds: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") != "X":
            continue
        place = event["pid"], event.get("tid")
        if place in streams or (not streams and "hlo_op" in event.get("args", {})):
            seconds[event["name"]] += event["dur"]
            counts[event["name"]] += 1
    return [Kernel(name, float(time), counts[name]) for name, time in seconds.most_common()]
