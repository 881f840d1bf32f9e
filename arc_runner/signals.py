"""Signals: the first one ends a run in good order, a second Ctrl-C or SIGTERM ends the process at once.

Imports nothing that takes time: signals are handled from the first moment of the command on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from arc_runner.errors import EXIT_RESUMABLE
from arc_runner.live_lines import LIVE

STOPPED = "stopped; nothing is lost, the same command continues"
_ORDERS = (signal.SIGINT, signal.SIGTERM)
# A terminal that closes, schedulers before the time is over, the limit of CPU seconds. They come in twos and
# threes, so that a second one is no wish to end at once.
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def end_on_signals() -> None:
    """Makes the signals end the process at once, in a sentence, from now on; those ignored stay ignored.

    For the command line, from its first moment on. Raising KeyboardInterrupt would not do: what is raised
    during an import or in a callback of the garbage collector ends in a traceback, if it ends anything.
    """
    for number in (*_ORDERS, *_WARNINGS):
        if signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
            signal.signal(number, _end)


def let_end() -> None:
    """Makes the signals do nothing from now on, if ``end_on_signals`` was called: the exit code is decided.

    While Python ends it hands the signals back to the system, which would end the process by one of them.
    """
    for number in (*_ORDERS, *_WARNINGS):
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_IGN)


def _end(_number: int, _frame: object) -> None:
    LIVE.tell(STOPPED, last=True)
    os._exit(EXIT_RESUMABLE)


class StopRequest:
    """Tells whether a run was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the first signal only set ``requested``, which the work inside checks between two pieces.

        The next Ctrl-C or SIGTERM is handled as it was before, also in a later context: once a stop was
        requested, they are not deferred any more. The other signals say nothing new then. Outside the main
        thread, where Python handles no signals, this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = _WARNINGS if self.requested else (*_ORDERS, *_WARNINGS)
        found = {number: signal.getsignal(number) for number in numbers}
        # None: somebody handles it without Python, and it could not be given back.
        before = {number: old for number, old in found.items() if old not in (None, signal.SIG_IGN)}

        def handle(number: int, _frame: object) -> None:
            if self.requested:
                return
            self.requested = True
            for order in set(before).intersection(_ORDERS):
                signal.signal(order, before[order])
            reason = "" if number in _ORDERS else f"{signal.Signals(number).name}: "
            once_more = "; once more to stop at once" if number in _ORDERS else ""
            LIVE.tell(f"{reason}stopping as soon as the running work is done{once_more}")

        try:
            for number in before:
                signal.signal(number, handle)
            yield
        finally:
            for number, old in before.items():
                over = self.requested and number in _WARNINGS and old is _end
                signal.signal(number, signal.SIG_IGN if over else old)
