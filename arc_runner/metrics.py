"""``NAME.metrics.jsonl``: how a run goes, for programs: a line at each phase and every few seconds.

A line is written at once and whole, so that a run that is killed leaves whole lines. A run that continues
appends its own. Nothing here ends a run.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arc_runner.answer_files import AnswerFiles, json_bytes
from arc_runner.console import say

EVERY_SECONDS = 10.0
_MOST_BYTES = 10_000  # of a first line that may be ours
_logger = logging.getLogger(__name__)


class Metrics:
    """Appends lines to a file: ``time`` (UTC), ``seconds`` (since this run began), ``phase``, and figures."""

    def __init__(self, path: Path, source: Mapping[str, str], figures: Callable[[], dict[str, Any]]) -> None:
        """Writes the first line, phase ``start``, which names the store in ``source``.

        ``figures`` returns what the lines hold besides; it is asked on a thread of its own too.
        """
        self._path, self._figures = path, figures
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self._phase = "start"
        self._failed = False
        self._over = threading.Event()
        self._write({"source": dict(source)})
        self._thread = threading.Thread(target=self._live, name="metrics", daemon=True)
        self._thread.start()

    def begin(self, phase: str) -> None:
        """Notes that a phase begins."""
        self._phase = phase
        self._write({})

    def close(self, phase: str) -> None:
        """Writes the last line, of a phase ``done`` or ``stopped``."""
        self._over.set()
        self._thread.join(1.0)  # no longer: its disk may be away
        self.begin(phase)

    def _live(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self._write({})

    def _write(self, more: Mapping[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": now.replace("+00:00", "Z"), "seconds": round(time.monotonic() - self._begun, 3)}
        data = json_bytes(line | {"phase": self._phase} | self._figures() | dict(more))
        with self._lock:
            try:
                _append(self._path, data)
                self._failed = False
            except OSError as error:
                if not self._failed:
                    _logger.warning("cannot write %s: %s; the run goes on", self._path, error.strerror)
                self._failed = True


def make_room(files: AnswerFiles, process: int, source: Mapping[str, str]) -> None:
    """Renames a file of metrics that is not of the store of ``source``, to a numbered name that is free."""
    path = files.metrics(process)
    if not path.is_file() or _is_of(path, source):
        return
    numbered = map(files.numbered, itertools.count(1))
    aside = next(one for one in numbered if not any(map(os.path.lexists, (*one, one.metrics(process)))))
    try:
        path.rename(aside.metrics(process))
    except OSError as error:
        _logger.warning("%s is not of this store, and cannot be renamed: %s", path, error.strerror)
    else:
        say(f"what was in {path} is now in {aside.metrics(process).name}: another store left it")


def _is_of(path: Path, source: Mapping[str, str]) -> bool:
    """Tells whether a file is empty, or its first line says that it is of the store of ``source``."""
    try:
        with path.open("rb") as file:
            line = file.readline(_MOST_BYTES)
            first = json.loads(line) if line else {"source": source}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.get("source") == source


def _append(path: Path, data: bytes) -> None:
    """Appends a line, whole or not at all; first ends one that a full disk or a crash has cut off."""
    # Not blocking: a pipe that somebody put there is not waited for.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        if status.st_size and os.pread(descriptor, 1, status.st_size - 1) != b"\n":
            data = b"\n" + data
        written = 0
        try:
            written = os.write(descriptor, data)
        finally:
            if written != len(data):
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, status.st_size)
        if written != len(data):
            raise OSError(0, "the disk is full")
    finally:
        os.close(descriptor)
