"""Whatever takes long says what it does, and for how long."""

from __future__ import annotations

import threading
import time

import pytest

from arc_runner import display
from arc_runner.waiting import Waiting


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_SAID_AFTER", (0.05, 0.1, 0.15))
    monkeypatch.setattr(display, "_QUIET_SECONDS", 0.1)


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]):
    for _ in range(3):
        with Waiting("working"):
            pass
    assert capsys.readouterr() == ("", "")
    assert not any(thread.name == "display" for thread in threading.enumerate())


@pytest.mark.usefixtures("impatient")
def test_what_takes_long_says_so_again_and_again_and_what_has_changed(capsys: pytest.CaptureFixture[str]):
    done = 0
    with Waiting(lambda: f"working: {done} of 9 done"):
        time.sleep(0.3)
        done = 4
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    assert lines[0] == "working: 0 of 9 done, 0 s so far"
    assert lines[-1].startswith("working: 4 of 9 done, ")
    time.sleep(0.2)
    assert capsys.readouterr().out == ""  # it is over


def test_an_error_of_what_is_waited_for_passes(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(OSError, match="full"), Waiting("working"):
        raise OSError("full")
    assert capsys.readouterr().out == ""


def test_it_may_end_twice_and_without_having_begun():
    one = Waiting("working")
    one.end()
    one.begin()
    one.end()
    one.end()
