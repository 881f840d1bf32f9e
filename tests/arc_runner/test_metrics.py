"""The metrics of a run: whole lines, appended, of one store; what happens to them never ends the run."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from arc_runner import metrics
from arc_runner.answer_files import AnswerFiles
from arc_runner.metrics import Metrics, make_room

SOURCE = {"activations_dir": "activations", "settings_sha256": "0" * 64}
OTHER = SOURCE | {"settings_sha256": "1" * 64}


@pytest.fixture
def files(tmp_path: Path) -> AnswerFiles:
    return AnswerFiles(tmp_path / "submission.json")


def note(path: Path, *phases: str) -> None:
    """A run that goes through these phases."""
    one = Metrics(path, SOURCE, lambda: {"tokens_generated": 7})
    for phase in phases:
        one.begin(phase)
    one.close("done")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_phase_has_a_line_with_the_figures_and_the_first_one_the_store(files: AnswerFiles):
    note(files.metrics(), "loading", "compiling")
    first, *rest = read(files.metrics())
    assert first["source"] == SOURCE
    assert [line["phase"] for line in (first, *rest)] == ["start", "loading", "compiling", "done"]
    assert all(line["tokens_generated"] == 7 and "source" not in line for line in rest)
    assert all(line["time"].endswith("Z") and line["seconds"] >= 0 for line in rest)


def test_while_nothing_changes_there_is_a_line_every_few_seconds(
    files: AnswerFiles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metrics, "EVERY_SECONDS", 0.01)
    one = Metrics(files.metrics(), SOURCE, dict)
    one.begin("compiling")
    while len(read(files.metrics())) < 5:
        time.sleep(0.01)
    one.close("done")
    assert [line["phase"] for line in read(files.metrics())[2:4]] == ["compiling"] * 2


def test_a_run_that_continues_appends_and_ends_a_line_that_was_cut_off(files: AnswerFiles):
    note(files.metrics())
    with files.metrics().open("a") as file:
        file.write('{"time": "20')
    note(files.metrics())
    lines = files.metrics().read_text().splitlines()
    assert lines[2] == '{"time": "20'
    assert [json.loads(line)["phase"] for line in lines[:2] + lines[3:]] == ["start", "done"] * 2


@pytest.mark.parametrize("content", ["", None])
def test_a_file_that_is_empty_or_not_there_is_begun(files: AnswerFiles, content: str | None):
    if content is not None:
        files.metrics().write_text(content)
    make_room(files, 0, SOURCE)
    note(files.metrics())
    assert len(read(files.metrics())) == 2


@pytest.mark.parametrize("content", [json.dumps({"source": OTHER}), "precious", "[1]", "[" * 9000])
def test_what_another_store_or_something_else_left_is_set_aside(
    files: AnswerFiles, content: str, capsys: pytest.CaptureFixture[str]
):
    files.metrics().write_text(content)
    files.numbered(1).report.touch()  # this number is taken
    make_room(files, 0, SOURCE)
    assert not files.metrics().exists()
    assert files.numbered(2).metrics().read_text() == content
    assert "is now in submission.2.metrics.jsonl: another store left it\n" in capsys.readouterr().out


def test_what_the_same_store_left_stays(files: AnswerFiles):
    note(files.metrics())
    make_room(files, 0, SOURCE)
    assert files.metrics().exists()


def test_each_process_has_a_file_of_its_own(files: AnswerFiles):
    assert files.metrics(0).name == "submission.metrics.jsonl"
    assert files.metrics(12).name == "submission.metrics-00012.jsonl"


def test_a_full_disk_is_told_once_leaves_no_half_line_and_ends_nothing(
    files: AnswerFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    note(files.metrics())
    before = files.metrics().read_bytes()
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        if not data.startswith(b'{"time'):
            return write(descriptor, data)
        return write(descriptor, data[:20])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        note(files.metrics(), "compiling", "generating")
    assert files.metrics().read_bytes() == before
    assert caplog.messages == [f"cannot write {files.metrics()}: the disk is full; the run goes on"]
    note(files.metrics())
    assert len(read(files.metrics())) == 4


@pytest.mark.parametrize("place", ["a folder", "a pipe", "no folder"])
def test_where_no_file_can_be_written_the_run_goes_on(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "there" / "metrics.jsonl"
    if place != "no folder":
        path.parent.mkdir()
        (path.mkdir if place == "a folder" else lambda: os.mkfifo(path))()
    note(path, "compiling")
    assert len(caplog.messages) == 1
    reason = {"a folder": os.strerror(errno.EISDIR), "a pipe": "it is not a regular file"}
    assert reason.get(place, os.strerror(errno.ENOENT)) in caplog.text
