"""Plans how many slots fit: the memory of continuous generation, known before any of it is taken.

Prompts come in buckets of width, and a slot has to be as wide as the longest. Where all slots that were asked
for fit at the widest bucket, there is one stage. Else each bucket gets the largest of slots, slots / 2, slots
/ 4, ... that fits at its width, and neighbouring buckets with as many slots are one stage. The slots of a
stage run empty before the next stage begins. A sequence's last bits may depend on how many slots there are,
so that number must not depend on what else is left to do.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import jax

from qwen2_core.requests import SequenceRequest
from qwen2_core.sharding import Layout, bytes_on_device
from qwen2_engine.decode_window import SlotShape
from qwen2_engine.programs import PromptPrograms, SlotPrograms
from qwen2_jax import QwenModel

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

    def takes(self, request: SequenceRequest) -> bool:
        """Returns whether a request is generated in this stage."""
        return request.width in self.widths and (request.max_tokens == 0) == self.shape.reads_only


@dataclasses.dataclass(frozen=True)
class SlotMemory:
    """Bytes that the slots of a stage take, each figure on each device but for ``host_rows``."""

    weights: int
    kv_cache: int
    working: int  # windows, prefill and temporaries
    host_rows: int  # on the host, of all groups: captured rows of sequences that have not ended, at most

    @property
    def on_device(self) -> int:
        """Peak bytes on each device."""
        return self.weights + self.kv_cache + self.working


def device_memory_budget(devices: int = 1) -> int:
    """Returns the bytes that a run may take on each of its devices.

    Nearly all of an accelerator's memory; on CPU each device's share of half of the machine's.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit * _DEVICE_SHARE)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _HOST_SHARE) // devices


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryPlanner:
    """Counts the memory of slots for one model, with its weights where they are."""

    model: QwenModel
    params: Any
    layout: Layout
    steering: Any = None  # values of interventions, whole on each device

    def stages(self, widths: Iterable[int], shape: SlotShape, budget: int) -> list[Stage]:
        """Returns the stages for prompts of these widths, short ones first.

        Where not even one slot fits, one is planned all the same.

        Args:
            widths: buckets of the prompts.
            shape: has the most slots to use; its prompt_width does not count.
            budget: bytes on each device.
        """
        stages: list[Stage] = []
        for width in sorted(set(widths)):
            shape_of_width = dataclasses.replace(shape, prompt_width=width)
            while shape_of_width.slots > 1 and self.estimate(shape_of_width) > budget:
                shape_of_width = dataclasses.replace(shape_of_width, slots=shape_of_width.slots // 2)
            if stages and stages[-1].shape.slots == shape_of_width.slots:
                stages[-1] = Stage(shape_of_width, (*stages[-1].widths, width))
            else:
                stages.append(Stage(shape_of_width, (width,)))
        return stages

    def reading_stages(self, widths: Iterable[int], shape: SlotShape) -> list[Stage]:
        """Returns the stage that reads prompts of these widths for their rows alone; none for no widths."""
        ordered = tuple(sorted(set(widths)))
        if not ordered:
            return []
        return [Stage(dataclasses.replace(shape, slots=1, prompt_width=ordered[-1], max_tokens=0), ordered)]

    def memory(self, programs: SlotPrograms | PromptPrograms) -> SlotMemory:
        """Returns the memory that compiled programs take while they run."""
        if programs.shape.reads_only:
            rows = self.layout.data_parallel * self._row_buffer(programs.shape.prompt_width, 1)
            return SlotMemory(self._weights(), 0, programs.working_bytes, rows)
        host_rows = self.layout.data_parallel * self._host_rows(programs.shape)
        return SlotMemory(self._weights(), self._kv_cache(programs.shape), programs.working_bytes, host_rows)

    def estimate(self, shape: SlotShape) -> int:
        """Estimates ``memory(...).on_device`` before anything is compiled; on CPU with the host's rows."""
        config = self.model.config
        width = shape.prompt_width
        if shape.reads_only:  # no slots; one prompt is read while the one before is copied out
            prompt = self.estimate(dataclasses.replace(shape, max_tokens=1))
            return prompt + self._row_buffer(width, 1)
        hidden = _PREFILL_HIDDEN_SCANNED if config.scan_layers else _PREFILL_HIDDEN
        prompt = self._kv_cache(dataclasses.replace(shape, slots=1))
        prompt += self._row_buffer(width, 1) if shape.capture_prompt else 0
        window = self._row_buffer(shape.window, shape.slots)
        logits = 2 * 4 * max(shape.slots, 8) * config.vocab_size
        if shape.sampling.repetition_penalty:  # those that were penalized too, and a byte for each token
            logits += (4 * max(shape.slots, 8) + shape.slots + 1) * config.vocab_size
        prefill = 4 * hidden * config.hidden_size * width
        working = max(logits + 2 * window + prompt, window + prompt + prefill)
        working += sum(leaf.nbytes for leaf in jax.tree.leaves(self.steering))
        total = self._weights() + self._kv_cache(shape) + working
        return total + (self._host_rows(shape) if jax.default_backend() == "cpu" else 0)

    def _weights(self) -> int:
        return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(self.params))

    def _kv_cache(self, shape: SlotShape) -> int:
        kv_heads = self.layout.kv_heads(self.model.config)
        return dataclasses.replace(shape.cache_config(self.model), num_kv_heads=kv_heads).nbytes

    def _host_rows(self, shape: SlotShape) -> int:
        return self._row_buffer(shape.max_tokens, shape.slots)

    def _row_buffer(self, tokens: int, rows: int) -> int:
        return self.model.captured_bytes(tokens, rows)
