"""What a person is told while something takes longer than two seconds."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from arc_runner.console import say

# Without a terminal a line is printed when so many seconds have passed, then every half minute.
_SAID_AFTER = (2.0, 10.0, 30.0)
_QUIET_SECONDS = 30.0
_REDRAWN_SECONDS = 1.0


class Waiting:
    """Says what is waited for, and since when, once it has taken two seconds; a context manager.

    On a terminal it is one line that counts the seconds and goes away in the end; elsewhere a plain line now
    and then.

    Args:
        what: such as "loading the weights", or a callable that returns it, for what changes meanwhile.
    """

    def __init__(self, what: str | Callable[[], str]) -> None:
        self._what = what if callable(what) else lambda: what
        self._over = threading.Event()

    def begin(self) -> None:
        """Begins to count the seconds."""
        self._thread = threading.Thread(target=self._say_on, name="waiting", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Says nothing more; may be called without ``begin``, and twice."""
        if not self._over.is_set() and hasattr(self, "_thread"):
            self._over.set()
            self._thread.join(1.0)  # no longer: nobody may be reading what it prints

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _say_on(self) -> None:
        begun = time.monotonic()
        if sys.stderr is not None and sys.stderr.isatty():
            self._count_on_terminal(begun)
            return
        times = itertools.chain(_SAID_AFTER, itertools.count(2 * _QUIET_SECONDS, _QUIET_SECONDS))
        for seconds in times:
            if self._over.wait(begun + seconds - time.monotonic()):
                return
            say(f"{self._what()}, {time.monotonic() - begun:.0f} s so far")

    def _count_on_terminal(self, begun: float) -> None:
        if self._over.wait(_SAID_AFTER[0]):
            return
        from tqdm import tqdm  # takes time to import, which only who waits has

        with tqdm(bar_format="{desc}, {elapsed} so far", leave=False) as bar:
            bar.start_t -= time.monotonic() - begun
            while True:
                bar.set_description_str(self._what())
                if self._over.wait(_REDRAWN_SECONDS):
                    return
