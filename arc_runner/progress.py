"""The progress of a run while it generates, and clocks for the phases of its report."""

from __future__ import annotations

import dataclasses
import threading
import time

from tqdm import tqdm

from arc_runner.console import say

_REDRAWN_SECONDS = 1.0
_QUIET_SECONDS = 30.0  # between two lines of progress where there is no terminal


@dataclasses.dataclass
class Clock:
    """Adds up the wall-clock seconds spent within ``with clock:``."""

    seconds: float = 0.0

    def __enter__(self) -> Clock:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


class Progress:
    """Shows sequences done and tokens per second: a bar on a terminal, elsewhere a line every half minute.

    Also while nothing gets done, as in the first minutes of long answers.
    """

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, unit="seq", disable=None)  # None: only on a terminal
        self._total, self._sequences, self._tokens = total, 0, 0
        self._started = self._said = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="progress", daemon=True)
        self._thread.start()

    def update(self, sequences: int, tokens: int) -> None:
        """Counts so many sequences and tokens more."""
        self._sequences += sequences
        self._tokens += tokens
        self._bar.set_postfix_str(self._speed(), refresh=False)
        self._bar.update(sequences)
        self._say()

    def close(self) -> None:
        """Takes the bar off the terminal's last line."""
        self._over.set()
        self._thread.join(1.0)
        self._bar.close()

    def _live(self) -> None:
        while not self._over.wait(_QUIET_SECONDS if self._bar.disable else _REDRAWN_SECONDS):
            self._bar.refresh()
            self._say()

    def _say(self) -> None:
        if self._bar.disable and time.monotonic() - self._said >= _QUIET_SECONDS:
            self._said = time.monotonic()
            say(f"{self._sequences} of {self._total} sequences, {self._speed()}")

    def _speed(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._started, 1e-9):.1f} tokens/s"
