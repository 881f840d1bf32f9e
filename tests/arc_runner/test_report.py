"""The report of a run, for a person and as JSON."""

from __future__ import annotations

from pathlib import Path

from arc_runner.options import RunOptions
from arc_runner.report import Report, report_path


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
