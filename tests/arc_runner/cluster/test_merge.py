"""One set of answers of several processes, with the figures of all of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from arc_runner.cluster.claims import Claims
from arc_runner.cluster.merge import answer_once, gather_figures, leave_figures
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
