"""Ctrl-C and SIGTERM: the first one ends a run in good order, a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

EXIT_RESUMABLE = 75
STOPPED = "stopped; nothing is lost, the same command continues"


def end_on_signals() -> None:
    """SIGINT and SIGTERM end the process in one sentence, as long as there is nothing to bring in order."""

    def end(_number: int, _frame: object) -> None:
        os.write(2, f"{STOPPED}\n".encode())
        os._exit(EXIT_RESUMABLE)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


class StopRequest:
    """Whether the run was asked to stop.

    While results are being made (``deferred``) the first signal only sets ``requested``; anywhere else
    nothing is lost by stopping on the spot, and it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within, SIGINT and SIGTERM are stop requests; main thread only."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal interrupts nothing; look at ``requested`` between two pieces of work."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, _frame: object) -> None:
        if self.requested:
            os._exit(EXIT_RESUMABLE)
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"stopping as soon as the running work is done; once more to stop at once\n")
        if not self._deferring:
            raise KeyboardInterrupt
