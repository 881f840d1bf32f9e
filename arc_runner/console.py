"""What a person sees of a run: lines on stdout, errors and warnings on stderr, and the command's name.

Imports only the standard library: the face needs the command's name before the imports that take seconds.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

SCRIPT = "qwen2-arc-run"
MODULE = "distributed_kv_cached_inference.py"
_LOGGED = ("activation_store", "arc_puzzles", "arc_runner", "qwen2_core", "qwen2_engine")


def started_as_script() -> bool:
    """Tells whether this process was started by the installed script ``qwen2-arc-run``."""
    return bool(sys.argv) and Path(sys.argv[0]).stem == SCRIPT  # embedded, Python may have no argv


def command_name() -> str:
    """Returns the name by which the command line was called, for its messages."""
    return SCRIPT if started_as_script() else MODULE


def say(line: str) -> None:
    """Prints a line on stdout at once, also where it goes to a file or a pipe."""
    print(line, flush=True)


def say_error(sentence: str) -> None:
    """Prints a sentence on stderr."""
    print(sentence, file=sys.stderr)


@contextlib.contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Prints what our packages log as a warning or worse on stderr, each as one plain line.

    Other libraries' warnings are theirs to show.
    """
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_OneLine())
    handler.addFilter(lambda record: record.name.partition(".")[0] in _LOGGED)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


class _OneLine(logging.Formatter):
    """Formats a record as its message alone, in one line, without the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(record.getMessage().split())
