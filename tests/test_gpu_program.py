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
from benchmarks.hlo_cost import Cost, Program
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


HLO = """
%fused (p.1: f32[100,8], p.2: f32[1,8], p.3: s32[]) -> f32[100,8] {
  %p.1 = f32[100,8]{1,0} parameter(0)
  %p.2 = f32[1,8]{1,0} parameter(1)
  %p.3 = s32[] parameter(2)
  ROOT %dus = f32[100,8]{1,0} dynamic-update-slice(%p.1, %p.2, %p.3, %p.3)
}
%branch.1 (p.4: f32[4]) -> f32[4] {
  ROOT %p.4 = f32[4]{0} parameter(0)
}
%branch.2 (p.5: f32[4]) -> f32[4] {
  %p.5 = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%p.5)
}
%body (p.6: (s32[], f32[100,8], f32[1,8], f32[4])) -> (s32[], f32[100,8], f32[1,8], f32[4]) {
  %p.6 = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}, f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p.6), index=0
  %a = f32[100,8]{1,0} get-tuple-element(%p.6), index=1
  %b = f32[1,8]{1,0} get-tuple-element(%p.6), index=2
  %c = f32[4]{0} get-tuple-element(%p.6), index=3
  %new = f32[100,8]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%fused
  %either = f32[4]{0} conditional(%i, %c, %c), branch_computations={%branch.1, %branch.2}
  ROOT %t = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}, f32[4]{0}) tuple(%i, %new, %b, %either)
}
%test (p.7: (s32[], f32[100,8], f32[1,8], f32[4])) -> pred[] {
  %p.7 = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}, f32[4]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p.7), index=0
  ROOT %less = pred[] compare(%n, %n), direction=LT
}
ENTRY %main (p.8: (s32[], f32[100,8], f32[1,8], f32[4])) -> (s32[], f32[100,8], f32[1,8], f32[4]) {
  %p.8 = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}, f32[4]{0}) parameter(0)
  ROOT %w = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}, f32[4]{0}) while(%p.8), condition=%test, body=%body
}
"""


def test_a_step_costs_its_kernels_the_shortest_branch_and_what_is_updated_in_place():
    updated, index, compared = 2 * 8 * 4, 4, 2 * 4 + 1
    assert Program(HLO).step() == Cost(kernels=2, waits=2, bytes=updated + index + compared)


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
