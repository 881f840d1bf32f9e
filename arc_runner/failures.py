"""The errors that a run may end with: each a sentence on stderr and an exit code, never a traceback."""

from __future__ import annotations

import jax

from activation_store import StoreError, StoreWriteError
from arc_puzzles import ArcFormatError
from arc_runner.console import refuse, say_error
from arc_runner.errors import EXIT_RESUMABLE, EXIT_USAGE, ClusterError, UsageError
from arc_runner.signals import STOPPED
from qwen2_jax import CheckpointError

_REFUSED = (UsageError, ArcFormatError, CheckpointError, FloatingPointError)
_DEVICE_FAILED = (jax.errors.JaxRuntimeError, MemoryError)
EXPECTED = (*_REFUSED, *_DEVICE_FAILED, StoreError, ClusterError, KeyboardInterrupt, OSError)
_CONTINUES = "the same command continues"


def tell_failure(error: BaseException) -> int:
    """Tells a person why a run ended with ``error``, one of ``EXPECTED``, and returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        say_error(STOPPED)
        return EXIT_RESUMABLE
    sentence, code = _explain(error)
    refuse(sentence)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, ClusterError):
        return str(error), EXIT_RESUMABLE
    if isinstance(error, StoreWriteError):
        return f"{error}; {_CONTINUES}", EXIT_RESUMABLE
    if isinstance(error, _DEVICE_FAILED):
        reason = str(error).partition("\n")[0]
        return (
            f"the device failed ({reason}); {_CONTINUES}, with a smaller --batch_size if memory ran out",
            EXIT_RESUMABLE,
        )
    return str(error), EXIT_USAGE
