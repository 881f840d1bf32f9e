"""Waiting for a store that is away for a moment, as when a file server restarts or a mount is lost.

Only for a store that several processes share: a failing local disk is told at once. What is tried again has
to be right after half of it was done, and must not make the store's directory: of a lost mount the empty
mount point is left, and a new store in it would hide what there is.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from activation_store.format import StoreError, StoreWriteError

AWAY_SECONDS = 120.0
_PAUSE_SECONDS = 0.5
_QUIET_SECONDS = 30.0
Result = TypeVar("Result")

# What the system says of a directory that may be there again later. A full, read-only or forbidden one
# (ENOSPC, EDQUOT, EFBIG, EROFS, EACCES, EPERM) is not: waiting would only put off what the user has to do.
_AWAY = frozenset(
    {
        errno.ENOENT,  # moved away, or a mount point without its mount
        errno.ENODEV,
        errno.ENXIO,
        errno.ESTALE,  # NFS: the server knows our handles no more
        errno.EIO,  # a soft mount whose server does not answer; FUSE; object stores' internal errors
        errno.EBUSY,  # an object store that asks to be asked less often
        errno.ENOTCONN,  # FUSE and Lustre without their daemon or server
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
    }
)


def at_once(action: Callable[[], Result]) -> Result:
    """What ``action`` returns, without patience."""
    return action()


class Patience:
    """Calls what works on the store in ``location``, and again while that is away, for ``AWAY_SECONDS``.

    The threads of a process share one. ``who`` names the process in messages; once ``should_stop`` says so,
    nothing is tried again.
    """

    def __init__(
        self, location: str, who: str = "this process", should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._location, self._who, self._should_stop = location, who, should_stop
        self._given_up = False
        self._lock = threading.Lock()
        self._said = -_QUIET_SECONDS

    def __call__(self, action: Callable[[], Result]) -> Result:
        """What ``action`` returns.

        Raises:
            StoreWriteError: the store stayed away, or the run is to end, or it cannot be used.
            StoreError: of ``action``, about anything else.
        """
        started = time.monotonic()
        while True:
            try:
                return action()
            except (OSError, StoreError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__
                away = _is_away(cause)
                if isinstance(error, StoreError) and not away:
                    raise
                reason = (cause.strerror if isinstance(cause, OSError) else None) or cause
                if not away or self._ends() or time.monotonic() - started >= AWAY_SECONDS:
                    raise StoreWriteError(
                        f"{self._who}: {self._location} cannot be {'reached' if away else 'used'} ({reason})"
                    ) from cause
                self._say(f"{self._who}: waiting for {self._location} ({reason})")
                time.sleep(_PAUSE_SECONDS)

    def give_up(self) -> None:
        """From now on nothing is tried again: the run ends."""
        self._given_up = True

    def _ends(self) -> bool:
        return self._given_up or self._should_stop()

    def _say(self, sentence: str) -> None:
        with self._lock:
            if time.monotonic() - self._said < _QUIET_SECONDS:
                return
            self._said = time.monotonic()
        print(sentence, file=sys.stderr, flush=True)


def _is_away(error: BaseException | None) -> bool:
    # Object stores' libraries raise time-outs without a number.
    return isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno in _AWAY)
