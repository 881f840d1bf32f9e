"""The progress of a run while it generates, and clocks for the phases of its report."""

from __future__ import annotations

import dataclasses
import time

from tqdm import tqdm

from arc_runner.console import say

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
    """Shows sequences done and tokens per second: a bar on a terminal, elsewhere a line every half minute."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, unit="seq", disable=None)  # None: only on a terminal
        self._total, self._sequences, self._tokens = total, 0, 0
        self._started = self._said = time.monotonic()

    def update(self, sequences: int, tokens: int) -> None:
        """Counts so many sequences and tokens more."""
        self._sequences += sequences
        self._tokens += tokens
        now = time.monotonic()
        speed = f"{self._tokens / (now - self._started):.1f} tokens/s"
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update(sequences)
        if self._bar.disable and now - self._said >= _QUIET_SECONDS:
            self._said = now
            say(f"{self._sequences} of {self._total} sequences, {speed}")

    def close(self) -> None:
        """Takes the bar off the terminal's last line."""
        self._bar.close()
