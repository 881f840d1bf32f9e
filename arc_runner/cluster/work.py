"""What a process is to do next: all that is left where it is alone, else what it can claim."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from activation_store import ActivationWriter
from arc_runner.cluster.claims import Claims
from arc_runner.cluster.membership import Place
from arc_runner.signals import StopRequest

POLL_SECONDS = 2.0
_QUIET_SECONDS = 30.0


class Unit(NamedTuple):
    """Sequences that one process makes: those of a task whose prompts are of one width, or one call's.

    Small, so that little waits for a slow process at the end. Its name comes from its sequences alone, and
    is the same for whoever makes the plan.
    """

    keys: tuple[str, ...]
    work: Any  # how the sequences are made, for whoever does it

    @property
    def name(self) -> str:
        return hashlib.sha256("".join(self.keys).encode()).hexdigest()[:32]


class Work(Protocol):
    """Hands out units."""

    def take(self, units: Sequence[Unit], sequences: int) -> Iterator[Unit]:
        """Those of ``units`` that are this process's to make, drawn while the ones before are made.

        ``sequences`` is how many it makes at once.
        """
        ...

    def wait(self, units: Sequence[Unit]) -> bool:
        """After all of ``units`` were offered: True once there is more to take, False when that was all."""
        ...

    def progress(self) -> None:
        """The device has done something."""
        ...


def left(units: Sequence[Unit], writer: ActivationWriter) -> list[Unit]:
    """The units of which not every sequence is committed."""
    return [unit for unit in units if not all(key in writer.committed for key in unit.keys)]


class Alone:
    """Everything that is left is this process's."""

    def __init__(self, writer: ActivationWriter) -> None:
        self._writer = writer

    def take(self, units: Sequence[Unit], sequences: int) -> Iterator[Unit]:
        return iter(left(units, self._writer))

    def wait(self, units: Sequence[Unit]) -> bool:
        return False

    def progress(self) -> None:
        """Nobody waits for it."""


class Shared:
    """What nobody else has claimed: first this process's own share, then, from its end, that of the others.

    Processes that count through the same units in different orders seldom meet.
    """

    def __init__(self, writer: ActivationWriter, claims: Claims, place: Place, stop: StopRequest) -> None:
        self._writer, self._claims, self._place, self._stop = writer, claims, place, stop
        self._units: dict[str, Unit] = {}  # those held, by name

    def take(self, units: Sequence[Unit], sequences: int) -> Iterator[Unit]:
        index, count = self._place.index, self._place.count
        # What is claimed waits here while others may be idle: where little is left, no more than a fair part.
        sequences = min(sequences, -(-sum(len(unit.keys) for unit in left(units, self._writer)) // count))
        own = units[index::count]
        of_others = [unit for place, unit in enumerate(units) if place % count != index]
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
        said = time.monotonic()
        while not self._stop.requested:
            self._writer.raise_pending()
            self._refresh()
            self._let_go()
            units = left(units, self._writer)
            if not units:
                return False
            # Those that are held here are on their way to the disk.
            names = [unit.name for unit in units if unit.name not in self._units]
            holders = {self._claims.holder(name) for name in names}
            if None in holders:
                return True
            if time.monotonic() - said >= _QUIET_SECONDS:
                said = time.monotonic()
                others = ", ".join(sorted(map(str, holders)))
                print(f"{self._place}: {len(units)} units left, waiting for process {others}", flush=True)
            time.sleep(POLL_SECONDS)
        return False

    def progress(self) -> None:
        self._claims.progress()

    def _not_done(self, claimed: list[Unit]) -> Iterator[Unit]:
        """Of units just claimed those that nobody has made: their last owner committed before it let go."""
        if not claimed:
            return
        self._refresh()
        self._units |= {unit.name: unit for unit in claimed}
        self._let_go()
        yield from (unit for unit in claimed if unit.name in self._units)

    def _refresh(self) -> None:
        """Learns what the others have committed."""
        self._claims.files.patiently(self._writer.refresh)

    def _let_go(self) -> None:
        """Of what is committed."""
        for unit in list(self._units.values()):
            if not left([unit], self._writer):
                self._claims.release(unit.name)
                del self._units[unit.name]
