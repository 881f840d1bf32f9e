"""Which tasks are solved while a run generates: as its report will say."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import activation_fakes
import numpy as np
import pytest
from runner_cases import TINY, puzzle, write_tasks
from transformers import AutoTokenizer

from activation_store import ActivationWriter, FinishedSequence, SequenceId, sequence_key
from arc_puzzles import load_tasks
from arc_runner.job import Job
from arc_runner.judge import Judge
from arc_runner.options import RunOptions
from qwen2_core.requests import SequenceRequest
from qwen2_core.sharding import Layout
from qwen2_jax import QwenConfig

SETTINGS = activation_fakes.settings(hook_names=(), capture_prompt=False, max_output_tokens=64)
TASKS = {"one": puzzle(7, 8), "two": puzzle(1, 2, 3)}
HIDDEN = puzzle(5, 6) | {"test": [{"input": [[5, 6]]}]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def answer(tokenizer: Any, task: str, augmentation: str, text: str) -> FinishedSequence:
    tokens = np.array(tokenizer.encode(text), np.int32)
    sequence_id = SequenceId(task, 0, 0, augmentation, np.array([3, 4], np.int32))
    key = sequence_key(SETTINGS, sequence_id)
    return FinishedSequence(sequence_id, tokens, np.full(len(tokens), -1.0, np.float32), "stop", None, key)


def job_of(folder: Path, tokenizer: Any, made: list[FinishedSequence], **tasks: Any) -> Job:
    options = RunOptions(grid_encoder="MinimalGridEncoder()", activations_dir=str(folder / "activations"))
    loaded = load_tasks(write_tasks(folder / "t.json", **tasks))
    parts = (loaded.tasks, loaded.outline, loaded.failures)
    requests = [SequenceRequest(one.id.prompt_token_ids, 8, 0, one.id, one.key) for one in made]
    return Job(options, QwenConfig(), Layout(), *parts, tokenizer, (), SETTINGS, requests)


def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


def test_a_task_counts_once_one_of_its_two_attempts_is_right_and_no_more_when_it_is_outvoted(
    tokenizer: Any, tmp_path: Path
):
    right = answer(tokenizer, "one", "rot90", "8\n7<|im_end|>")  # turned; upright it is [[8, 7]]
    wrong = [answer(tokenizer, "one", "identity", "12")]
    others = [answer(tokenizer, "one", name, "55") for name in ("flip", "flip+rot180")]
    made = [right, *wrong, *others]
    judge = Judge(job_of(tmp_path, tokenizer, made, **TASKS), {})
    assert judge.solved() == (0, 2)
    for one in (*wrong, right):
        judge.add(one)
    until(lambda: judge.solved() == (1, 2))
    for one in others:
        judge.add(one)
    until(lambda: judge.solved() == (0, 2))
    judge.close()


def test_what_earlier_runs_have_solved_counts(tokenizer: Any, tmp_path: Path):
    made = [answer(tokenizer, "one", "identity", "87"), answer(tokenizer, "two", "identity", "99")]
    job = job_of(tmp_path, tokenizer, made, **TASKS)
    with ActivationWriter(job.options.activations_dir, SETTINGS, provenance={}) as writer:
        writer.submit(made)
    judge = Judge(job, writer.committed)
    until(lambda: judge.solved() == (1, 2))
    judge.close()


def test_a_store_that_cannot_be_read_is_left_to_the_report(tokenizer: Any, tmp_path: Path):
    made = [answer(tokenizer, "one", "identity", "87"), answer(tokenizer, "two", "identity", "321")]
    job = job_of(tmp_path, tokenizer, made, **TASKS)
    with ActivationWriter(job.options.activations_dir, SETTINGS, provenance={}) as writer:
        writer.submit(made[:1])
    for shard in (tmp_path / "activations").rglob("*.safetensors"):
        shard.write_bytes(b"spoiled")
    judge = Judge(job, writer.committed)
    judge.add(made[1])
    until(lambda: judge.solved() == (1, 2))
    judge.close()


def test_without_a_known_answer_nothing_is_counted(tokenizer: Any, tmp_path: Path):
    made = [answer(tokenizer, "hidden", "identity", "65")]
    judge = Judge(job_of(tmp_path, tokenizer, made, hidden=HIDDEN), {})
    judge.add(dataclasses.replace(made[0]))
    assert judge.solved() is None
    judge.close()
