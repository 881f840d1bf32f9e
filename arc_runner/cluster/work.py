"""Hands out the units that this process is to make: all if it is alone, else those it claims."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from activation_store import ActivationWriter
from arc_runner.cluster.claims import Claims
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.console import say
from arc_runner.signals import StopRequest
from qwen2_core.requests import SequenceRequest

POLL_SECONDS = 2.0
_FIRST_SECONDS, _QUIET_SECONDS = 2.0, 30.0  # until it says what it waits for, and between two lines then


class Unit(NamedTuple):
    """Holds sequences that one process makes together: those of one task and one width, or of one call.

    Units are small, so that little waits for a slow process at the end. The name follows from the sequences
    alone, so that all processes know a unit by the same name.
    """

    keys: tuple[str, ...]
    work: Any  # what the loop needs to make the sequences

    @property
    def name(self) -> str:
        return hashlib.sha256("".join(self.keys).encode()).hexdigest()[:32]


def keys_of(requests: Sequence[SequenceRequest]) -> tuple[str, ...]:
    """Returns the requests' keys in the store, which name a unit."""
    return tuple(request.key for request in requests if request.key is not None)


class Work(Protocol):
    """Hands out units to the loops that make them."""

    def take(self, units: Sequence[Unit], sequences: int) -> Iterator[Unit]:
        """Yields those of ``units`` that this process is to make, while the ones before are being made.

        ``sequences`` is how many the process makes at once.
        """
        ...

    def wait(self, units: Sequence[Unit]) -> bool:
        """Waits, after all of ``units`` were offered; returns True if there is more to take, else False."""
        ...

    def progress(self) -> None:
        """Notes that the device has done something."""
        ...


def left(units: Sequence[Unit], writer: ActivationWriter) -> list[Unit]:
    """Returns the units that have a sequence which is not committed."""
    return [unit for unit in units if not all(key in writer.committed for key in unit.keys)]


class Alone:
    """Hands out everything that is left: this process is alone."""

    def __init__(self, writer: ActivationWriter) -> None:
        self._writer = writer

    def take(self, units: Sequence[Unit], sequences: int) -> Iterator[Unit]:
        return iter(left(units, self._writer))

    def wait(self, units: Sequence[Unit]) -> bool:
        return False

    def progress(self) -> None:
        """Does nothing: no other process waits for this one."""


class Shared:
    """Hands out what it can claim: first this process's own share, then the others', from the last unit on.

    So the processes go through the units in different orders, and seldom meet.
    """

    def __init__(
        self, writer: ActivationWriter, claims: Claims, process: ProcessInfo, stop: StopRequest
    ) -> None:
        self._writer, self._claims, self._process, self._stop = writer, claims, process, stop
        self._units: dict[str, Unit] = {}  # those held, by name

    def take(self, units: Sequence[Unit], sequences: int) -> Iterator[Unit]:
        index, count = self._process.index, self._process.count
        # Near the end claim only a fair part of what is left, so that no process waits for this one's claims.
        sequences = min(sequences, -(-sum(len(unit.keys) for unit in left(units, self._writer)) // count))
        own = units[index::count]
        of_others = [unit for number, unit in enumerate(units) if number % count != index]
        claimed: list[Unit] = []
        for unit in itertools.chain(own, reversed(of_others)):
            if not left([unit], self._writer) or not self._claims.acquire(unit.name):
                continue
            claimed.append(unit)
            if sum(len(one.keys) for one in claimed) >= sequences:
                yield from self._not_done(claimed)
                claimed = []
        yield from self._not_done(claimed)

    def wait(self, units: Sequence[Unit]) -> bool:
        due = time.monotonic() + _FIRST_SECONDS
        while not self._stop.requested:
            self._writer.raise_pending()
            self._refresh()
            self._release_done()
            units = left(units, self._writer)
            if not units:
                return False
            # Units held by this process are on their way to the disk.
            names = [unit.name for unit in units if unit.name not in self._units]
            holders = {self._claims.holder(name) for name in names}
            if None in holders:
                return True
            if time.monotonic() >= due:
                due = time.monotonic() + _QUIET_SECONDS
                others = ", ".join(sorted(map(str, holders)))
                whom = f"process {others}" if others else "its own last shards"
                say(f"{self._process}: {len(units)} units left, waiting for {whom}")
            time.sleep(POLL_SECONDS)
        return False

    def progress(self) -> None:
        self._claims.progress()

    def _not_done(self, claimed: list[Unit]) -> Iterator[Unit]:
        """Yields those of the units just claimed that no process has made before; releases the others."""
        if not claimed:
            return
        self._refresh()  # their last owner committed before it released them
        self._units |= {unit.name: unit for unit in claimed}
        self._release_done()
        yield from (unit for unit in claimed if unit.name in self._units)

    def _refresh(self) -> None:
        """Reads what the others have committed."""
        self._claims.files.patiently(self._writer.refresh)

    def _release_done(self) -> None:
        """Releases the units held that are committed."""
        for unit in list(self._units.values()):
            if not left([unit], self._writer):
                self._claims.release(unit.name)
                del self._units[unit.name]
