"""Follows a run while it generates: on the screen, in its metrics, and which puzzles it has solved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self

from activation_store import ActivationWriter, FinishedSequence
from arc_runner.answer_files import answer_files, source_of
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.work import keys_of
from arc_runner.display import DISPLAY
from arc_runner.job import Job
from arc_runner.judge import Judge
from arc_runner.metrics import Metrics, make_room
from arc_runner.progress import Clock, Progress
from arc_runner.report import peak_memory
from arc_runner.waiting import Waiting


class LoopWatch(Protocol):
    """What a loop that generates tells of itself."""

    generating: Clock
    progress: Progress

    def phase(
        self, name: str, what: str | Callable[[], str] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Notes that a phase begins, in which ``what`` is waited for."""
        ...

    def generation(self) -> contextlib.AbstractContextManager[None]:
        """Counts the seconds inside as those of generation."""
        ...

    def add(self, ended: FinishedSequence) -> None:
        """Counts a sequence that has ended."""
        ...


class Watch:
    """Follows what one process makes of a job; a context manager around all of it."""

    def __init__(self, job: Job, writer: ActivationWriter, process: ProcessInfo) -> None:
        self._keys = keys_of(job.requests)
        self._writer = writer
        self._made: set[str | None] = set()
        self._judge = Judge(job, writer.committed)
        self.generating = Clock()
        self.progress = Progress(len(self._keys), self.generating, self._judge.solved)
        files, source = answer_files(job.options), source_of(job.options, job.settings)
        make_room(files, process.index, source)
        self._metrics = Metrics(files.metrics(process.index), source, self._figures)

    def __enter__(self) -> Self:
        DISPLAY.begin(self.progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        DISPLAY.end(self.progress)
        self._metrics.close("done" if self.progress.done >= self.progress.total else "stopped")
        self._judge.close()

    @contextlib.contextmanager
    def phase(self, name: str, what: str | Callable[[], str] | None = None) -> Iterator[None]:
        """Notes that a phase begins; says ``what`` is waited for inside, if anything."""
        self._metrics.begin(name)
        with contextlib.nullcontext() if what is None else Waiting(what):
            yield

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """Counts the seconds inside as those of generation."""
        with self.phase("generating"), self.generating:
            yield

    def add(self, ended: FinishedSequence) -> None:
        """Counts a sequence that has ended, and has it judged."""
        self._made.add(ended.key)
        self.progress.count_sequence(len(ended.token_ids))
        self._judge.add(ended)

    def _figures(self) -> dict[str, Any]:
        progress, solved = self.progress, self._judge.solved()
        progress.done_elsewhere = sum(
            key in self._writer.committed and key not in self._made for key in self._keys
        )
        memory, _ = peak_memory()
        now = time.monotonic()
        workers = [
            {
                "host": one.index,
                "place": one.place,
                "phase": one.phase,
                "tokens_per_second": round(one.tokens_per_second, 3),
                "slots": one.slots,
                "slots_in_use": one.slots_in_use,
                "seconds_since_heard": round(now - one.heard, 3),
            }
            for one in progress.workers
        ]
        return {
            "sequences_done": progress.done,
            "sequences_total": progress.total,
            "tokens_generated": progress.tokens,
            "generate_seconds": round(self.generating.seconds, 3),
            "tokens_per_second": round(progress.tokens_per_second, 3),
            "slots": progress.slots,
            "slots_in_use": progress.slots_in_use,
            "tasks_solved": None if solved is None else solved[0],
            "tasks_known": None if solved is None else solved[1],
            "peak_memory_bytes": memory,
            **({"workers": workers} if workers else {}),
        }
