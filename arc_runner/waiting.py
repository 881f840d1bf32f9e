"""What a person is told while something takes a while."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from arc_runner.display import DISPLAY
from arc_runner.progress import Activity


class Waiting:
    """Says what is waited for, and since when, once that takes a while; a context manager.

    On a terminal it is a line that counts the seconds and goes away in the end; elsewhere a plain line after
    two seconds and then now and again.

    Args:
        what: such as "loading the weights", or a callable that returns it, for what changes meanwhile.
    """

    def __init__(self, what: str | Callable[[], str]) -> None:
        self._what = what if callable(what) else lambda: what
        self._activity: Activity | None = None

    def begin(self) -> None:
        """Begins to count the seconds."""
        self._activity = Activity(self._what)
        DISPLAY.begin(self._activity)

    def end(self) -> None:
        """Says nothing more; may be called without ``begin``, and twice."""
        if self._activity is not None:
            DISPLAY.end(self._activity)

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
