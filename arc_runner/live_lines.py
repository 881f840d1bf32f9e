"""The lines at the foot of the terminal that change, and what is printed above them.

Imports nothing that takes time. Not ``rich.live``, which draws on one stream alone, hides the cursor (a
process that is killed would leave it hidden) and takes a lock that a signal's handler may find held.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

_PATIENCE_SECONDS = 0.5  # of a signal's handler for a frame that is being drawn


class Row(NamedTuple):
    """One line as the terminal gets it, colours and all, and how many columns it takes."""

    text: str
    columns: int


def is_terminal(stream: TextIO | None) -> bool:
    """Tells whether a stream goes to a terminal on which lines can be drawn again."""
    if os.environ.get("TERM") in ("dumb", "unknown"):
        return False
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def size_of(stream: TextIO) -> tuple[int, int]:
    """Returns how many columns and lines a stream's terminal has, 80 and 24 where it does not say."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        columns, lines = 0, 0
    return columns or 80, lines or 24


class LiveLines:
    """Draws rows at the foot of stderr's terminal, again and again in the same place.

    The cursor rests at the end of the last row. Whatever else goes to the terminal is printed within
    ``above``. Nothing here raises: a frame that cannot be drawn is left out.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._rows: Sequence[Row] = ()
        self._over = False

    def draw(self, rows: Sequence[Row]) -> None:
        """Replaces the rows; none takes them off."""
        with self._lock:
            if self._over or not (rows or self._rows) or not _in_foreground():
                return
            text = "\n".join(f"{row.text}\x1b[K" for row in rows)
            before, self._rows = self._back(), rows
            _write(f"{before}{text}\x1b[J")

    @contextlib.contextmanager
    def above(self, stream: TextIO | None) -> Iterator[None]:
        """Takes the rows off while something is printed on ``stream``, if that is a terminal."""
        if not self._rows or not is_terminal(stream):
            yield
            return
        with self._lock:
            rows = self._rows
            self.draw(())
            try:
                yield
            finally:
                self.draw(rows)

    def tell(self, sentence: str, *, last: bool = False) -> None:
        """Prints a line on stderr in the place of the rows, from a signal's handler; ``last``: for good.

        Not by print, as the signal may have come in the middle of one.
        """
        held = self._lock.acquire(timeout=_PATIENCE_SECONDS)
        self._over = last
        before = f"{self._back()}\x1b[J" if self._rows and _in_foreground() else ""
        self._rows = ()
        with contextlib.suppress(OSError):  # closed
            os.write(2, f"{before}{sentence}\n".encode())
        if held:
            self._lock.release()

    def _back(self) -> str:
        """Returns what brings the cursor to the first row, also where a narrower terminal wraps them."""
        if not self._rows:
            return ""
        width, _ = size_of(sys.stderr)
        up = sum(max(1, -(-row.columns // width)) for row in self._rows) - 1
        return f"\r\x1b[{up}A" if up else "\r"


LIVE = LiveLines()


def _in_foreground() -> bool:
    """Tells whether the terminal is ours to draw on: not that of another job of the shell, after Ctrl-Z."""
    try:
        return os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return True  # not the terminal that controls this process


def _write(text: str) -> None:
    """Writes without a buffer, whose lock Python would want when it ends."""
    encoding = sys.stderr.encoding or "utf-8"
    data = text.encode(encoding, "replace")
    with contextlib.suppress(OSError, ValueError):
        while data:
            data = data[os.write(sys.stderr.fileno(), data) :]
