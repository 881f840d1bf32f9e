"""Real pseudo-terminals: streams that go to one, and what it shows."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pty
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest


def _load_recorder() -> ModuleType:
    """The recorder of runs, which knows what a terminal shows; benchmarks is no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "record_run.py"
    spec = importlib.util.spec_from_file_location("record_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recorder = _load_recorder()


class Terminal:
    """A terminal to write to (``stream``); ``written`` is all that came, ``lines`` what it shows of it."""

    def __init__(self, columns: int = 80, lines: int = 24, encoding: str = "utf-8") -> None:
        self._encoding = encoding
        self._terminal, inner = pty.openpty()
        self._columns = columns
        self.resize(columns, lines)
        self.stream = open(inner, "w", encoding=encoding)  # noqa: PTH123, SIM115
        self._received = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def resize(self, columns: int, lines: int = 24) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self) -> None:
        try:
            while data := os.read(self._terminal, 65536):
                self._received += data
        except OSError:  # closed
            pass

    @property
    def written(self) -> str:
        return self._received.decode(self._encoding)

    def wait_for(self, text: str, after: str = "") -> None:
        """Waits until ``text`` is written, where it is after ``after``."""
        due = time.monotonic() + 100
        while text not in self.written.partition(after)[2] if after else text not in self.written:
            assert time.monotonic() < due, f"no {text!r} in {self.written!r}"
            time.sleep(0.01)

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def lines(self) -> list[str]:
        screen = recorder.Screen(self._columns)
        screen.feed(self.written)
        return screen.plain()

    def close(self) -> None:
        """Waits until all that was written has come."""
        self.stream.close()
        self._thread.join(10)
        os.close(self._terminal)


def on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80, encoding: str = "utf-8") -> Terminal:
    """Makes this process's stdout and stderr a terminal, with colours, for the test."""
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal(columns, encoding=encoding)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal.stream)
    return terminal
