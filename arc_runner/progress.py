"""What goes on in a run: its activities, and how far it is while it generates; clocks for its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


@dataclasses.dataclass
class Clock:
    """Adds up the wall-clock seconds spent within ``with clock:``, those that still run too."""

    _before: float = 0.0
    _started: float | None = None

    @property
    def seconds(self) -> float:
        """Returns the seconds so far."""
        started = self._started  # another thread may stop the clock meanwhile
        return self._before + (0.0 if started is None else time.perf_counter() - started)

    def __enter__(self) -> Clock:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._before, self._started = self.seconds, None


@dataclasses.dataclass(eq=False)
class Activity:
    """Holds something that takes a while: what it is by now, and since when."""

    what: Callable[[], str]
    begun: float = dataclasses.field(default_factory=time.monotonic)
    lines_said: int = 0


class WorkerLine(NamedTuple):
    """What is shown of one of several workers."""

    index: int
    place: str
    phase: str
    tokens_per_second: float
    slots_in_use: int
    slots: int
    heard: float  # when it was last heard of, as time.monotonic()

    def __str__(self) -> str:
        silent = shown_seconds(time.monotonic() - self.heard)
        return (
            f"worker {self.index} ({self.place}): {self.phase}, {self.tokens_per_second:.1f} tokens/s, "
            f"{self.slots_in_use} of {self.slots} slots, heard {silent} ago"
        )


@dataclasses.dataclass(eq=False)
class Progress:
    """Counts what a run makes. Only adds numbers: the loop that generates calls it, others read it.

    ``done`` counts sequences: those made here, and those that earlier runs and other processes have made.
    ``tokens`` counts those made here, also of sequences that have not ended. ``generating`` is the time of
    generation alone, without compiling. ``solved`` returns how many tasks are solved and of how many that is
    known; None where it is of none. ``workers`` are those of a run on Ray.
    """

    total: int
    generating: Clock
    solved: Callable[[], tuple[int, int] | None]
    done_elsewhere: int = 0
    made: int = 0
    tokens: int = 0
    slots: int = 0
    slots_in_use: int = 0
    workers: Sequence[WorkerLine] = ()
    _tokens_of_made: int = 0

    def count_steps(self, tokens: int, slots: int, slots_in_use: int) -> None:
        """Counts the tokens of some steps, and notes how many slots had a sequence in them."""
        self.tokens += tokens
        self.slots, self.slots_in_use = slots, slots_in_use

    def count_sequence(self, tokens: int) -> None:
        """Counts a sequence that has ended, of so many tokens."""
        self.made += 1
        self._tokens_of_made += tokens

    @property
    def done(self) -> int:
        """Returns how many sequences have ended."""
        return self.done_elsewhere + self.made

    @property
    def tokens_per_second(self) -> float:
        """Returns the speed of generation so far; 0 before it begins."""
        seconds = self.generating.seconds
        return self.tokens / seconds if seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimates the seconds left, as if the others got as long as those made here; None without any."""
        if not self.made or not self.tokens:
            return None
        to_come = (self.total - self.done) * self._tokens_of_made / self.made
        begun = self.tokens - self._tokens_of_made
        return max(0.0, to_come - begun) / self.tokens_per_second

    def facts(self) -> list[str]:
        """Returns for a person what is known while it generates: speed, slots, tasks solved, time left."""
        solved, left = self.solved(), self.seconds_left
        found = [f"{self.tokens_per_second:.1f} tokens/s"]
        if self.slots:
            found.append(f"{self.slots_in_use} of {self.slots} slots")
        if solved is not None:
            found.append(f"{solved[0]} of {solved[1]} tasks solved")
        if left is not None:
            found.append(f"{shown_seconds(left)} left")
        return found


def shown_seconds(seconds: float) -> str:
    """Returns a duration for a person: ``4 s``, ``1:05``, ``2:00:07``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
