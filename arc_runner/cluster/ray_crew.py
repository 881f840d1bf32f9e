"""The workers of a run on Ray: one for each place of the cluster, started, heard and replaced.

A worker that is lost is replaced by one with the next host index, never with its own: nobody knows for
certain that its process has ended, and no two may write to one host folder.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from arc_runner.cluster.ray_messages import DRIVER, Assignment, Order, Status
from arc_runner.cluster.ray_places import Place, find_kind, find_places
from arc_runner.errors import ClusterError

MOST_STARTS = 5  # of workers of one place that end without having stored anything
NOBODY_SECONDS = 120.0  # without any worker, after which the run gives up
SILENT_SECONDS = 120.0  # after which a worker that does not answer is taken for lost
_CAUSE_SECONDS = 5.0  # until it is known why a worker cannot be reached
_LOOKED_SECONDS = 2.0  # between two looks at the cluster's nodes
_PAUSE_SECONDS = 1.0  # before a place's next worker; twice as long each time
_DETAIL = re.compile(r"Worker exit detail: ([^\n]*?)(?: Some common causes|\n|$)")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Member:
    """One worker, as the driver sees it."""

    index: int  # of its host folder
    place: Place
    actor: Any
    answer: Any  # to the order that it has
    heard: float  # when it was last heard of, or started
    status: Status | None = None  # the last one; None before it has started

    @property
    def name(self) -> str:
        """Returns what a person calls it."""
        return f"worker {self.index} ({self.place})"


@dataclasses.dataclass(frozen=True)
class Lost:
    """Why a worker is gone, and whether what it was making may be to blame."""

    reason: str
    blames: bool


@dataclasses.dataclass
class _Record:
    """What became of a place's workers so far."""

    failures: int = 0  # since one has stored something
    due: float = 0.0  # when the next one may be started
    reason: str = ""


class Crew:
    """Starts workers wherever there is a place for one, and gives them orders."""

    def __init__(
        self, ray: ModuleType, assignment: Assignment, most: int | None, in_use: Callable[[int], bool]
    ) -> None:
        """Starts nothing yet.

        Args:
            ray: the module, connected.
            assignment: what each worker is told.
            most: how many workers there are at most; None for as many as there are places.
            in_use: tells whether somebody may be writing to a host folder.
        """
        from arc_runner.cluster.ray_actor import WorkerActor  # imports ray

        self._ray, self._most, self._in_use = ray, most, in_use
        self._actor_class = ray.remote(WorkerActor)
        self._assignment = ray.put(assignment)
        self._kind: str | None = None
        self._places: list[Place] = []
        self._looked = self._somebody = time.monotonic()
        self._looked -= _LOOKED_SECONDS
        self._records: dict[Place, _Record] = {}
        self._next_index = DRIVER + 1
        self.members: dict[int, Member] = {}
        self.lost: set[int] = set()  # the host indices of those that have not ended by themselves

    @property
    def at_work(self) -> int:
        """Returns how many workers have been heard of."""
        return sum(one.status is not None for one in self.members.values())

    def hire(self) -> None:
        """Starts a worker at each place that has none and may have one.

        Raises:
            ClusterError: there is nobody left to wait for, or nobody has come for NOBODY_SECONDS.
        """
        now = time.monotonic()
        if now - self._looked >= _LOOKED_SECONDS:
            self._looked = now
            nodes = self._ray.nodes()
            self._kind = self._kind or find_kind(nodes)
            self._places = find_places(nodes, self._kind, self._most) if self._kind else []
        taken = {one.place for one in self.members.values()}
        for place in self._places:
            record = self._records.setdefault(place, _Record())
            if place in taken or record.failures >= MOST_STARTS or now < record.due:
                continue
            if self._most is None or len(self.members) < self._most:
                self._start(place, now)
        self._check_anybody(now)

    def _start(self, place: Place, now: float) -> None:
        while self._in_use(self._next_index):
            self._next_index += 1
        index, self._next_index = self._next_index, self._next_index + 1
        on_node = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(place.node, soft=False)
        actor = self._actor_class.options(
            scheduling_strategy=on_node, max_concurrency=2, max_restarts=0, **place.options()
        ).remote(self._assignment, index, place.amount if place.kind == "TPU" else 0)
        self.members[index] = Member(index, place, actor, actor.exchange.remote(Order()), now)

    def _check_anybody(self, now: float) -> None:
        if self.at_work:
            self._somebody = now
            return
        reasons = {record.reason for record in self._records.values() if record.failures >= MOST_STARTS}
        if (
            self._places
            and not self.members
            and all(self._records[place].failures >= MOST_STARTS for place in self._places)
        ):
            raise ClusterError(f"no worker is left: {'; '.join(sorted(reasons))}")
        if now - self._somebody >= NOBODY_SECONDS:
            why = "its CPUs, GPUs or TPUs are in use" if self._places else "it has no CPU, GPU or TPU to give"
            raise ClusterError(
                f"the cluster has started no worker for {NOBODY_SECONDS:.0f} s: {why} (`ray status`)"
            )

    def hear(self, seconds: float) -> Iterator[tuple[Member, Status | Lost]]:
        """Yields each worker that has answered or is gone, after at most so many seconds.

        One that has answered is to be given its next order; one that is gone is forgotten.
        """
        answers = {one.answer: one for one in self.members.values() if one.answer is not None}
        if not answers:
            time.sleep(seconds)
        elif self._ray.wait(list(answers), num_returns=1, timeout=seconds)[0]:
            ready, _ = self._ray.wait(list(answers), num_returns=len(answers), timeout=0)
            for answer in ready:
                yield answers[answer], self._outcome(answers[answer])
        now = time.monotonic()
        for one in list(self.members.values()):
            if one.status is not None and now - one.heard >= SILENT_SECONDS:
                yield one, self._dismiss(one, Lost(f"it has not answered for {SILENT_SECONDS:.0f} s", False))

    def _outcome(self, member: Member) -> Status | Lost:
        answer, member.answer = member.answer, None
        try:
            status: Status = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            return self._dismiss(member, self._why_gone(member, error))
        member.heard = time.monotonic()
        made = member.status.figures["sequences_made"] if member.status and member.status.figures else 0
        member.status = status
        if status.figures.get("sequences_made", 0) > made:
            self._records[member.place] = _Record()
        if status.failure:
            return self._dismiss(member, Lost(status.failure, status.blames))
        return status

    def order(self, member: Member, order: Order) -> None:
        """Gives a worker that has answered its next order."""
        member.answer = member.actor.exchange.remote(order)

    def retire(self, member: Member) -> None:
        """Ends a worker that has done what it was told."""
        self._end(member)
        self.lost.discard(member.index)

    def dismiss_all(self) -> None:
        """Ends all workers at once."""
        for one in list(self.members.values()):
            self._end(one)

    def _dismiss(self, member: Member, lost: Lost) -> Lost:
        """Ends a worker, and notes when the next one may come to its place."""
        self._end(member)
        record = self._records.setdefault(member.place, _Record())
        record.failures += 1
        record.due = time.monotonic() + _PAUSE_SECONDS * 2 ** (record.failures - 1)
        record.reason = f"{member.name}: {lost.reason}"
        return lost

    def _end(self, member: Member) -> None:
        self._ray.kill(member.actor)
        del self.members[member.index]
        self.lost.add(member.index)

    def _why_gone(self, member: Member, error: Exception) -> Lost:
        exceptions, error = self._ray.exceptions, self._cause(member, error)
        if isinstance(error, (exceptions.ActorUnavailableError, exceptions.GetTimeoutError)):
            return Lost("it cannot be reached", blames=False)
        text = str(error)
        if "node has died" in text or "node is dead" in text or not self._is_up(member.place.node):
            return Lost("its node is gone", blames=False)
        if "ModuleNotFoundError" in text:
            missing = text[text.rindex("ModuleNotFoundError") :].splitlines()[0]
            return Lost(f"{missing}; install this package and ray on all nodes", blames=False)
        detail = _DETAIL.search(text)
        reason = detail[1] if detail else text.splitlines()[-1] if text else type(error).__name__
        return Lost(" ".join(reason.split()), blames=True)

    def _cause(self, member: Member, error: Exception) -> Exception:
        """Asks a worker that cannot be reached until Ray knows what became of it, for a few seconds."""
        unavailable = self._ray.exceptions.ActorUnavailableError
        end = time.monotonic() + _CAUSE_SECONDS
        while isinstance(error, unavailable) and time.monotonic() < end:
            time.sleep(_CAUSE_SECONDS / 10)
            try:
                self._ray.get(member.actor.exchange.remote(Order()), timeout=_CAUSE_SECONDS)
            except self._ray.exceptions.RayError as later:
                error = later
            else:  # it lives, but nobody knows whether it had its last order
                break
        return error

    def _is_up(self, node: str) -> bool:
        return any(one["NodeID"] == node and one["Alive"] for one in self._ray.nodes())
