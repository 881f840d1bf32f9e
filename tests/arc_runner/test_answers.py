"""The answers of a run: read back from the store, voted on, scored, and written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import activation_fakes
import numpy as np
import pytest
from runner_cases import TINY, puzzle, write_tasks
from transformers import AutoTokenizer

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    SequenceId,
    StoreWriteError,
    sequence_key,
)
from activation_store.checked_json import unseal
from arc_puzzles import load_tasks
from arc_runner import answers
from arc_runner.answers import write_answers
from arc_runner.job import Job
from arc_runner.options import RunOptions
from arc_runner.report import Report
from qwen2_core.requests import SequenceRequest
from qwen2_core.sharding import Layout
from qwen2_jax import QwenConfig

SETTINGS = activation_fakes.settings(hook_names=(), capture_prompt=False, max_output_tokens=64)
NOTHING = [[0, 0], [0, 0]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def answer(
    tokenizer: Any, task: str, augmentation: str, text: str, logprob: float = -1.0
) -> FinishedSequence:
    tokens = np.array(tokenizer.encode(text), np.int32)
    logprobs = np.full(len(tokens), logprob, np.float32)
    sequence_id = SequenceId(task, 0, 0, augmentation, np.array([3, 4]))
    return FinishedSequence(sequence_id, tokens, logprobs, "stop", None)


def job_of(folder: Path, tokenizer: Any, **tasks: Any) -> Job:
    """A job that has these tasks, and of which nothing has to be generated."""
    options = RunOptions(
        grid_encoder="MinimalGridEncoder()",
        activations_dir=str(folder / "activations"),
        output_filepath=str(folder / "submission.json"),
    )
    loaded = load_tasks(write_tasks(folder / "t.json", **tasks))
    parts = (loaded.tasks, loaded.outline, loaded.failures)
    return Job(options, QwenConfig(), Layout(), *parts, tokenizer, (), SETTINGS, ())


def write(job: Job, made: Sequence[FinishedSequence]) -> Report:
    """Commits the answers and lets ``write_answers`` read them back."""
    with ActivationWriter(job.options.activations_dir, SETTINGS, provenance={}) as writer:
        new = [one for one in made if sequence_key(SETTINGS, one.id) not in writer.committed]
        if new:
            writer.submit(new)
    records = [writer.committed[sequence_key(SETTINGS, one.id)] for one in made]
    report = Report("m", "cpu", sequences_resumed=len(made) - len(new))
    report.tokens_generated = sum(len(one.token_ids) for one in new)
    report.stamp()
    write_answers(report, job, records)
    return report


def read(folder: Path, name: str = "submission.json") -> Any:
    return json.loads((folder / name).read_text())


def three(tokenizer: Any) -> list[FinishedSequence]:
    return [
        answer(tokenizer, "right", "identity", "I do not know."),
        answer(tokenizer, "right", "rot90", "8\n7<|im_end|>"),  # a row, turned: upright it is [[8, 7]]
        answer(tokenizer, "wrong", "identity", "123<|im_end|>"),
    ]


TASKS = {
    "right": puzzle(7, 8),
    "wrong": puzzle(1, 2, 3),
    "silent": puzzle(5),
    "bad": {"train": [], "test": [1] * 2},
}


def test_answers_are_turned_back_voted_on_scored_and_written(tokenizer: Any, tmp_path: Path):
    report = write(job_of(tmp_path, tokenizer, **TASKS), three(tokenizer))
    assert (report.grids_parsed, report.sequences, report.tasks) == (2, 3, 4)
    assert (report.tasks_solved, report.tasks_known, report.tests_solved, report.tests_known) == (1, 3, 1, 3)
    assert read(tmp_path) == {
        "right": [{"attempt_1": [[8, 7]], "attempt_2": NOTHING}],
        "wrong": [{"attempt_1": [[1, 2, 3]], "attempt_2": NOTHING}],
        "silent": [{"attempt_1": NOTHING, "attempt_2": NOTHING}],
        "bad": [{"attempt_1": NOTHING, "attempt_2": NOTHING}] * 2,
    }
    store = ActivationStore(tmp_path / "activations")
    assert [r.augmentation for r in store.sequences(solved=True)] == ["rot90"]
    assert len(list(store.sequences(solved=False))) == 2


@pytest.mark.parametrize("opened", [False, True], ids=["the model thinks", "the prompt opens the thinking"])
def test_thinking_is_no_answer_and_what_ends_in_it_is_counted(opened: bool, tokenizer: Any, tmp_path: Path):
    start = "" if opened else "<think>\n"
    made = [
        answer(tokenizer, "right", "identity", f"{start}12? No:\n</think>\n\n87<|im_end|>"),
        answer(tokenizer, "wrong", "identity", f"{start}321"),  # right, but only thought
    ]
    job = job_of(tmp_path, tokenizer, right=puzzle(7, 8), wrong=puzzle(1, 2, 3))
    prompt = tokenizer.encode("<|im_start|>assistant\n" + "<think>\n" * opened)
    request = SequenceRequest(np.array(prompt, np.int32), 64, 0)
    report = write(dataclasses.replace(job, requests=[request]), made)
    assert (report.grids_parsed, report.still_thinking, report.tasks_solved) == (1, 1, 1)
    assert "grids parsed      1 of 2 (1 were still thinking)" in report.text()
    assert read(tmp_path)["wrong"] == [{"attempt_1": NOTHING, "attempt_2": NOTHING}]
    tests = read(tmp_path, "submission.predictions.json")
    assert '"thinking": true' in json.dumps(tests)


def test_every_prediction_is_kept_in_a_file_of_its_own(tokenizer: Any, tmp_path: Path):
    made = three(tokenizer)
    write(job_of(tmp_path, tokenizer, **TASKS), made)
    content, intact = unseal(read(tmp_path, "submission.predictions.json"))
    assert intact
    assert list(content["tasks"]) == list(TASKS)
    (test,) = content["tasks"]["right"]["tests"]
    assert test["output"] == [[8, 7]]
    silent, right = test["predictions"]
    assert (silent["grid"], silent["votes"], right["grid"], right["votes"]) == (None, 0, [[8, 7]], 1)
    assert (right["augmentation"], right["sample"], right["failure"]) == ("rot90", 0, None)
    assert right["key"] == sequence_key(SETTINGS, made[1].id)
    assert right["logprob"] == -len(made[1].token_ids)
    assert content["tasks"]["bad"]["failure"] == 'the task has no list of "train" pairs'


def test_the_grid_of_most_predictions_is_the_first_attempt(tokenizer: Any, tmp_path: Path):
    made = [
        answer(tokenizer, "task", "identity", "12", -0.1),
        answer(tokenizer, "task", "flip", "78", -9.0),
        answer(tokenizer, "task", "rot180", "78", -9.0),
        answer(tokenizer, "task", "flip+rot180", "55", -0.2),
    ]
    write(job_of(tmp_path, tokenizer, task=puzzle(7, 8)), made)
    assert read(tmp_path) == {"task": [{"attempt_1": [[8, 7]], "attempt_2": [[1, 2]]}]}


def test_a_right_prediction_that_is_not_among_the_two_attempts_is_counted_apart(
    tokenizer: Any, tmp_path: Path
):
    texts = {"identity": "11", "flip": "22", "rot180": "33", "flip+rot180": "87"}
    made = [answer(tokenizer, "task", name, text, -1.0 - i) for i, (name, text) in enumerate(texts.items())]
    report = write(job_of(tmp_path, tokenizer, task=puzzle(7, 8)), made)
    assert (report.tests_solved, report.tests_solved_by_any) == (0, 1)
    assert (report.tasks_solved, report.tasks_solved_by_any) == (0, 1)


def test_a_sequence_that_failed_is_a_prediction_without_a_grid(tokenizer: Any, tmp_path: Path):
    made = [
        answer(tokenizer, "task", "identity", "87", float("nan")),
        answer(tokenizer, "task", "flip", "78"),
    ]
    report = write(job_of(tmp_path, tokenizer, task=puzzle(7, 8)), made)
    assert report.sequences_failed == [
        {
            "sequence": "task test 0 identity sample 0",
            "reason": "the log-probability is not finite at position 2",
        }
    ]
    assert "failed sequence   task test 0 identity sample 0: the log-prob" in report.text()
    assert read(tmp_path) == {"task": [{"attempt_1": [[8, 7]], "attempt_2": NOTHING}]}


# --- The same store again -----------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("submission*")}


def test_a_run_of_fewer_tasks_and_predictions_keeps_the_others(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = three(tokenizer)
    first = write(job_of(tmp_path, tokenizer, **TASKS), made)
    before = files(tmp_path)
    capsys.readouterr()
    second = write(job_of(tmp_path, tokenizer, right=TASKS["right"]), made[1:2])
    assert capsys.readouterr().out == "kept from earlier runs of this store: 3 tasks, 2 predictions\n"
    assert read(tmp_path) == json.loads(before["submission.json"])
    assert (second.tasks, second.sequences, second.sequences_resumed) == (4, 3, 3)
    assert (second.tasks_solved, second.tests_known) == (1, 3)
    assert second.made_at == first.made_at
    assert second.tokens_generated == first.tokens_generated
    assert set(files(tmp_path)) == set(before)
    write(job_of(tmp_path, tokenizer, **TASKS), made)
    assert files(tmp_path)["submission.json"] == before["submission.json"]


def test_a_task_that_was_corrected_has_the_predictions_of_its_new_form_alone(tokenizer: Any, tmp_path: Path):
    write(job_of(tmp_path, tokenizer, task=puzzle(7, 8)), [answer(tokenizer, "task", "identity", "87")])
    corrected = [answer(tokenizer, "task", "flip", "99")]
    report = write(job_of(tmp_path, tokenizer, task=puzzle(7, 9)), corrected)
    assert report.sequences == 1
    assert read(tmp_path) == {"task": [{"attempt_1": [[9, 9]], "attempt_2": NOTHING}]}


def test_answers_of_another_store_are_set_aside(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = three(tokenizer)
    write(job_of(tmp_path, tokenizer, **TASKS), made)
    before = files(tmp_path)
    (tmp_path / "activations").rename(tmp_path / "other")
    (tmp_path / "activations").symlink_to("other")  # another store by name
    capsys.readouterr()
    write(job_of(tmp_path, tokenizer, right=TASKS["right"]), made[:2])
    assert "is now in submission.1.json and beside it" in capsys.readouterr().out
    after = files(tmp_path)
    assert {name.replace(".1", ""): after[name] for name in after if ".1" in name} == before
    assert list(read(tmp_path)) == ["right"]


def test_outcomes_that_cannot_be_noted_do_not_keep_the_answers_back(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*_: object) -> None:
        raise StoreWriteError("cannot write outcomes.json: Read-only file system")

    monkeypatch.setattr(answers, "write_outcomes", refuse)
    write(job_of(tmp_path, tokenizer, **TASKS), three(tokenizer))
    assert list(read(tmp_path)) == list(TASKS)
    assert (
        "which sequences solve their puzzle is not noted in the store: cannot write outcomes.json"
        in caplog.text
    )


def test_an_answer_file_that_cannot_be_written_is_an_error_with_its_reason(tokenizer: Any, tmp_path: Path):
    (tmp_path / "submission.json").mkdir()
    with pytest.raises(StoreWriteError, match=r"cannot write .*submission\.json: Is a directory"):
        write(job_of(tmp_path, tokenizer, **TASKS), three(tokenizer))
