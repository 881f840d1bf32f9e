"""What a person sees: errors under the command's name, warnings as plain lines, nothing a terminal obeys."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runner_cases import COMMAND, PYTHON, arguments, copy_small, environment, four, run_main

import distributed_kv_cached_inference
from arc_runner import job
from arc_runner.console import say, say_error
from arc_runner.errors import UsageError
from arc_runner.options import RunOptions

LOGGER = logging.getLogger("qwen2_engine.some_module")


@pytest.fixture
def warning_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that logs as the job is prepared, which then ends."""

    def load_tasks(*_: object) -> None:
        LOGGER.info("not for people")
        LOGGER.warning("%s slots are left,\n   memory ran out", 4)
        raise UsageError("it ends here")

    monkeypatch.setattr(job, "load_tasks", load_tasks)


@pytest.mark.usefixtures("warning_library")
def test_a_warning_that_a_library_logs_is_one_plain_line_on_stderr(tmp_path: Path):
    outcome = run_main(four(tmp_path))
    assert outcome.err == (
        "4 slots are left, memory ran out\ndistributed_kv_cached_inference.py: error: it ends here\n"
    )


@pytest.mark.usefixtures("warning_library")
def test_run_as_a_library_leaves_logging_to_its_caller(capsys: pytest.CaptureFixture[str]):
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(UsageError):
        distributed_kv_cached_inference.run(RunOptions())
    assert logging.getLogger().handlers == handlers
    assert capsys.readouterr().err == ""


def test_after_the_command_the_root_logger_is_as_before(tmp_path: Path):
    handlers = list(logging.getLogger().handlers)
    assert run_main(tmp_path, batch_size=0).code == 2
    assert logging.getLogger().handlers == handlers


def test_an_error_begins_with_the_name_that_the_command_was_called_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qwen2-arc-run"])
    outcome = run_main(tmp_path, batch_size=0)
    assert outcome.err == "qwen2-arc-run: error: --batch_size must be at least 1, not 0\n"


# --- What cannot be printed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_the_stream_does_not_have_are_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    say("modèle \u202e \udcc3 👩 \x1b[31m\n  next")
    escaped = "modèle \\u202e \\udcc3 👩 \\x1b[31m\n  next\n"
    assert raw.getvalue() == escaped.encode(encoding, "backslashreplace")


def test_an_error_stays_in_one_line_and_shows_no_password(capsys: pytest.CaptureFixture[str]):
    say_error("cannot open s3://key:secret@bucket/a\nb\x9b")
    assert capsys.readouterr().err == "cannot open s3://***@bucket/a\\nb\\x9b\n"


@pytest.mark.usefixtures("warning_library")
def test_a_warning_is_shown_like_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LOGGER, "warning", lambda *_: logging.Logger.warning(LOGGER, "gs://u:p@b \x1b[2J é"))
    assert "gs://***@b \\x1b[2J é\n" in run_main(four(tmp_path)).err


SAYS = """
import sys
from arc_runner.console import open_closed_streams, say, say_error
open_closed_streams()
for line in range(3):
    say(f"line {line} " + "x" * int(sys.argv[1]))
    say_error("é")
file = open(sys.argv[2], "w")
file.write("own")
file.close()
"""


def says(redirections: str, tmp_path: Path, length: int = 1, **variables: str) -> tuple[int, str]:
    """Exit code and stderr of a process that prints and then writes a file, started by a shell."""
    command = f'"$0" -P -c "$1" {length} {tmp_path}/file {redirections}'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, PYTHON[0], SAYS],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (tmp_path / "file").read_text() == "own"
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "redirections",
    [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full", "2> /dev/full", "> /dev/full 2> /dev/full", "| true"],
)
def test_what_nobody_reads_ends_nothing_and_gets_into_no_file(redirections: str, tmp_path: Path):
    code, err = says(redirections, tmp_path)
    assert code == 0
    assert err in ("é\né\né\n", "")


def test_an_ascii_terminal_gets_escapes(tmp_path: Path):
    assert says("", tmp_path, PYTHONIOENCODING="ascii") == (0, "\\xe9\n" * 3)


def test_a_pipe_that_does_not_block_and_is_full_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("arc_runner.console._PATIENCE_SECONDS", 0.05)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w") as stream:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", stream)
        for _ in range(50):
            say("x" * 10_000)
    os.close(reader)


@pytest.mark.slow
def test_a_run_on_a_terminal_of_few_characters_or_none_ends_as_any_other(tmp_path: Path):
    model = copy_small(tmp_path / "modèle 👩")
    words = arguments(four(tmp_path), model_path=model)
    codes, outs = [], []
    for redirections in ("", ">&-", "> /dev/full"):
        done = subprocess.run(
            ["bash", "-c", f'"$@" {redirections}', "bash", *COMMAND, *words],
            env=environment() | {"PYTHONIOENCODING": "ascii", "LANG": "C"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        codes.append((done.returncode, done.stderr))
        outs.append(done.stdout)
    assert codes == [(0, "")] * 3
    assert "model             " in outs[0]
    assert r"mod\xe8le \U0001f469" in outs[0]
    assert outs[1:] == ["", ""]
