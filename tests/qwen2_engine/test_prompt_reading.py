"""Requests of no tokens: their prompts' rows, from prefills alone, beside others or by themselves."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from lively import Lively

from activation_store import FinishedSequence
from qwen2_core.interventions import Add
from qwen2_engine import ContinuousEngine, Occupancy, PromptReader, SequenceRequest, programs
from qwen2_jax import QwenModel

TINY = Lively(layers=2, extract=(0, 1), seed=5)
PROMPTS = TINY.prompts((3, 90, 20, 64))


@functools.cache
def built() -> tuple[Any, Any]:
    return TINY.build(scan_layers=True)


def engine(**settings: Any) -> ContinuousEngine:
    return ContinuousEngine(*built(), **({"slots": 2, "capture_prompt": True} | settings))


def requests(max_tokens: list[int]) -> list[SequenceRequest]:
    """One of each prompt in turn."""
    return [
        SequenceRequest(PROMPTS[number % 4], most, sampling_id=number, id=number, capture_prompt=True)
        for number, most in enumerate(max_tokens)
    ]


def by_id(finished: Any) -> dict[int, FinishedSequence]:
    found = list(finished)
    assert len({one.id for one in found}) == len(found)
    return {one.id: one for one in found}


@functools.cache
def generated() -> dict[int, FinishedSequence]:
    return by_id(engine(max_tokens=3).run(requests([3] * 4)))


def assert_rows_of_prompt(one: FinishedSequence) -> None:
    assert (one.token_ids.shape, one.logprobs.shape, one.finish_reason) == ((0,), (0,), "length")
    prompt = PROMPTS[one.id % 4]  # pyright: ignore[reportOperatorIssue]
    expected = generated()[one.id % 4].rows  # pyright: ignore[reportOperatorIssue]
    assert one.rows is not None
    assert expected is not None
    assert one.rows.shape == (2, len(prompt), TINY.hidden)
    np.testing.assert_array_equal(one.rows, expected[:, : len(prompt)])


def test_the_rows_are_those_of_the_prompt_of_a_sequence_that_goes_on():
    rounds: list[Occupancy] = []
    found = by_id(engine().run(requests([0] * 8), on_window=rounds.append))
    assert sorted(found) == list(range(8))
    for one in found.values():
        assert_rows_of_prompt(one)
    assert sum(one.prompts for one in rounds) == 4  # each is read once for both requests
    assert {(one.steps, one.live_steps) for one in rounds} == {(0, 0)}


def test_requests_of_some_tokens_and_of_none_may_be_mixed():
    found = by_id(engine(max_tokens=3).run(requests([3, 0, 3, 0, 0, 3, 0, 3])))
    assert sorted(found) == list(range(8))
    for number, one in found.items():
        if number in (0, 2, 5, 7):
            np.testing.assert_array_equal(one.token_ids, generated()[number % 4].token_ids)
            np.testing.assert_array_equal(one.rows, generated()[number % 4].rows)
        else:
            assert_rows_of_prompt(one)


def test_nothing_but_prefills_is_compiled(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled")

    for name in ("compile_create", "compile_insert", "compile_window"):
        monkeypatch.setattr(programs, name, refuse)
    reading = engine(max_tokens=0)
    stages = reading.plan(reading.order(requests([0] * 4)))
    assert [stage.widths for stage in stages] == [(64, 96)]
    reader = reading.start(stages[0])
    assert isinstance(reader, PromptReader)
    assert reader.memory.kv_cache == 0
    assert reader.memory.on_device == pytest.approx(reading.estimate(stages[0]), rel=0.2)


def test_a_prompt_is_steered_by_its_own_strength():
    add = Add("hook_resid_post", 0, np.ones(TINY.hidden))
    items = [
        SequenceRequest(PROMPTS[0], 0, sampling_id=0, id=number, capture_prompt=True, strengths=strength)
        for number, strength in enumerate((0.0, 2.0))
    ]
    plain, steered = (one.rows for _, one in sorted(by_id(engine(interventions=[add]).run(items)).items()))
    assert plain is not None
    assert steered is not None
    np.testing.assert_allclose(steered[0] - plain[0], 2.0, atol=1e-4)
    assert np.abs(steered[1] - plain[1]).max() > 0.1


def test_a_run_that_is_asked_to_stop_hands_over_what_it_has_read():
    read: list[Occupancy] = []
    reading = engine()
    found = list(reading.run(requests([0] * 4), should_stop=lambda: len(read) == 2, on_window=read.append))
    assert len(found) == 2


def test_a_model_without_hooks_has_no_rows_of_prompts():
    model, params = built()
    plain = ContinuousEngine(QwenModel(model.config), params, capture_prompt=True)
    with pytest.raises(ValueError, match="max_tokens 0 generates nothing"):
        plain.order(requests([0]))
