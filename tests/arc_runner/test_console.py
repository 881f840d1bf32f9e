"""What a person sees on stderr: errors under the command's name, and libraries' warnings as plain lines."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from runner_cases import four, run_main

import distributed_kv_cached_inference
from arc_runner import job
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
