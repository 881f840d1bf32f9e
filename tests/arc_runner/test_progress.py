"""What a run shows of its progress: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import io
import sys
import time

import pytest

from arc_runner.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one entry is the time."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_every_half_minute_at_most(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    progress = Progress(total=100)
    for _ in range(13):
        clock[0] += 10
        progress.update(sequences=2, tokens=50)
    progress.close()
    assert capsys.readouterr() == (
        "6 of 100 sequences, 5.0 tokens/s\n"
        "12 of 100 sequences, 5.0 tokens/s\n"
        "18 of 100 sequences, 5.0 tokens/s\n"
        "24 of 100 sequences, 5.0 tokens/s\n",
        "",
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_with_the_speed_and_no_lines(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(total=4)
    for _ in range(2):
        clock[0] += 40
        progress.update(sequences=2, tokens=60)
    progress.close()
    assert "4/4" in terminal.getvalue()
    assert "1.5 tokens/s" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_while_nothing_gets_done_there_are_lines_too(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("arc_runner.progress._QUIET_SECONDS", 0.01)
    progress = Progress(total=2)
    clock[0] += 40
    deadline = time.perf_counter() + 20
    while not (out := capsys.readouterr().out) and time.perf_counter() < deadline:
        time.sleep(0.01)
    progress.close()
    assert out.startswith("0 of 2 sequences, 0.0 tokens/s\n")
