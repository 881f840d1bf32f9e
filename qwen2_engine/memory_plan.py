"""How many slots fit: the memory of continuous generation, known before any of it is taken.

Prompts come in buckets of width, and a slot has to be as wide as the longest. Where all of ``batch_size``
slots fit at the widest bucket, there is one stage. Else each bucket gets the largest of batch_size,
batch_size / 2, ... that fits at its width, and buckets of as many slots are one stage. The slots of a stage
run empty before the next begins: a sequence's last bits may depend on how many slots there are, so that
number must not depend on what else is left to do.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import jax

from kvcache_utils import ActivationBufferConfig
from qwen2_core.sharding import Layout, bytes_on_device, layout_of
from qwen2_engine.decode_window import SlotShape, SlotState
from qwen2_engine.programs import SlotPrograms, compile_slots
from qwen2_jax import QwenModel
from qwen2_jax_with_hooks import QwenModelWithActivations

_HOST_SHARE = 0.5  # of a machine's memory, where it is the device's too
_DEVICE_SHARE = 0.95  # of what the device lends
# Float32 values of hidden size that a prefill holds at once for each token, as XLA schedules it (measured).
_PREFILL_HIDDEN = 40
_PREFILL_HIDDEN_SCANNED = 18


@dataclasses.dataclass(frozen=True)
class Stage:
    """Slots of one shape, and the widths of the prompts that they take."""

    shape: SlotShape
    widths: tuple[int, ...]


def device_memory_budget(devices: int = 1) -> int:
    """Bytes that a run may take on each of its devices: nearly all of an accelerator's; on CPU their share of
    half of the machine's.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit * _DEVICE_SHARE)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _HOST_SHARE) // devices


def plan_stages(
    model: QwenModel,
    params: Any,
    widths: Iterable[int],
    shape: SlotShape,
    budget: int,
    capture_prompt: bool = False,
) -> list[Stage]:
    """The stages for prompts of these widths, short ones first; ``shape`` has the most slots to use.

    Where not even one slot fits it is planned all the same.
    """
    stages: list[Stage] = []
    for width in sorted(set(widths)):
        slots = shape.slots
        while slots > 1 and _estimate(model, params, shape, slots, width, capture_prompt) > budget:
            slots //= 2
        wider = dataclasses.replace(shape, slots=slots, prompt_width=width)
        if stages and stages[-1].shape.slots == slots:
            stages[-1] = Stage(wider, (*stages[-1].widths, width))
        else:
            stages.append(Stage(wider, (width,)))
    return stages


def start_stage(
    model: QwenModel, params: Any, stage: Stage, *, capture_prompt: bool = False, eos_slots: int = 8
) -> tuple[SlotPrograms, SlotState]:
    """Compiles a stage's programs, says what they will take, and makes its slots, all free.

    A window of free slots is run, which computes nothing but takes all the memory that one takes: if that
    is not there, half as many slots are tried, and that is said.
    """
    programs = compile_slots(
        model, params, stage.shape, stage.widths, capture_prompt=capture_prompt, eos_slots=eos_slots
    )
    print(describe(model, params, programs), flush=True)
    try:
        slots = programs.create()
        slots, _ = jax.block_until_ready(programs.window(params, slots, *programs.idle_drawing))
        return programs, slots
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error) or stage.shape.slots == 1:
            raise
    half = dataclasses.replace(stage.shape, slots=stage.shape.slots // 2)
    print(f"memory ran out with {stage.shape.slots} slots: trying {half.slots}", flush=True)
    return start_stage(
        model,
        params,
        dataclasses.replace(stage, shape=half),
        capture_prompt=capture_prompt,
        eos_slots=eos_slots,
    )


def expected_bytes(model: QwenModel, params: Any, programs: SlotPrograms) -> int:
    """Peak bytes on each device while ``programs`` run."""
    cache = _cache_bytes(model, programs.shape, programs.layout)
    return _weight_bytes(params) + cache + programs.working_bytes


def host_row_bytes(model: QwenModel, shape: SlotShape) -> int:
    """Bytes on the host of the rows of sequences of one group that have not ended, at most."""
    return _row_buffer(model, shape.max_tokens, shape.slots)


def describe(model: QwenModel, params: Any, programs: SlotPrograms) -> str:
    """The plan of a stage in a line."""
    shape, layout = programs.shape, programs.layout
    parts = {
        "weights": _weight_bytes(params),
        "KV cache": _cache_bytes(model, shape, layout),
        "windows, prefill and temporaries": programs.working_bytes,
    }
    detail = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
    groups = f" on each of {layout.groups} groups of devices" if layout.groups > 1 else ""
    each = " a device" if layout.devices > 1 else ""
    return (
        f"{shape.slots} slots{groups} for prompts of up to {shape.prompt_width} tokens, windows of "
        f"{shape.window} steps: {sum(parts.values()) / 1e6:.0f} MB{each} expected ({detail}); "
        f"on the host up to {layout.groups * host_row_bytes(model, shape) / 1e6:.0f} MB of unfinished rows"
    )


def _estimate(
    model: QwenModel, params: Any, shape: SlotShape, slots: int, width: int, capture_prompt: bool
) -> int:
    """As ``expected_bytes``, before anything is compiled; with the host's rows where its memory is meant."""
    shape = dataclasses.replace(shape, slots=slots, prompt_width=width)
    config, layout = model.config, layout_of(model.config, params)
    hidden = _PREFILL_HIDDEN_SCANNED if config.scan_layers else _PREFILL_HIDDEN
    prompt = _cache_bytes(model, shape, layout, 1) + (_row_buffer(model, width, 1) if capture_prompt else 0)
    window = _row_buffer(model, shape.window, slots)
    logits = 2 * 4 * max(slots, 8) * config.vocab_size
    working = max(logits + 2 * window + prompt, window + prompt + 4 * hidden * config.hidden_size * width)
    total = _weight_bytes(params) + _cache_bytes(model, shape, layout) + working
    if jax.default_backend() == "cpu":
        total += host_row_bytes(model, shape)
    return total


def _weight_bytes(params: Any) -> int:
    return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(params))


def _cache_bytes(model: QwenModel, shape: SlotShape, layout: Layout, slots: int | None = None) -> int:
    config = shape.cache_config(model, slots)
    return dataclasses.replace(config, num_kv_heads=layout.kv_heads(model.config)).nbytes


def _row_buffer(model: QwenModel, tokens: int, rows: int) -> int:
    if not isinstance(model, QwenModelWithActivations):
        return 0
    config = model.config
    return ActivationBufferConfig(
        len(model.extract_layers), tokens, rows, config.hidden_size, config.dtype
    ).nbytes


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in text or "out of memory" in text
