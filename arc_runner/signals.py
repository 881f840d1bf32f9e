"""Ctrl-C and SIGTERM: the first one ends a run in good order, a second one ends the process at once.

Imports nothing that takes time: signals are handled from the first moment of the command on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from arc_runner.errors import EXIT_RESUMABLE

STOPPED = "stopped; nothing is lost, the same command continues"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_on_signals() -> None:
    """Makes SIGINT and SIGTERM end the process at once, in a sentence, from now on.

    For the command line, from its first moment on. Raising KeyboardInterrupt would not do: what is raised
    during an import or in a callback of the garbage collector ends in a traceback, if it ends anything.
    """

    def end(_number: int, _frame: object) -> None:
        os.write(2, f"{STOPPED}\n".encode())
        os._exit(EXIT_RESUMABLE)

    for number in _SIGNALS:
        signal.signal(number, end)


class StopRequest:
    """Tells whether a run was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the first signal only set ``requested``, which the work inside checks between two pieces.

        The next signal is handled as it was before, also in a later context: once a stop was requested,
        nothing is deferred any more. Outside the main thread, where Python handles no signals, this does
        nothing.
        """
        if self.requested or threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(_number: int, _frame: object) -> None:
            self.requested = True
            restore()
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"stopping as soon as the running work is done; once more to stop at once\n")

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            for number in _SIGNALS:
                signal.signal(number, handle)
            yield
        finally:
            restore()
