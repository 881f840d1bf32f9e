"""What a run shows while it works: on a terminal what goes on and one bar, elsewhere a line now and then."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from terminals import on_terminal
from tqdm import tqdm

from arc_runner import display
from arc_runner.console import say
from arc_runner.display import DISPLAY, Display
from arc_runner.progress import Activity, Clock, Progress, WorkerLine
from arc_runner.waiting import Waiting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one entry is the time."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def generating(done: int = 0, total: int = 100) -> Progress:
    progress = Progress(total, Clock(), lambda: (2, 7), done_elsewhere=done)
    progress.generating.__enter__()
    return progress


def until(condition: Callable[[], object]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


# --- Without a terminal -------------------------------------------------------------------------------------


def test_there_is_a_line_every_half_minute_at_most_and_none_while_something_else_goes_on(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    shown, progress, compiling = Display(), generating(), Activity(lambda: "compiling", clock[0])
    shown._progress, shown._progress_said = progress, clock[0]
    for second in range(1, 91):
        clock[0] += 1
        progress.count_steps(tokens=50, slots=8, slots_in_use=7)
        shown._say([compiling] if second < 50 else [], progress)
    out = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("compiling, ")]
    assert out == [
        "0 of 100 sequences, 50.0 tokens/s, 7 of 8 slots, 2 of 7 tasks solved",
        "0 of 100 sequences, 50.0 tokens/s, 7 of 8 slots, 2 of 7 tasks solved",
    ]


def worker(index: int, heard: float) -> WorkerLine:
    return WorkerLine(index, f"host-{index} GPU 0", "generating", 25.0, 7, 8, heard)


def test_below_the_line_stand_the_workers_of_a_run_on_ray(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    shown, progress = Display(), generating()
    progress.workers = [worker(1, clock[0]), worker(2, clock[0] - 5)]
    shown._progress, shown._progress_said = progress, clock[0]
    clock[0] += 30
    shown._say([], progress)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  worker 1 (host-1 GPU 0): generating, 25.0 tokens/s, 7 of 8 slots, heard 30 s ago",
        "  worker 2 (host-2 GPU 0): generating, 25.0 tokens/s, 7 of 8 slots, heard 35 s ago",
    ]


def test_of_many_workers_those_are_shown_that_have_been_silent_for_longest(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    shown, progress = Display(), generating()
    progress.workers = [worker(index, clock[0] - (index == 77)) for index in range(100)]
    shown._progress, shown._progress_said = progress, clock[0]
    clock[0] += 30
    shown._say([], progress)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 17
    assert any("worker 77 " in line for line in lines)
    assert lines[-1] == "  and 84 more workers"


def test_an_activity_is_told_after_2_10_and_30_seconds_and_then_every_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    shown, compiling = Display(), Activity(lambda: "compiling", clock[0])
    for _ in range(100):
        clock[0] += 1
        shown._say([compiling], None)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"compiling, {seconds} s so far" for seconds in (2, 10, 30, 60, 90)]


# --- On a terminal ------------------------------------------------------------------------------------------


@pytest.fixture
def lively(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_DRAWN_SECONDS", 0.02)
    monkeypatch.setattr(display, "_DRAWN_AFTER", 0.0)


TERMINALS = pytest.mark.parametrize(("columns", "encoding"), [(100, "utf-8"), (40, "ascii"), (12, "latin-1")])


@TERMINALS
@pytest.mark.usefixtures("lively")
def test_the_bar_fits_any_terminal_stays_below_what_is_printed_and_goes_away(
    columns: int, encoding: str, monkeypatch: pytest.MonkeyPatch
):
    terminal = on_terminal(monkeypatch, columns, encoding)
    progress = generating(done=25)
    progress.count_steps(tokens=50, slots=8, slots_in_use=7)
    progress.workers = [worker(3, time.monotonic())]
    DISPLAY.begin(progress)
    until(lambda: "ago" in terminal.written or columns < 60)
    until(lambda: "solve" in terminal.written)
    say("a line")
    with Waiting("storing é"):
        until(lambda: "storing" in terminal.written.rpartition("a line")[2])
    seen = terminal.lines()
    DISPLAY.end(progress)
    terminal.close()
    text = "".join("".join(seen).split())
    assert "25of100sequences" in text
    assert "7of8slots" in text
    assert "2of7taskssolved" in text
    assert seen[0] == "a line"
    assert terminal.lines() == ["a line", ""]


@TERMINALS
@pytest.mark.usefixtures("lively")
def test_what_is_waited_for_shows_its_seconds_and_leaves_nothing(
    columns: int, encoding: str, monkeypatch: pytest.MonkeyPatch
):
    terminal = on_terminal(monkeypatch, columns, encoding)
    with Waiting("compiling prefill \x1b[31m é of s3://key:secret@bucket"):
        until(lambda: "compiling" in terminal.written)
    terminal.close()
    assert terminal.lines() == [""]
    assert "secret" not in terminal.written
    assert "\x1b[31m" not in terminal.written


@pytest.mark.usefixtures("lively")
def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch):
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with Waiting("compiling"):
        until(lambda: "compiling" in terminal.written)
    terminal.close()
    assert "36" not in terminal.written  # cyan


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(display, "_SAID_AFTER", (0.05, 100.0))
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with Waiting("compiling"):
        until(lambda: terminal.written)
    terminal.close()
    assert re.fullmatch(r"compiling, \d s so far\r\n", terminal.written)


@pytest.mark.usefixtures("lively")
def test_while_a_library_shows_a_bar_of_its_own_there_is_none_of_ours(monkeypatch: pytest.MonkeyPatch):
    terminal = on_terminal(monkeypatch)
    with tqdm(total=3, file=terminal.stream, leave=False), Waiting("fetching"):
        time.sleep(0.2)
        assert "fetching" not in terminal.written
    with Waiting("loading"):
        until(lambda: "loading" in terminal.written)
    terminal.close()


@pytest.mark.usefixtures("lively")
def test_before_anything_is_generated_there_is_no_bar(monkeypatch: pytest.MonkeyPatch):
    terminal = on_terminal(monkeypatch)
    progress = Progress(5, Clock(), lambda: None)
    DISPLAY.begin(progress)
    with Waiting("compiling"):
        until(lambda: "compiling" in terminal.written)
    DISPLAY.end(progress)
    terminal.close()
    assert "sequences" not in terminal.written
