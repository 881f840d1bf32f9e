"""What a person sees of a run: lines on stdout, errors and warnings on stderr, and the command's name.

What is printed never ends a run: characters that the stream cannot take are escaped, and what nobody reads
any more is dropped. Imports little: the face needs the command's name before the imports that take seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from arc_runner.live_lines import LIVE
from qwen2_core.messages import masked, printable

SCRIPT = "qwen2-arc-run"
MODULE = "distributed_kv_cached_inference.py"
_LOGGED = ("activation_store", "arc_puzzles", "arc_runner", "qwen2_core", "qwen2_engine")
_PATIENCE_SECONDS = 5.0  # for who reads our output through a pipe that does not block


def started_as_script() -> bool:
    """Tells whether this process was started by the installed script ``qwen2-arc-run``."""
    return bool(sys.argv) and Path(sys.argv[0]).stem == SCRIPT  # embedded, Python may have no argv


def command_name() -> str:
    """Returns the name by which the command line was called, for its messages."""
    return SCRIPT if started_as_script() else MODULE


def open_closed_streams() -> None:
    """Opens those of stdin, stdout and stderr that were closed when the process was started, on nothing.

    Else a file of the store would get the number of one of them, and the text that a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115


def say(text: str) -> None:
    """Prints lines on stdout at once, also where it goes to a file or a pipe."""
    _write(sys.stdout, masked(printable(text, keep="\n\t")))


def show(drawn: str) -> None:
    """Prints lines on stdout, a terminal, with their colours; what else they hold is ``shown_on`` it."""
    _write(sys.stdout, drawn.removesuffix("\n"))


def shown_on(stream: TextIO, text: str) -> str:
    """Returns a line as a stream can take it: no passwords, and escapes for what it would obey or lacks."""
    return _in_characters_of(stream, masked(printable(text)))


def say_error(sentence: str) -> None:
    """Prints a sentence on stderr, in one line."""
    _write(sys.stderr, masked(printable(sentence)))


def refuse(sentence: str) -> None:
    """Prints why the command ends on stderr, under its name."""
    say_error(f"{command_name()}: error: {sentence}")


@contextlib.contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Prints what our packages log as a warning or worse on stderr, each as one plain line.

    Other libraries' warnings are theirs to show.
    """
    handler = _Lines(logging.WARNING)
    handler.addFilter(lambda record: record.name.partition(".")[0] in _LOGGED)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


class _Lines(logging.Handler):
    """Prints a record's message alone, in one line, without the traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        say_error(" ".join(record.getMessage().split()))


def _write(stream: TextIO | None, text: str) -> None:
    """Prints ``text`` as far as the stream takes it; raises nothing."""
    if stream is None:
        return
    line = _in_characters_of(stream, text)
    try:
        with LIVE.above(stream):
            print(line, file=stream, flush=True)
    except BlockingIOError:  # a pipe that does not block is full
        with contextlib.suppress(OSError, ValueError):
            if select.select([], [stream], [], _PATIENCE_SECONDS)[1]:
                stream.flush()
                return
        _drop(stream)
    except (OSError, ValueError):  # ValueError: the stream is closed
        _drop(stream)


def _in_characters_of(stream: TextIO, text: str) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _drop(stream: TextIO) -> None:
    """Lets what is printed from now on go nowhere: the reader is gone, as in ``... | head``, or a disk full.

    Also what the stream holds back, which would be an error again when Python ends.
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
