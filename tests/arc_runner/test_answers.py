"""The answers of a run: read back from the store, scored, and written."""

from __future__ import annotations

import json
import os
import stat
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
    local_files,
    sequence_key,
)
from arc_puzzles import ArcTask, load_tasks
from arc_runner.answers import write_answers, write_json
from arc_runner.options import RunOptions
from arc_runner.report import Report, report_path

SETTINGS = activation_fakes.settings(hook_names=(), capture_prompt=False, max_output_tokens=64)


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


def write(
    folder: Path, tokenizer: Any, tasks: Sequence[ArcTask], answers: Sequence[FinishedSequence]
) -> tuple[Report, RunOptions]:
    """Commits the answers and lets ``write_answers`` read them back."""
    options = RunOptions(
        grid_encoder="MinimalGridEncoder()",
        activations_dir=str(folder / "activations"),
        output_filepath=str(folder / "submission.json"),
    )
    with ActivationWriter(options.activations_dir, SETTINGS, provenance={}) as writer:
        writer.submit(answers)
    records = [writer.committed[sequence_key(SETTINGS, a.id)] for a in answers]
    report = Report("m", "cpu", tasks=len(tasks), sequences=len(records))
    report.add_failed_sequences(records)
    write_answers(report, options, tasks, records, tokenizer)
    return report, options


def test_answers_are_turned_back_scored_and_written(tokenizer: Any, tmp_path: Path):
    tasks = load_tasks(
        write_tasks(tmp_path / "t.json", right=puzzle(7, 8), wrong=puzzle(1, 2, 3), silent=puzzle(5))
    ).tasks
    answers = [
        answer(tokenizer, "right", "identity", "I do not know."),
        answer(tokenizer, "right", "rot90", "8\n7<|im_end|>"),  # a row, turned: upright it is [[8, 7]]
        answer(tokenizer, "wrong", "identity", "123<|im_end|>"),
    ]
    report, options = write(tmp_path, tokenizer, tasks, answers)
    assert (report.grids_parsed, report.sequences) == (2, 3)
    assert (report.tasks_solved, report.tasks_known, report.tests_solved, report.tests_known) == (1, 3, 1, 3)
    assert json.loads(Path(options.output_filepath).read_text()) == {
        "right": [{"attempt_1": [], "attempt_2": [[8, 7]]}],
        "wrong": [{"attempt_1": [[1, 2, 3]]}],
        "silent": [{}],
    }
    assert json.loads(report_path(options).read_text()) == report.to_json()
    store = ActivationStore(options.activations_dir)
    assert [r.augmentation for r in store.sequences(solved=True)] == ["rot90"]
    assert len(list(store.sequences(solved=False))) == 2


def test_a_sequence_that_failed_is_an_attempt_without_a_grid(tokenizer: Any, tmp_path: Path):
    tasks = load_tasks(write_tasks(tmp_path / "t.json", task=puzzle(7, 8))).tasks
    answers = [
        answer(tokenizer, "task", "identity", "87", float("nan")),
        answer(tokenizer, "task", "flip", "78"),
    ]
    report, options = write(tmp_path, tokenizer, tasks, answers)
    assert report.sequences_failed == [
        {
            "sequence": "task test 0 identity sample 0",
            "reason": "the log-probability is not finite at position 2",
        }
    ]
    assert "failed sequence   task test 0 identity sample 0: the log-prob" in report.text()
    assert json.loads(Path(options.output_filepath).read_text()) == {
        "task": [{"attempt_1": [], "attempt_2": [[8, 7]]}]
    }


def test_an_answer_file_that_cannot_be_written_is_an_error_with_its_reason(tokenizer: Any, tmp_path: Path):
    (tmp_path / "submission.json").mkdir()
    with pytest.raises(StoreWriteError, match=r"cannot write .*submission\.json: Is a directory"):
        write(tmp_path, tokenizer, [], [])


def test_json_is_written_with_the_umasks_mode_and_replaces_what_was_there(tmp_path: Path):
    path = tmp_path / "submission.json"
    write_json(path, {"b": [], "a": [[1, 2]]})
    assert path.read_text() == '{"b": [], "a": [[1, 2]]}\n'
    write_json(str(path), {})
    assert path.read_text() == "{}\n"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert {file.name for file in tmp_path.iterdir()} == {"submission.json", "plain"}


def test_the_umask_is_honoured(tmp_path: Path):
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.json"
    write_json(path, "old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_files.os, "fsync", no_space)
    with pytest.raises(StoreWriteError, match="No space left"):
        write_json(path, "new")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == '"old"\n'
