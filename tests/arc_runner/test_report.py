"""What a run says while it runs and when it ends, and the files it leaves."""

from __future__ import annotations

import io
import json
import sys
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
from arc_puzzles import ArcTask, load_tasks
from arc_runner import report as run_report
from arc_runner.options import RunOptions
from arc_runner.report import Progress, Report, report_path, write_answers

SETTINGS = activation_fakes.settings(hook_names=(), capture_prompt=False, max_output_tokens=64)


# --- Progress -----------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one entry is the time."""
    now = [100.0]
    monkeypatch.setattr(run_report.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_every_half_minute_at_most(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    progress = Progress(total=100)
    for _ in range(13):
        clock[0] += 10
        progress.update(sequences=2, tokens=50)
    progress.close()
    assert capsys.readouterr() == (
        "6 of 100 sequences, 5.0 tokens/s\n"
        "12 of 100 sequences, 5.0 tokens/s\n"
        "18 of 100 sequences, 5.0 tokens/s\n"
        "24 of 100 sequences, 5.0 tokens/s\n",
        "",
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_with_the_speed_and_no_lines(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(total=4)
    for _ in range(2):
        clock[0] += 40
        progress.update(sequences=2, tokens=60)
    progress.close()
    assert "4/4" in terminal.getvalue()
    assert "1.5 tokens/s" in terminal.getvalue()
    assert capsys.readouterr().out == ""


# --- The report ---------------------------------------------------------------------------------------------


def test_the_report_says_what_was_done_and_how_fast():
    report = Report(
        "some/model", "TPU v4", tasks=5, sequences=40, sequences_resumed=8, tokens_generated=6000,
        load_seconds=2.0, compile_seconds=7.5, programs=3, generate_seconds=120.0, bytes_stored=150_500_000,
        peak_memory_bytes=2_000_000_000, peak_memory_of="device", grids_parsed=30, tests_solved=2,
        tests_known=6, tasks_solved=1, tasks_known=5,
        tasks_failed=[{"task_id": "bad", "reason": "it is bad"}],
    )  # fmt: skip
    assert report.text().split("\n") == [
        "done",
        "  model             some/model on TPU v4",
        "  tasks             5 (1 failed)",
        "  sequences         40 (8 were there already, 0 failed)",
        "  tokens generated  6000 in 120.0 s: 50.0 tokens/s",
        "  before that       weights loaded in 2.0 s, 3 shapes compiled in 7.5 s",
        "  stored            150.5 MB",
        "  peak memory       2000 MB (device)",
        "  grids parsed      30 of 40",
        "  solved            1 of 5 tasks, 2 of 6 tests",
        "  failed task       bad: it is bad",
    ]
    assert report.to_json()["tokens_per_second"] == 50.0


def test_a_run_that_made_nothing_reports_no_speed_and_a_data_set_without_answers_no_score():
    text = Report("m", "cpu", sequences=8, sequences_resumed=8).text()
    assert "tokens/s" not in text
    assert "stored" not in text
    assert "solved" not in text


def test_a_run_that_was_stopped_says_how_to_go_on():
    text = Report("m", "cpu", stopped_early=True).text()
    assert text.startswith("stopped early; the same command continues\n")


def test_of_many_failures_the_first_are_shown_and_the_file_has_all():
    failures = [{"task_id": f"task-{i}", "reason": "bad"} for i in range(25)]
    report = Report("m", "cpu", tasks_failed=failures)
    lines = [line for line in report.text().split("\n") if "failed task " in line]
    assert len(lines) == 21
    assert lines[19] == "  failed task       task-19: bad"
    assert lines[20] == "  failed task       and 5 more, listed in the report file"
    assert report.to_json()["tasks_failed"] == failures


def test_memory_is_measured_of_the_process_where_the_device_keeps_no_count():
    report = Report("m", "cpu")
    report.measure_memory()
    assert report.peak_memory_of in ("process", "device")
    assert 10e6 < report.peak_memory_bytes < 1e12


def test_the_report_lies_beside_the_submission():
    assert report_path(RunOptions(output_filepath="out/run.v1.json")) == Path("out/run.v1.report.json")


# --- The answers --------------------------------------------------------------------------------------------


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


def test_an_answer_file_that_cannot_be_written_is_a_sentence(tokenizer: Any, tmp_path: Path):
    (tmp_path / "submission.json").mkdir()
    with pytest.raises(StoreWriteError, match=r"cannot write .*submission\.json: Is a directory"):
        write(tmp_path, tokenizer, [], [])
