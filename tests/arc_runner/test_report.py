"""The report of a run, for a person and as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from arc_runner.predictions import Book, Predicted, TaskPredictions
from arc_runner.report import FIGURES, Report


def test_the_report_says_what_was_done_and_how_fast():
    report = Report(
        "some/model", "TPU v4", tasks=5, sequences=40, sequences_resumed=8, tokens_generated=6000,
        load_seconds=2.0, compile_seconds=7.5, programs=3, generate_seconds=120.0, bytes_stored=150_500_000,
        peak_memory_bytes=2_000_000_000, peak_memory_of="device", grids_parsed=30, tests_solved=2,
        tests_known=6, tasks_solved=1, tasks_known=5, tasks_solved_by_any=2, tests_solved_by_any=4,
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
        "  by any prediction 2 tasks, 4 tests",
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


@pytest.mark.parametrize("name", ["\ud800", "\x1b[31mred", "a\nb", "\u202egpj", "é", "x" * 10**6])
def test_names_that_are_unsafe_to_print_are_escaped_and_cut(name: str):
    report = Report("m", "cpu", tasks_failed=[{"task_id": name, "reason": f"it is {name}"}])
    (line,) = [line for line in report.text().split("\n") if "failed task" in line]
    assert line.isprintable()
    assert line.isascii()
    assert len(line) < 2500
    assert json.loads(json.dumps(report.to_json()))["tasks_failed"][0]["task_id"] == name


def test_memory_is_measured_of_the_process_where_the_device_keeps_no_count():
    report = Report("m", "cpu")
    report.measure_memory()
    assert report.peak_memory_of in ("process", "device")
    assert 10e6 < report.peak_memory_bytes < 1e12


# --- What the submission has --------------------------------------------------------------------------------


def test_the_counts_are_those_of_the_book():
    right, wrong = ((1,),), ((2,),)

    def predicted(*grids: Any) -> tuple[Predicted, ...]:
        return tuple(Predicted(str(i), "identity", i, grid, -1.0) for i, grid in enumerate(grids))

    failed = Predicted("f", "rot90", 3, failure="it is not finite")
    book = Book(
        {
            "one": TaskPredictions("p", (right, None), (predicted(right, wrong), predicted(None, wrong))),
            "two": TaskPredictions("q", (right,), ((*predicted(wrong, wrong, wrong, right), failed),)),
            "three": TaskPredictions("r", (right,), (predicted(wrong, ((3,),), wrong, ((3,),), right),)),
            "bad": TaskPredictions("", (None, None), ((), ()), "it is malformed"),
        }
    )
    report = Report("m", "cpu")
    report.count(book, new=4)
    assert (report.tasks, report.sequences, report.sequences_resumed) == (4, 14, 10)
    assert report.grids_parsed == 12
    assert (report.tests_solved, report.tests_known) == (2, 3)
    assert (report.tasks_solved, report.tasks_known) == (1, 2)
    assert (report.tests_solved_by_any, report.tasks_solved_by_any) == (3, 2)
    assert report.tasks_failed == [{"task_id": "bad", "reason": "it is malformed"}]
    assert report.sequences_failed == [
        {"sequence": "two test 0 rot90 sample 3", "reason": "it is not finite"}
    ]


# --- Figures of an earlier run ------------------------------------------------------------------------------

WORKED = Report(
    "m", "TPU v4", tokens_generated=600, load_seconds=1.5, compile_seconds=7.5, programs=3,
    generate_seconds=12.0, slots=8, slot_steps=900, live_steps=600, bytes_stored=1000,
    peak_memory_bytes=5, peak_memory_of="device", made_at="2026-01-02 03:04:05", tests_solved=7,
    processes=[{"process": 0, "sequences_made": 8, "tokens_generated": 600, "generate_seconds": 12.0}],
)  # fmt: skip


def test_a_run_that_made_nothing_keeps_the_figures_of_the_run_that_did_with_its_time():
    report = Report("m", "cpu", sequences=8, sequences_resumed=8, peak_memory_bytes=1)
    report.stamp()
    assert report.made_at == ""
    report.keep_figures(json.loads(json.dumps(WORKED.to_json())))
    assert [getattr(report, name) for name in FIGURES] == [getattr(WORKED, name) for name in FIGURES]
    assert report.tests_solved == 0
    assert "600 in 12.0 s: 50.0 tokens/s (run of 2026-01-02 03:04:05 UTC)" in report.text()


def test_a_run_that_made_something_has_its_own_figures():
    report = Report("m", "cpu", sequences=8, tokens_generated=16, generate_seconds=1.0)
    report.stamp()
    own = dataclasses.asdict(report)
    report.keep_figures(WORKED.to_json())
    assert dataclasses.asdict(report) == own
    assert "UTC" not in report.text()


@pytest.mark.parametrize(("tokens", "kept"), [(599, True), (601, False)])
def test_of_two_reports_of_one_time_the_one_that_counts_more_stays(tokens: int, kept: bool):
    """As where a process answers beside the figures that another one left in the run before."""
    report = Report("m", "cpu", tokens_generated=tokens, made_at=WORKED.made_at)
    report.keep_figures(WORKED.to_json())
    assert report.tokens_generated == (WORKED.tokens_generated if kept else tokens)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"made_at": 3},
        {"slots": "8"},
        {"slots": True},
        {"processes": [1]},
        {"processes": [{"process": "\x1b"}]},
    ],
)
def test_figures_of_another_form_are_not_kept(spoilt: dict[str, Any]):
    report = Report("m", "cpu")
    report.keep_figures(WORKED.to_json() | spoilt)
    assert report == Report("m", "cpu")
    report.keep_figures({})
    assert report == Report("m", "cpu")
