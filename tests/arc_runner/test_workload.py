"""From tasks to prompts to calls: everything that was asked for, once, in few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import activation_fakes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runner_cases import TINY, puzzle, write_tasks
from transformers import AutoTokenizer

from activation_store import SequenceId
from arc_puzzles import ArcTask, LoadedTasks, TaskFailure, choose_augmentations, load_tasks
from arc_runner.options import RunOptions
from arc_runner.workload import Call, build_requests, plan_calls, sampling_id
from qwen2_core.requests import SequenceRequest, bucket_length

OPTIONS = RunOptions(grid_encoder="MinimalGridEncoder()", augmentations=3, predictions_per_task=3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def load(folder: Path, **tasks: Any) -> tuple[ArcTask, ...]:
    return load_tasks(write_tasks(folder / "tasks.json", **tasks)).tasks


def build(
    tasks: Sequence[ArcTask], tokenizer: Any, options: RunOptions = OPTIONS, context: int = 32768
) -> tuple[list[SequenceRequest], list[TaskFailure]]:
    return build_requests(
        LoadedTasks(tuple(tasks), ()), tokenizer, options, activation_fakes.settings(), context
    )


# --- Requests -----------------------------------------------------------------------------------------------


def test_every_test_input_is_asked_in_every_augmentation(tokenizer: Any, tmp_path: Path):
    two = puzzle(1, 2, 3)
    two["test"] = two["test"] * 2
    requests, failures = build(load(tmp_path, one=puzzle(4, 5), two=two), tokenizer)
    assert failures == []
    assert [(r.id.task_id, r.id.test_index, r.id.augmentation) for r in requests] == [
        (task_id, test_index, augmentation)
        for task_id, tests in (("one", 1), ("two", 2))
        for augmentation in ("identity", "rot90", "rot180")
        for test_index in range(tests)
    ]


def test_a_prompt_holds_the_whole_puzzle_as_the_augmentation_shows_it(tokenizer: Any, tmp_path: Path):
    tasks = load(tmp_path, one=puzzle(4, 5, 6))
    requests, _ = build(tasks, tokenizer)
    texts = [tokenizer.decode(request.prompt_token_ids.tolist()) for request in requests]
    for text, example, test in zip(
        texts, ("12\n\nOutput:\n21", "1\n2\n\nOutput:\n2\n1", "21\n\nOutput:\n12"), ("456", "4\n5\n6", "654"),
        strict=True,
    ):  # fmt: skip
        assert f"Input:\n{example}" in text
        assert f"### Test\n\nInput:\n{test}<|im_end|>" in text
        assert text.endswith("<|im_start|>assistant\n")


def test_a_task_with_a_prompt_beyond_the_context_fails_alone(tokenizer: Any, tmp_path: Path):
    tasks = load(tmp_path, short=puzzle(1), long=puzzle(*range(10)), short_too=puzzle(2))
    requests, _ = build(tasks, tokenizer)
    options = dataclasses.replace(OPTIONS, max_output_tokens=100)
    room = 100 + max(len(one.prompt_token_ids) for one in requests if one.id.task_id == "long")
    assert build(tasks, tokenizer, options, room)[1] == []
    requests, failures = build(tasks, tokenizer, options, room - 1)
    assert {one.id.task_id for one in requests} == {"short", "short_too"}
    assert [failure.task_id for failure in failures] == ["long"]
    assert "tokens; with --max_output_tokens 100 that exceeds the model's context of" in failures[0].reason


# --- Calls --------------------------------------------------------------------------------------------------


def made_up_requests(lengths: dict[str, list[int]], samples: int = 1) -> list[SequenceRequest]:
    """``samples`` requests for each prompt; the prompts of a task are told apart by their augmentation."""
    ids = [
        SequenceId(task_id, 0, sample, str(variant), np.arange(length))
        for task_id, of_task in lengths.items()
        for variant, length in zip(choose_augmentations(len(of_task), 0), of_task, strict=True)
        for sample in range(samples)
    ]
    return [
        SequenceRequest(one.prompt_token_ids, 9, sampling_id=i, id=one, key=str(i))
        for i, one in enumerate(ids)
    ]


def names(calls: list[Call]) -> list[tuple[str, str, int]]:
    ids = [request.id for call in calls for request in call.requests]
    return [(one.task_id, one.augmentation, one.sample_index) for one in ids]


@given(
    lengths=st.dictionaries(
        st.sampled_from("abc"), st.lists(st.integers(1, 300), min_size=1, max_size=9), min_size=1
    ),
    samples=st.integers(1, 9),
    batch_size=st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_every_sequence_is_in_one_call_that_fits_the_batch(
    lengths: dict[str, list[int]], samples: int, batch_size: int
):
    requests = made_up_requests(lengths, samples)
    options = RunOptions(augmentations=1, predictions_per_task=samples, batch_size=batch_size, temperature=1)
    calls = plan_calls(requests, options, ())
    assert sorted(names(calls)) == sorted(names([Call(tuple(requests), samples, 0)]))
    for call in calls:
        assert 1 <= len(call.requests) <= batch_size
        assert len(call.prompts) & (len(call.prompts) - 1) == 0
        (task_id,) = {request.id.task_id for request in call.requests}
        assert call.width == bucket_length(max(lengths[task_id]))
    assert [call.width for call in calls] == sorted(call.width for call in calls)


def test_samples_of_one_prompt_are_adjacent():
    options = RunOptions(augmentations=1, predictions_per_task=2, temperature=1)
    (call,) = plan_calls(made_up_requests({"a": [5, 6]}, samples=2), options, ())
    assert [one.id.sample_index for one in call.requests] == [0, 1, 0, 1]
    assert [len(one.prompt_token_ids) for one in call.requests] == [5, 5, 6, 6]
    assert [len(prompt) for prompt in call.prompts] == [5, 6]


def test_a_call_of_which_one_sequence_is_missing_is_run_whole_and_a_done_one_not_at_all():
    requests = made_up_requests({"a": [5] * 4, "b": [70] * 4})
    options = RunOptions(augmentations=4, predictions_per_task=4)
    everything = plan_calls(requests, options, ())
    assert [len(call.prompts) for call in everything] == [4, 4]
    all_keys = {request.key for request in requests}
    last_of_b = everything[-1].requests[-1].key
    assert names(plan_calls(requests, options, all_keys - {last_of_b})) == names(everything[1:])
    assert plan_calls(requests, options, all_keys) == []


def test_the_shapes_stay_few_whatever_the_number_of_prompts():
    requests = made_up_requests({f"task-{n}": [5] * n for n in range(1, 40)})
    calls = plan_calls(requests, RunOptions(batch_size=32), ())
    assert {len(call.prompts) for call in calls} == {1, 2, 4, 8, 16, 32}


# --- Random keys --------------------------------------------------------------------------------------------


def test_the_id_for_random_keys_depends_on_each_part_of_a_sequences_name_and_on_nothing_else():
    sequence = SequenceId("task", 0, 0, "identity", np.arange(3))
    variants = [
        sequence,
        dataclasses.replace(sequence, task_id="other"),
        dataclasses.replace(sequence, test_index=1),
        dataclasses.replace(sequence, sample_index=1),
        dataclasses.replace(sequence, augmentation="rot90"),
    ]
    assert len({sampling_id(variant) for variant in variants}) == len(variants)
    assert sampling_id(dataclasses.replace(sequence, prompt_token_ids=np.arange(9))) == sampling_id(sequence)
    # The same on every machine and in every version, or a resumed run would not give the same tokens.
    assert sampling_id(sequence) == 628420384
