"""Waiting for a store that is away for a moment, as when a file server restarts or a mount is lost.

Only for a store that several processes share: a failing local disk is reported at once. An action
that is tried again must give the same result after a first try that was done in part. It must not make the
store's directory: where a mount is lost, its empty mount point is left, and a new store there would hide the
real one.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from activation_store.format import StoreError, StoreWriteError
from qwen2_core.messages import masked

AWAY_SECONDS = 120.0
_PAUSE_SECONDS = 0.5
_QUIET_SECONDS = 30.0
Result = TypeVar("Result")
_logger = logging.getLogger(__name__)

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
    """Returns what `action` returns and tries nothing again: the policy of a run that is alone."""
    return action()


class RetryPolicy:
    """Calls an action on a store, and calls it again while the store is away, for AWAY_SECONDS at most.

    The threads of a process share one. A warning is logged when the waiting begins and every 30 seconds.

    Args:
        location: the store's directory or URL, for messages.
        who: the process, for messages.
        should_stop: asked after each failed try; once it says yes, nothing is tried again.
    """

    def __init__(
        self, location: str, who: str = "this process", should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._location, self._who, self._should_stop = masked(location), who, should_stop
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._warned = -_QUIET_SECONDS

    def __call__(self, action: Callable[[], Result]) -> Result:
        """Returns what `action` returns.

        Raises:
            StoreWriteError: the store stayed away, or the run is to end, or the store cannot be used.
            StoreError: what `action` raised about anything else.
        """
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_says_away),
            stop=self._is_over,
            wait=tenacity.wait_fixed(_PAUSE_SECONDS),
            sleep=tenacity.sleep_using_event(self._given_up),  # ends at once when the run gives up
            before_sleep=self._warn,
            reraise=True,
        )
        try:
            return attempts(action)
        except (OSError, StoreError) as error:
            away = _says_away(error)
            if isinstance(error, StoreError) and not away:
                raise
            raise StoreWriteError(
                f"{self._who}: {self._location} cannot be {'reached' if away else 'used'} ({_reason(error)})"
            ) from _cause(error)

    def give_up(self) -> None:
        """Ends every wait now, and lets nothing be tried again: the run ends."""
        self._given_up.set()

    def _is_over(self, attempt: tenacity.RetryCallState) -> bool:
        waited = attempt.seconds_since_start or 0.0
        return self._given_up.is_set() or self._should_stop() or waited >= AWAY_SECONDS

    def _warn(self, attempt: tenacity.RetryCallState) -> None:
        assert attempt.outcome is not None
        with self._lock:
            if time.monotonic() - self._warned < _QUIET_SECONDS:
                return
            self._warned = time.monotonic()
        reason = _reason(attempt.outcome.exception())
        _logger.warning("%s: waiting for %s (%s)", self._who, self._location, reason)


def _cause(error: BaseException | None) -> BaseException | None:
    """Returns the system's error behind a StoreError, or the error itself."""
    return error.__cause__ if isinstance(error, StoreError) else error


def _reason(error: BaseException | None) -> str:
    cause = _cause(error)
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause)


def _says_away(error: BaseException) -> bool:
    cause = _cause(error)
    # Object stores' libraries raise time-outs without a number.
    return isinstance(cause, TimeoutError) or (isinstance(cause, OSError) and cause.errno in _AWAY)
