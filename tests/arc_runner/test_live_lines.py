"""The lines at the foot of a terminal: drawn in one place, and what is printed goes above them."""

from __future__ import annotations

import io
import os
import sys
import threading
import time

import pytest
from terminals import on_terminal

from arc_runner.console import say, say_error
from arc_runner.live_lines import LiveLines, Row, is_terminal


def rows(*texts: str) -> list[Row]:
    return [Row(text, len(text)) for text in texts]


def test_rows_are_replaced_in_their_place_and_taken_off(monkeypatch: pytest.MonkeyPatch):
    terminal, live = on_terminal(monkeypatch), LiveLines()
    live.draw(rows("one", "two"))
    live.draw(rows("three", "four", "five"))
    live.draw(rows("six"))
    live.draw(())
    terminal.close()
    assert terminal.lines() == [""]
    assert "three" in terminal.written


def test_a_terminal_that_got_narrower_is_cleaned_too(monkeypatch: pytest.MonkeyPatch):
    terminal, live = on_terminal(monkeypatch, columns=60), LiveLines()
    live.draw(rows("x" * 59, "y" * 59))
    terminal.resize(30)
    terminal.written  # noqa: B018
    live.draw(())
    terminal.close()
    assert "\x1b[3A" in terminal.written  # each row has become two


def test_the_cursor_is_never_hidden(monkeypatch: pytest.MonkeyPatch):
    terminal, live = on_terminal(monkeypatch), LiveLines()
    live.draw(rows("one"))
    terminal.close()
    assert "\x1b[?25l" not in terminal.written


def test_what_is_printed_goes_above_the_rows(monkeypatch: pytest.MonkeyPatch):
    terminal, live = on_terminal(monkeypatch), LiveLines()
    monkeypatch.setattr("arc_runner.console.LIVE", live)
    live.draw(rows("bar", "speed"))
    say("first")
    say_error("second")
    live.draw(rows("bar 2"))
    terminal.close()
    assert terminal.lines() == ["first", "second", "bar 2"]


def test_what_goes_to_a_file_leaves_the_rows_alone(monkeypatch: pytest.MonkeyPatch):
    terminal, live = on_terminal(monkeypatch), LiveLines()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    live.draw(rows("bar"))
    terminal.stream.flush()
    with live.above(sys.stdout):
        print("first")
    terminal.close()
    assert terminal.written == "bar\x1b[K\x1b[J"


@pytest.mark.parametrize("last", [False, True])
def test_a_signal_speaks_in_the_place_of_the_rows_while_they_are_drawn(
    last: bool, monkeypatch: pytest.MonkeyPatch
):
    terminal, live = on_terminal(monkeypatch), LiveLines()
    saved = os.dup(2)
    os.dup2(terminal.stream.fileno(), 2)
    try:
        live.draw(rows("bar", "speed"))
        live.tell("stopping", last=last)
        live.draw(rows("bar again"))
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    terminal.close()
    assert terminal.lines() == ["stopping", "" if last else "bar again"]


def test_a_signal_does_not_wait_for_ever_for_a_frame_that_is_stuck(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("arc_runner.live_lines._PATIENCE_SECONDS", 0.05)
    live, stuck, go = LiveLines(), threading.Event(), threading.Event()

    def draw() -> None:
        with live._lock:
            stuck.set()
            go.wait(10)

    thread = threading.Thread(target=draw)
    thread.start()
    stuck.wait(10)
    begun = time.monotonic()
    live.tell("stopped", last=True)
    assert time.monotonic() - begun < 5
    go.set()
    thread.join()
    assert capfd.readouterr().err == "stopped\n"


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    terminal, live = on_terminal(monkeypatch), LiveLines()
    live.draw(rows("bar"))
    terminal.close()
    live.draw(rows("bar"))
    live.draw(())


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_draw_again_is_none(term: str, monkeypatch: pytest.MonkeyPatch):
    terminal = on_terminal(monkeypatch)
    assert is_terminal(terminal.stream)
    monkeypatch.setenv("TERM", term)
    assert not is_terminal(terminal.stream)
    monkeypatch.delenv("TERM")
    terminal.close()
    assert not is_terminal(terminal.stream)  # closed
    assert not is_terminal(None)
