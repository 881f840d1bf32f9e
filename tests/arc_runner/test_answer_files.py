"""The three files of answers: whose they are, how they are replaced, and what a crash between them leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import activation_fakes
import pytest

from activation_store import StoreWriteError, local_files
from activation_store.checked_json import seal, unseal
from arc_runner import answer_files
from arc_runner.answer_files import AnswerFiles, Earlier, read_earlier, set_aside, source_of, write_all
from arc_runner.options import RunOptions
from arc_runner.predictions import Book, Predicted, TaskPredictions

SOURCE = {"activations_dir": "activations", "settings_sha256": "0" * 64}
NAMES = ["submission.json", "submission.predictions.json", "submission.report.json"]
NONE = Earlier(Book(), {}, None, ())


def book(*grids: Any) -> Book:
    predictions = tuple(Predicted(str(i), "identity", i, grid, -1.0) for i, grid in enumerate(grids))
    return Book({"t": TaskPredictions("p", (None,), (predictions,))})


ONE, TWO = book(((1,),)), book(((2,),), ((3,),))


@pytest.fixture
def files(tmp_path: Path) -> AnswerFiles:
    return AnswerFiles(tmp_path / "submission.json")


def written(files: AnswerFiles, content: Book = ONE, tokens: int = 7) -> dict[str, bytes]:
    """Writes the files as a run does, and returns them."""
    write_all(files, SOURCE, content, {"tokens_generated": tokens}, read_earlier(files, SOURCE))
    return {path.name: path.read_bytes() for path in files}


def test_the_files_lie_beside_each_other(tmp_path: Path):
    names = [path.name for path in AnswerFiles(tmp_path / "run.v1.json")]
    assert names == ["run.v1.json", "run.v1.predictions.json", "run.v1.report.json"]
    names = [path.name for path in AnswerFiles(tmp_path / "run.v1.json").numbered(3)]
    assert names == ["run.v1.3.json", "run.v1.3.predictions.json", "run.v1.3.report.json"]
    names = [path.name for path in AnswerFiles(tmp_path / "x").numbered(1)]
    assert names == ["x.1.json", "x.1.predictions.json", "x.1.report.json"]


def test_what_a_run_wrote_is_known_again(files: AnswerFiles):
    assert read_earlier(files, SOURCE) == NONE
    content = written(files)
    earlier = read_earlier(files, SOURCE)
    assert (earlier.book, earlier.strangers) == (ONE, ())
    assert earlier.figures["tokens_generated"] == 7
    assert earlier.submission_sha256 == hashlib.sha256(content["submission.json"]).hexdigest()


def test_the_report_has_its_own_checksum_and_those_of_the_other_files(files: AnswerFiles):
    content = written(files)
    report, intact = unseal(json.loads(content["submission.report.json"]))
    assert intact
    assert report["sha256"] == {name: hashlib.sha256(content[name]).hexdigest() for name in NAMES[:2]}
    assert unseal(json.loads(content["submission.predictions.json"]))[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_bit_that_changed_in_any_of_the_files_is_noticed(files: AnswerFiles, name: str):
    content = written(files)[name]
    path = files.submission.with_name(name)
    for position in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        earlier = read_earlier(files, SOURCE)
        assert path in earlier.strangers, position
    path.write_bytes(content)
    assert read_earlier(files, SOURCE).strangers == ()


GARBAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "unsealed": lambda path: path.write_text(json.dumps({"source": SOURCE, "tasks": {}})),
    "sealed garbage": lambda path: path.write_text(json.dumps(seal({"source": SOURCE, "tasks": [1]}))),
    "huge": lambda path: os.truncate(path, 2**40),
    "other source": lambda path: path.write_text(json.dumps(seal({"source": {}, "tasks": {}}))),
    "odd checksum": lambda path: path.write_text(json.dumps({"source": SOURCE, "checksum": [1]})),
    "link to it": lambda path: path.rename(path.with_name("x")) and path.symlink_to("/etc/hostname"),
}


@pytest.mark.parametrize("garbage", list(GARBAGE))
def test_predictions_that_are_something_else_are_strangers_and_set_aside(files: AnswerFiles, garbage: str):
    written(files)
    GARBAGE[garbage](files.predictions)
    earlier = read_earlier(files, SOURCE)
    assert files.predictions in earlier.strangers
    assert earlier.book == Book()
    aside = set_aside(files)
    assert all(path.is_file() for path in aside)
    assert not any(path.exists() for path in files)
    written(files)
    assert read_earlier(files, SOURCE).strangers == ()


def test_another_store_or_other_settings_make_strangers(files: AnswerFiles):
    written(files)
    for other in (SOURCE | {"activations_dir": "others"}, SOURCE | {"settings_sha256": "1" * 64}):
        assert read_earlier(files, other) == Earlier(Book(), {}, None, tuple(files))


def test_a_submission_that_was_edited_is_a_stranger_beside_predictions_that_count(files: AnswerFiles):
    written(files)
    files.submission.write_text("{}")
    earlier = read_earlier(files, SOURCE)
    assert (earlier.book, earlier.strangers) == (ONE, (files.submission,))


def test_files_are_set_aside_together_under_the_next_free_number(files: AnswerFiles):
    first = written(files)
    assert set_aside(files) == files.numbered(1)
    files.submission.write_text("mine")
    assert set_aside(files) == files.numbered(2)
    files.numbered(3).report.write_text("in the way")
    files.report.write_text("mine too")
    assert set_aside(files) == files.numbered(4)
    assert {path.name.replace(".1", ""): path.read_bytes() for path in files.numbered(1)} == first
    assert files.numbered(2).submission.read_text() == "mine"
    assert files.numbered(4).report.read_text() == "mine too"


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("survive", [0, 1, 2])
@pytest.mark.parametrize("before", [None, ONE])
def test_a_crash_between_the_files_is_mended_by_the_next_run(
    files: AnswerFiles, before: Book | None, survive: int, monkeypatch: pytest.MonkeyPatch
):
    if before is not None:
        written(files, before)
    left = [survive]

    def write(path: Path, data: bytes) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(answer_files, "write_bytes", write)
        with pytest.raises(Killed):
            written(files, TWO, tokens=9)
    earlier = read_earlier(files, SOURCE)
    assert earlier.strangers == ()
    assert earlier.book == (TWO if survive == 2 else before or Book())
    if survive:
        assert earlier.figures["tokens_generated"] == 9  # of the run that made them
    mended = written(files, TWO, tokens=9)
    fresh = AnswerFiles(files.submission.parent / "fresh" / "submission.json")
    fresh.submission.parent.mkdir()
    assert mended["submission.json"] == written(fresh, TWO, tokens=9)["submission.json"]
    assert read_earlier(files, SOURCE).strangers == ()


def test_store_and_answers_that_are_moved_together_still_belong_together(tmp_path: Path):
    def source(folder: Path) -> dict[str, str]:
        options = RunOptions(
            activations_dir=str(folder / "acts"), output_filepath=str(folder / "out" / "s.json")
        )
        return source_of(options, activation_fakes.settings())

    assert source(tmp_path / "a") == source(tmp_path / "b")
    assert source(tmp_path / "a")["activations_dir"] == "../acts"
    url = RunOptions(activations_dir="gs://bucket/run")
    assert source_of(url, activation_fakes.settings())["activations_dir"] == "gs://bucket/run"
    other = source_of(url, activation_fakes.settings(seed=9))
    assert other["settings_sha256"] != source_of(url, activation_fakes.settings())["settings_sha256"]


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_a_store_is_one_store_by_path_and_by_file_url(tmp_path: Path, scheme: str):
    paths = [str(tmp_path / "acts"), f"{scheme}{tmp_path}/acts", f"{scheme}{tmp_path}/out/../acts/"]
    sources = [
        source_of(
            RunOptions(activations_dir=path, output_filepath=str(tmp_path / "out" / "s.json")),
            activation_fakes.settings(),
        )
        for path in paths
    ]
    assert [source["activations_dir"] for source in sources] == ["../acts"] * 3


# --- Writing ------------------------------------------------------------------------------------------------


def test_files_are_written_with_the_umasks_mode_and_replace_what_was_there(files: AnswerFiles):
    old = os.umask(0o027)
    try:
        written(files)
        written(files, TWO)
    finally:
        os.umask(old)
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o640] * 3
    assert json.loads(files.submission.read_text())["t"][0] == {"attempt_1": [[2]], "attempt_2": [[3]]}
    assert sorted(path.name for path in files.submission.parent.iterdir()) == NAMES


def test_a_failed_write_leaves_the_old_files_and_nothing_else(
    files: AnswerFiles, monkeypatch: pytest.MonkeyPatch
):
    before = written(files)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_files.os, "fsync", no_space)
    with pytest.raises(StoreWriteError, match="No space left"):
        written(files, TWO)
    assert {path.name: path.read_bytes() for path in files.submission.parent.iterdir()} == before


def test_files_that_cannot_be_renamed_are_an_error_with_its_reason(
    files: AnswerFiles, monkeypatch: pytest.MonkeyPatch
):
    written(files)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(
        StoreWriteError, match=r"cannot rename .*submission\.json to .*1\.json: Permission denied"
    ):
        set_aside(files)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(files: AnswerFiles):
    written(files)
    shutil.rmtree(files.submission.parent, ignore_errors=True)
    files.submission.parent.mkdir()
    for path in files:
        os.mkfifo(path)
    assert read_earlier(files, SOURCE) == NONE


def test_answers_that_are_links_stay_links_to_the_files_that_are_written(files: AnswerFiles, tmp_path: Path):
    (tmp_path / "results").mkdir()
    targets = [tmp_path / "results" / f"{number}.json" for number in range(3)]
    for path, target in zip(files, targets, strict=True):
        path.symlink_to(target)
    for content in (ONE, TWO):
        made = written(files, content)
        assert [path.readlink() for path in files] == targets
        assert [target.read_bytes() for target in targets] == list(made.values())
        assert read_earlier(files, SOURCE).strangers == ()
    assert json.loads(targets[0].read_text())["t"][0] == {"attempt_1": [[2]], "attempt_2": [[3]]}
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["0.json", "1.json", "2.json"]
