"""What decides the last bits of a run's sequences beside its store's settings, and saying that it differs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from arc_runner.console import say
from arc_runner.options import RunOptions
from qwen2_core.kernels.cpu.library import Instructions, instructions, is_available
from qwen2_core.sharding import Layout
from qwen2_jax import QwenConfig

_VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
_KERNELS = {
    Instructions.AVX2: "avx2",
    Instructions.AVX512_BF16: "avx512_bf16",
    Instructions.AMX: "avx512_bf16 and amx",
}
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_NO_BITS = ("--xla_dump", "--xla_force_host_platform_device_count")  # flags that change none


def run_numerics(options: RunOptions, config: QwenConfig, layout: Layout) -> dict[str, Any]:
    """Returns what decides the last bits of the sequences that a run makes, as JSON values.

    Two runs with equal values make the same bytes. Nothing is in it that differs from run to run by itself.
    """
    device = jax.local_devices()[0]
    is_continuous = options.generation == "continuous"
    return {
        "platform": device.platform,
        "device_kind": device.device_kind if device.platform != "cpu" else _cpu(),
        "cpu_kernels": _cpu_kernels(config),
        "generation": options.generation,
        "batch_size": None if options.generation == "python" else options.batch_size,
        "memory_budget": options.memory_budget if is_continuous else None,
        # A call holds the sequences of a task, so their number is part of its shape; slots take any.
        "of_a_test": None if is_continuous else [options.augmentations, options.samples_per_prompt],
        "mesh": [layout.data_parallel, layout.devices // layout.data_parallel],
        "scan_layers": config.scan_layers,
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "flags": {name: flags for name in _FLAGS if (flags := _that_matter(os.environ.get(name, "")))},
    }


def say_numerics(now: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> None:
    """Says what differs between this run and those that have made sequences of its store before."""
    if sentence := compare_numerics(now, earlier):
        say(sentence)


def compare_numerics(now: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence on what differs between this run and earlier ones; "" where nothing does."""
    others = [one for one in earlier if one != now]
    if not others:
        return ""
    differences = "; ".join(dict.fromkeys(phrase for one in others for phrase in _differences(one, now)))
    return (
        f"the store was begun otherwise than it is continued ({differences}): sequences made from now on may "
        "differ from those in their last bits, and so in their tokens; each index line names its numerics"
    )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*here, *there]):
        old, new = there.get(name), here.get(name)
        if old != new:
            yield f"{name} was {_word(old)} and is {_word(new)}"


def _word(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _cpu_kernels(config: QwenConfig) -> str | None:
    """Returns which of our compiled kernels compute, or None where XLA does all."""
    if config.dtype.name != "bfloat16" or not is_available():
        return None
    return _KERNELS[instructions()]


def _cpu() -> str:
    """Returns the instructions that XLA chooses among on this machine: "x86_64 avx2 avx512f"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    flags = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return " ".join([platform.machine(), *(name for name in _VECTORS if name in flags.split())])


def _that_matter(flags: str) -> str:
    return " ".join(sorted(flag for flag in flags.split() if not flag.startswith(_NO_BITS)))
