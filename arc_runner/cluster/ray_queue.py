"""The queue of a run on Ray: which worker makes which sequences. Knows neither Ray nor the store.

Workers draw small units, more as they have room, so that a slow one draws less. Near the end each draws a
fair part of what is left, and then, with nothing of its own to do, a copy of what another has held for
unusually long: the store keeps whichever comes first. What a lost worker had not committed is handed out
again. A unit whose worker has failed MOST_FAILURES times is given up. The last of these times it is made
alone, so that it is not given up for its neighbours' faults.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import statistics
from collections.abc import Collection, Mapping, Sequence

from qwen2_core.requests import SequenceRequest

UNIT_SEQUENCES = 8  # at most
MOST_FAILURES = 3
_COPIED_AFTER = 1.5  # times the usual seconds of a unit
_REMEMBERED = 101  # units whose seconds are the usual ones


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """Sequences that one worker makes together; all have keys."""

    requests: tuple[SequenceRequest, ...]

    @property
    def keys(self) -> list[str]:
        """Returns the sequences' keys in the store."""
        return [request.key for request in self.requests if request.key is not None]


def make_units(requests: Sequence[SequenceRequest]) -> list[Unit]:
    """Groups requests, in the order in which they are to be made, by width and task, in small units."""
    units: list[Unit] = []
    for _, group in itertools.groupby(requests, lambda one: (one.width, one.id.task_id)):
        members = tuple(group)
        units += [Unit(members[i : i + UNIT_SEQUENCES]) for i in range(0, len(members), UNIT_SEQUENCES)]
    return units


@dataclasses.dataclass
class _Hold:
    """What a worker has drawn of one unit."""

    since: float
    left: set[str]  # keys of what has not ended
    is_copy: bool


class WorkQueue:
    """Hands out units to workers, which have numbers. Times are seconds of any one clock."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        self._unit_of = {key: number for number, unit in enumerate(units) for key in unit.keys}
        self._left = {number: set(unit.keys) for number, unit in enumerate(units)}  # not committed, by unit
        self._waiting = list(range(len(units)))  # a heap, the first ones first; some may be done by now
        self._waits = set(self._waiting)
        self._sequences_waiting = len(self._unit_of)
        self._suspects: collections.deque[int] = collections.deque()  # to be made alone
        self._holds: dict[int, dict[int, _Hold]] = {}  # by worker and unit
        self._alone: dict[int, int] = {}  # by worker: the unit that it makes alone
        self._failures: collections.Counter[int] = collections.Counter()
        self._seconds: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._given_up: dict[int, str] = {}

    @property
    def is_done(self) -> bool:
        """Tells whether every unit is committed or given up."""
        return not self._left

    @property
    def runs_dry(self) -> bool:
        """Tells whether all that is left is held by workers."""
        return not self._waits and not self._suspects

    @property
    def given_up(self) -> Mapping[str, str]:
        """Returns why each sequence that was given up was so, by key."""
        return {key: reason for number, reason in self._given_up.items() for key in self._units[number].keys}

    def held_keys(self) -> set[str]:
        """Returns the keys of all sequences that are drawn and not committed."""
        held = {number for holds in self._holds.values() for number in holds}
        return set().union(*(self._left[number] for number in held))

    def units_of(self, worker: int) -> int:
        """Returns how many units a worker holds."""
        return len(self._holds.get(worker, {}))

    def draw(self, worker: int, room: int, workers: int, now: float) -> list[SequenceRequest]:
        """Returns what a worker is to make next: about ``room`` sequences, none if there is nothing for it.

        ``workers`` is how many share what is left, at least one.
        """
        if room <= 0 or worker in self._alone:
            return []
        holds = self._holds.setdefault(worker, {})
        is_idle = not self._unended(worker)
        numbers = self._next(min(room, self._fair_part(worker, room, workers)))
        is_copy = False
        if is_idle and not numbers and self._suspects:
            numbers = [self._suspects.popleft()]
            self._alone[worker] = numbers[0]
        elif is_idle and not numbers:
            numbers, is_copy = self._slowest(worker, room, now), True
        for number in numbers:
            holds[number] = _Hold(now, set(self._left[number]), is_copy)
        drawn = [(self._units[number], self._left[number]) for number in numbers]
        return [request for unit, left in drawn for request in unit.requests if request.key in left]

    def _unended(self, worker: int) -> int:
        """Returns how many sequences a worker has drawn that have not ended."""
        return sum(len(hold.left) for hold in self._holds[worker].values())

    def _fair_part(self, worker: int, room: int, workers: int) -> int:
        """Returns how many sequences a worker may draw so that it has no more to make than the others."""
        if self._sequences_waiting > 2 * room * workers:
            return room
        to_make = self._sequences_waiting + sum(map(self._unended, self._holds))
        return -(-to_make // workers) - self._unended(worker)

    def _next(self, sequences: int) -> list[int]:
        """Takes units that wait, of at least so many sequences if there are as many."""
        taken: list[int] = []
        while self._waiting and sequences > 0:
            number = heapq.heappop(self._waiting)
            if number in self._waits:
                self._waits.remove(number)
                self._sequences_waiting -= len(self._left[number])
                sequences -= len(self._left[number])
                taken.append(number)
        return taken

    def _slowest(self, worker: int, room: int, now: float) -> list[int]:
        """Returns units that one other worker has held for unusually long, the oldest first."""
        if not self._seconds:
            return []
        before = now - _COPIED_AFTER * statistics.median(self._seconds)
        of_holders: dict[int, list[tuple[int, _Hold]]] = {}
        for holder, holds in self._holds.items():
            for number, hold in holds.items():
                of_holders.setdefault(number, []).append((holder, hold))
        late = [
            (hold.since, number)
            for number, ((holder, hold), *copies) in of_holders.items()
            if not copies and holder != worker and number not in self._alone.values()
            if hold.left and hold.since < before
        ]
        taken: list[int] = []
        for _, number in sorted(late):
            if room <= 0:
                break
            room -= len(self._left[number])
            taken.append(number)
        return taken

    def ended(self, worker: int, key: str, now: float) -> None:
        """Notes that a worker has made a sequence, which is on its way to the store."""
        number = self._unit_of[key]
        hold = self._holds.get(worker, {}).get(number)
        if hold is None or key not in hold.left:
            return
        hold.left.remove(key)
        if not hold.left:
            if not hold.is_copy:
                self._seconds.append(now - hold.since)
            if self._alone.get(worker) == number:
                del self._alone[worker]

    def committed(self, keys: Collection[str]) -> None:
        """Notes that the store has sequences."""
        for key in keys:
            number = self._unit_of.get(key)
            if number is None or key not in self._left.get(number, ()):
                continue
            self._left[number].remove(key)
            self._sequences_waiting -= number in self._waits
            if not self._left[number]:
                self._remove(number)

    def lost(self, worker: int, reason: str | None = None) -> None:
        """Takes back what a worker had not committed: it is gone.

        ``reason`` says why, if what it was making may have caused that.
        """
        self._alone.pop(worker, None)
        for number, hold in self._holds.pop(worker, {}).items():
            self._put_back(number, reason if hold.left else None)

    def _put_back(self, number: int, reason: str | None) -> None:
        """Hands out a unit again, or gives it up; a ``reason`` is one of its own failures."""
        if number not in self._left:
            return
        if reason is not None:
            self._failures[number] += 1
            if self._failures[number] >= MOST_FAILURES:
                self._given_up[number] = reason
                self._remove(number)
                return
        if any(number in holds for holds in self._holds.values()):
            return
        if self._failures[number] == MOST_FAILURES - 1:
            self._suspects.append(number)
        else:
            heapq.heappush(self._waiting, number)
            self._waits.add(number)
            self._sequences_waiting += len(self._left[number])

    def _remove(self, number: int) -> None:
        """Forgets a unit: it is committed or given up."""
        left = self._left.pop(number)
        self._sequences_waiting -= len(left) if number in self._waits else 0
        self._waits.discard(number)
        if number in self._suspects:
            self._suspects.remove(number)
        for worker, holds in self._holds.items():
            holds.pop(number, None)
            if self._alone.get(worker) == number:
                del self._alone[worker]
