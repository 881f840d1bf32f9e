"""How many slots fit, what they will take, and what happens when that is not there."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import pytest
from lively import Lively

from qwen2_core.config import QwenConfig
from qwen2_core.sharding import Layout
from qwen2_engine import ContinuousEngine, continuous_batching
from qwen2_engine.decode_window import SlotShape
from qwen2_engine.memory_plan import MemoryPlanner, Stage
from qwen2_engine.programs import compile_slots
from qwen2_jax_with_hooks import create_model_with_hooks

pytestmark = pytest.mark.slow

TINY = Lively(layers=2, extract=(0, 1))
WIDTHS = (64, 256, 1024, 4096)
STAGE = Stage(SlotShape(64, 512, 500), (64,))
REAL_WEIGHTS = {"embedding": jax.ShapeDtypeStruct((494_032_768,), "bfloat16")}


@functools.cache
def built() -> tuple[Any, Any]:
    return TINY.build(scan_layers=True)


def real_plan(gigabytes: float, slots: int = 32) -> list[tuple[int, tuple[int, ...]]]:
    """(slots, widths) of each stage for Qwen2.5-0.5B in bfloat16."""
    model = create_model_with_hooks(QwenConfig(dtype="bfloat16"))
    shape = SlotShape(slots, 1, 1100)
    stages = MemoryPlanner(model, REAL_WEIGHTS, Layout()).stages(WIDTHS, shape, int(gigabytes * 1e9))
    assert all(stage.shape.prompt_width == max(stage.widths) for stage in stages)
    assert all(stage.shape.max_tokens == 1100 for stage in stages)
    return [(stage.shape.slots, stage.widths) for stage in stages]


def test_where_all_slots_fit_at_the_longest_prompts_there_is_one_stage():
    assert real_plan(80) == [(32, WIDTHS)]


def test_where_they_do_not_long_prompts_get_half_as_many_slots_or_fewer():
    plan = real_plan(3.5)
    assert [width for _, widths in plan for width in widths] == list(WIDTHS)
    slots = [of_stage for of_stage, _ in plan]
    assert slots == sorted(set(slots), reverse=True)
    assert len(slots) > 1
    assert set(slots) <= {32, 16, 8, 4, 2, 1}


def test_never_more_slots_than_asked_for_and_one_where_nothing_fits():
    assert real_plan(80, slots=3) == [(3, WIDTHS)]
    assert real_plan(0.001) == [(1, WIDTHS)]


def test_what_is_left_to_do_changes_nobodys_number_of_slots(monkeypatch: pytest.MonkeyPatch):
    slots_of = {width: slots for slots, widths in real_plan(3.5) for width in widths}
    for left in (WIDTHS[1:], WIDTHS[:2], WIDTHS[::2]):
        monkeypatch.setitem(globals(), "WIDTHS", left)
        assert {width: slots for slots, widths in real_plan(3.5) for width in widths} == {
            width: slots_of[width] for width in left
        }


def test_the_estimate_is_that_of_the_compiled_programs():
    """Within a tenth, for a model large enough that its buffers and not a few constants count."""
    lively = Lively(layers=4, extract=(0, 1, 2, 3), hidden=256, inner=1024, heads=4, vocab=2048)
    config = lively.config(scan_layers=True)
    model = create_model_with_hooks(config, lively.extract)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jax.numpy.zeros((1, 1), int)))["params"]
    shape, planner = SlotShape(16, 1024, 256), MemoryPlanner(model, params, Layout())
    exact = planner.memory(compile_slots(model, params, Layout(), shape, (1024,)))
    estimate = planner.estimate(shape) - exact.host_rows  # on CPU it counts the host's rows too
    assert abs(estimate / exact.on_device - 1) < 0.1


def test_the_expected_bytes_are_those_that_live_arrays_take():
    """All that lasts; temporaries come and go inside the programs."""
    model, params = built()
    before = sum(array.nbytes for array in jax.live_arrays())
    slots = ContinuousEngine(model, params).start(STAGE)
    taken = sum(array.nbytes for array in jax.live_arrays()) - before
    assert abs(taken / slots.memory.kv_cache - 1) < 0.01
    assert slots.memory.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


class Failing:
    """An executable that cannot be run."""

    def __init__(self, program: Any, error: Exception) -> None:
        self.memory_analysis = program.memory_analysis
        self._error = error

    def __call__(self, *_: object) -> None:
        raise self._error


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), MemoryError()]
)
def test_when_memory_runs_out_half_the_slots_are_tried_and_that_is_said(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def limited(model: Any, params: Any, layout: Layout, shape: SlotShape, *args: Any) -> Any:
        programs = compile_slots(model, params, layout, shape, *args)
        if shape.slots <= 32:
            return programs
        return dataclasses.replace(programs, window=Failing(programs.window, error))

    monkeypatch.setattr(continuous_batching, "compile_slots", limited)
    slots = ContinuousEngine(*built()).start(STAGE)
    assert slots.programs.shape.slots == 32
    assert caplog.messages == ["memory ran out with 64 slots: trying 32"]


def test_an_error_that_fewer_slots_would_not_mend_is_raised(monkeypatch: pytest.MonkeyPatch):
    error = jax.errors.JaxRuntimeError("INTERNAL: the device fell off")

    def broken(*args: Any, **kwargs: Any) -> Any:
        programs = compile_slots(*args, **kwargs)
        return dataclasses.replace(programs, window=Failing(programs.window, error))

    monkeypatch.setattr(continuous_batching, "compile_slots", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="fell off"):
        ContinuousEngine(*built()).start(STAGE)
