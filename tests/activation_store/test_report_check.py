"""A report that changed, or files beside it that are not what it says, are findings of `verify`."""

import json
import os
from pathlib import Path
from typing import Any

import activation_fakes
import pytest

from activation_store import ActivationWriter
from activation_store.__main__ import main
from activation_store.report_check import verify_report
from arc_runner.answer_files import AnswerFiles, Earlier, read_earlier, set_aside, source_of, write_all
from arc_runner.options import RunOptions
from arc_runner.predictions import Book, Predicted, TaskPredictions

SETTINGS = activation_fakes.settings()
NONE = Earlier(Book(), {}, None, ())
BOOK = Book({"t": TaskPredictions("p", (None,), ((Predicted("k", "identity", 0, ((1,),), -1.0),),))})


@pytest.fixture
def files(tmp_path: Path) -> AnswerFiles:
    files = AnswerFiles(tmp_path / "submission.json")
    options = RunOptions(activations_dir=str(tmp_path / "acts"), output_filepath=str(files.submission))
    source = source_of(options, SETTINGS)
    write_all(files, source, BOOK, {"tokens_generated": 7}, read_earlier(files, source))
    return files


def findings(files: AnswerFiles, settings: Any = SETTINGS) -> list[str]:
    return list(verify_report(files.report, settings))


def test_a_report_as_it_was_written_has_no_findings(files: AnswerFiles):
    assert findings(files) == []


def test_every_bit_of_the_three_files_counts(files: AnswerFiles):
    for path in files:
        content = path.read_bytes()
        for position in range(0, len(content), 7):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            assert len(findings(files)) == 1, (path.name, position)
        path.write_bytes(content)
        path.write_bytes(content + b"\n")
        assert (findings(files) == []) == (path == files.report)  # after the JSON, nothing is said
        path.write_bytes(content)


def test_what_is_missing_or_something_else_is_a_finding(files: AnswerFiles):
    files.submission.unlink()
    (finding,) = findings(files)
    assert finding.startswith(f"{files.submission} is not what submission.report.json says: run the same")
    for content in ("", "[]", "[" * 100_000, json.dumps({"source": 1, "sha256": 2}), '{"checksum": 1}'):
        files.report.write_text(content)
        assert findings(files) == [f"{files.report} is no report of a run, or is damaged"]
    files.report.unlink()
    os.mkfifo(files.report)
    assert findings(files) == [f"{files.report} cannot be read, or is no regular file"]


def test_a_report_of_another_store_is_a_finding(files: AnswerFiles):
    other = activation_fakes.settings(seed=9)
    assert findings(files, other) == [f"{files.report} is of a store with other settings"]


def test_verify_checks_the_report_it_is_given(
    files: AnswerFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with ActivationWriter(tmp_path / "acts", SETTINGS, provenance={}):
        pass
    words = ["verify", str(tmp_path / "acts"), "--report", str(files.report)]
    assert main(words) == 0
    files.submission.write_text("{}")
    assert main(words) == 1
    assert "submission.json is not what submission.report.json says" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["submission.json", "run.v1.json", "x.predictions.json"])
def test_a_report_that_was_set_aside_is_checked_with_what_was_set_aside_with_it(tmp_path: Path, name: str):
    files = AnswerFiles(tmp_path / name)
    for tokens in (7, 8):  # the second run's files take the names of the first's
        write_all(files, {}, BOOK, {"tokens_generated": tokens}, NONE)
        aside = set_aside(files)
        assert [finding for finding in findings(aside) if "other settings" not in finding] == []
    write_all(files, {}, BOOK, {"tokens_generated": 9}, NONE)
    aside.predictions.write_text("{}")
    (finding,) = (finding for finding in findings(aside) if "other settings" not in finding)
    assert finding.startswith(f"{aside.predictions} is not what {aside.report.name} says")
