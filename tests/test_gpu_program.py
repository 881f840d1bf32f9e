"""A decode step on a GPU, by XLA's compiler alone: few kernels, two waits, nothing copied.

Of an H100 that is not there, at the shape of Qwen2.5-0.5B in bfloat16, four of its layers, prompts of 200
tokens and 1,100 new ones. ``benchmarks/gpu_program.py`` prints the same figures of all its layers. The limits
are what was counted with jax 0.10.2 and a few percent more.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import pytest

from benchmarks.gpu_program import h100, model_on
from benchmarks.hlo_cost import Program
from generate_jitted import GenerateShape, lower_generate
from qwen2_core.config import QwenConfig
from qwen2_core.kernels import attention, matmul
from qwen2_core.kernels.platforms import by_platform

LAYERS = 4
MB = 1e6


class Limits(NamedTuple):
    """What a step may take at most."""

    kernels: int
    waits: int
    megabytes: float  # read and written by all kernels
    temporaries: float  # in MB; one layer's keys are 0.3 MB a row


LIMITS = {1: Limits(119, 2, 415, 2.1), 8: Limits(113, 2, 490, 10.4)}


@pytest.fixture(scope="module")
def gpu() -> Any:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs XLA's compiler for NVIDIA's GPUs: pip install '.[cuda]'")
    return h100()


def too_much(gpu: Any, batch: int, *, scan_layers: bool = False) -> set[str]:
    """Returns of what a decode step takes more than it may."""
    model, params = model_on(
        gpu, QwenConfig(dtype="bfloat16", num_hidden_layers=LAYERS, scan_layers=scan_layers)
    )
    shape = GenerateShape(batch, 200, 1100)
    decode = lower_generate(model, params, shape)[1].compile()
    memory: Any = decode.memory_analysis()
    cost = Program(decode.as_text() or "").step()
    taken = Limits(cost.kernels, cost.waits, cost.bytes / MB, memory.temp_size_in_bytes / MB)
    print(f"batch {batch}: {taken}")
    found = {
        name for name, value, limit in zip(Limits._fields, taken, LIMITS[batch], strict=True) if value > limit
    }
    in_place = memory.alias_size_in_bytes
    if in_place < 0.999 * max(memory.output_size_in_bytes, shape.nbytes(model)):
        found.add("copied results")
    return found


@pytest.mark.parametrize("batch", [1, 8])
def test_a_decode_step_on_a_gpu_has_few_kernels_two_waits_and_copies_nothing(gpu: Any, batch: int):
    assert too_much(gpu, batch) == set()


@pytest.mark.slow
def test_attention_in_loops_on_a_gpu_is_noticed(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        attention, "by_platform", lambda *operands, default, **forms: by_platform(*operands, default=default)
    )
    assert {"kernels", "waits"} <= too_much(gpu, 8)


@pytest.mark.slow
def test_scanned_layers_on_a_gpu_are_noticed(gpu: Any):
    assert {"kernels", "megabytes", "temporaries"} <= too_much(gpu, 8, scan_layers=True)


@pytest.mark.slow
def test_a_single_row_that_is_multiplied_elementwise_is_noticed(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        matmul, "by_platform", lambda *operands, default, **forms: by_platform(*operands, default=default)
    )
    assert {"kernels", "megabytes"} <= too_much(gpu, 1)
