"""One set of answers of several processes, with the figures of all of them."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from arc_runner.cluster.claims import Claims
from arc_runner.cluster.merge import answer_once, gather_figures, leave_figures, merge_figures
from arc_runner.cluster.shared_files import SharedFiles
from arc_runner.report import Report


def test_figures_that_appear_while_another_answers_are_answered_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file has the time of its writing, not of the moment at which it is put in its place."""
    first, second = (Claims(SharedFiles(str(tmp_path)), index) for index in range(2))
    answers: list[list[int]] = []

    def answer() -> None:
        answers.append([figures["process"] for figures in gather_figures(first.files)])

    original = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if target.name.endswith("figures-00001.json") and not answers:
            time.sleep(0.02)  # more than the file system's clock has in a tick
            assert answer_once(first, "process 0", written, answer) == "process 0"
        return original(path, target)

    written = leave_figures(first.files, 0, Report("model", "cpu"), 2)
    monkeypatch.setattr(Path, "replace", replace)
    assert answer_once(
        second, "process 1", leave_figures(second.files, 1, Report("model", "cpu"), 6), answer
    ) == ("process 1")
    assert answers == [[0], [0, 1]]


def test_who_ends_with_others_does_not_answer_again(tmp_path: Path):
    first, second = (Claims(SharedFiles(str(tmp_path)), index) for index in range(2))
    times = [leave_figures(one.files, i, Report("model", "cpu"), 1) for i, one in enumerate((first, second))]
    time.sleep(0.02)
    answers: list[str] = []
    assert answer_once(second, "process 1", times[1], lambda: answers.append("1")) == "process 1"
    assert answer_once(first, "process 0", times[0], lambda: answers.append("0")) == "process 1"
    assert answers == ["1"]


DAMAGED = [b"", b"{", b"[1]", b"null", b"[" * 100_000, b"\xff", b'{"process": 1}']


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_figures_are_left_out_with_a_warning(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
):
    files = SharedFiles(str(tmp_path))
    leave_figures(files, 0, Report("model", "cpu", tokens_generated=5), 2)
    files.write("figures-00001.json", data)
    assert [figures["process"] for figures in gather_figures(files)] == [0]
    assert "the figures in figures-00001.json are damaged; the report is without them" in caplog.text


def test_figures_of_an_earlier_version_have_no_time(tmp_path: Path):
    files = SharedFiles(str(tmp_path))
    leave_figures(files, 0, Report("model", "cpu", tokens_generated=5), 2)
    data = files.read("figures-00000.json")
    assert data is not None
    figures = json.loads(data[0])
    del figures["made_at"]
    files.write("figures-00000.json", json.dumps(figures).encode())
    report = Report("model", "cpu")
    merge_figures(report, gather_figures(files))
    assert (report.tokens_generated, report.made_at) == (5, "")


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_note_of_who_has_answered_counts_as_none(tmp_path: Path, data: bytes):
    claims = Claims(SharedFiles(str(tmp_path)), 0)
    claims.files.write("answered", data)
    answers: list[str] = []
    assert answer_once(claims, "process 0", time.time(), lambda: answers.append("0")) == "process 0"
    assert answers == ["0"]


def test_the_merged_figures_have_the_time_of_the_last_process():
    figures = [
        dataclasses.asdict(Report("m", "cpu", tokens_generated=5, made_at=made_at))
        | {"process": i, "sequences_made": 1}
        for i, made_at in enumerate(("2026-01-02 03:04:05", "2026-01-02 03:04:09"))
    ]
    report = Report("m", "cpu")
    merge_figures(report, figures)
    assert (report.made_at, report.tokens_generated) == ("2026-01-02 03:04:09", 10)
