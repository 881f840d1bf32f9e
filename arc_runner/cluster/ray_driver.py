"""The driver of a run on Ray: hands out work to the workers until the store has all of it (``--ray``)."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from activation_store import ActivationWriter, RetryPolicy
from activation_store.remote_files import open_files
from arc_puzzles import TaskFailure
from arc_runner.answer_files import local_store
from arc_runner.cluster.figures import merge_figures
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.ray_commits import Commits
from arc_runner.cluster.ray_connection import connected
from arc_runner.cluster.ray_crew import Crew, Lost, Member
from arc_runner.cluster.ray_messages import DRIVER, Assignment, Order, Status, lock_of
from arc_runner.cluster.ray_queue import MOST_FAILURES, WorkQueue, make_units
from arc_runner.console import say
from arc_runner.finish import answer
from arc_runner.job import Job, open_store, prepare
from arc_runner.options import NO_CACHE, RunOptions
from arc_runner.progress import WorkerLine
from arc_runner.report import Report
from arc_runner.signals import StopRequest
from arc_runner.waiting import Waiting
from arc_runner.watch import Watch
from qwen2_core.requests import SequenceRequest

STOP_SECONDS = 15.0  # for the workers to store what has ended
_DONE_SECONDS = 2.0  # for their last figures, once the store has all
_HEARD_SECONDS = 0.2


def run_on_ray(options: RunOptions, stop: StopRequest) -> int:
    """Does the main job on the workers of a Ray cluster; returns the exit code, as ``run``.

    Raises:
        UsageError, ArcFormatError, CheckpointError, StoreError: as soon as it is known, each a sentence.
        ClusterError: the cluster cannot be reached, or has no worker.
    """
    jax.config.update("jax_platforms", "cpu")  # a worker on this machine needs its accelerators
    job, report = prepare(options)
    patiently = RetryPolicy(options.activations_dir, "the driver", lambda: stop.requested)
    process = ProcessInfo(DRIVER)
    with open_store(job, job, report, process, patiently) as writer:
        if job.left(writer.committed):
            with connected(options.ray or "") as ray, Watch(job, writer, process) as watch:
                job = _generate(ray, job, writer, report, stop, watch, patiently)
    return answer(job, report, writer.committed, patiently)


def _generate(
    ray: ModuleType,
    job: Job,
    writer: ActivationWriter,
    report: Report,
    stop: StopRequest,
    watch: Watch,
    patiently: RetryPolicy,
) -> Job:
    """Makes what is left of a job, and fills in the report; returns the job without what was given up."""
    options = job.options
    files = open_files(options.activations_dir)
    left = [request for request in job.requests if request.key not in writer.committed]
    queue = WorkQueue(make_units(sorted(left, key=lambda request: request.width)))
    crew = Crew(
        ray,
        assign(job, {request.width for request in left}),
        options.ray_workers,
        in_use=lambda host: files.excludes_others and files.in_use(host),
    )
    driver = Driver(queue, crew, stop, watch)
    # A policy of its own: in the end it gives up, and the others must not.
    looking = RetryPolicy(options.activations_dir, "the driver", lambda: stop.requested)
    with Commits(writer, looking) as commits, stop.deferred():
        try:
            driver.run(commits)
        finally:
            crew.dismiss_all()
    with Waiting("looking for what is stored"):
        patiently(writer.refresh)
    figures, resumed = driver.figures(), report.sequences_resumed
    merge_figures(report, figures)
    report.sequences_resumed, report.generate_seconds = resumed, watch.generating.seconds
    report.device = ", ".join(["Ray", *sorted({one["device"] for one in figures})])
    return without(job, queue.given_up, writer.committed)


class Driver:
    """The loop that gives the workers of a crew what is left in a queue."""

    def __init__(self, queue: WorkQueue, crew: Crew, stop: StopRequest, watch: Watch) -> None:
        self._queue, self._crew, self._stop, self._watch = queue, crew, stop, watch
        self._statuses: dict[int, Status] = {}  # the last one of each worker, also of those that are gone
        self._ended: set[str | None] = set()
        self._said: set[str] = set()
        self._clock = contextlib.ExitStack()  # of the generation, once it has begun
        self._beginning = Waiting(self._describe)

    def run(self, commits: Commits) -> None:
        """Works until the queue is done or a stop is requested, and lets the workers end.

        Raises:
            ClusterError: no worker is left, or none comes.
            StoreError: the store cannot be read.
        """
        with self._beginning, self._clock:
            while not self._queue.is_done and not self._stop.requested:
                self._crew.hire()
                self._step(commits)
            end = time.monotonic() + (_DONE_SECONDS if self._queue.is_done else STOP_SECONDS)
            with self._watch.phase("storing", "waiting for the workers to store what has ended"):
                while self._crew.at_work and time.monotonic() < end:
                    self._step(commits)

    def figures(self) -> list[dict[str, Any]]:
        """Returns the figures of every worker that there was and that has stored something."""
        figures = [dict(status.figures) for _, status in sorted(self._statuses.items())]
        return [one for one in figures if one["sequences_made"]]

    def _step(self, commits: Commits) -> None:
        """Hears the workers that have something to say, and looks at what the store has."""
        for member, heard in self._crew.hear(_HEARD_SECONDS):
            if isinstance(heard, Lost):
                self._lose(member, heard)
            else:
                self._take(member, heard, commits)
        self._queue.committed(commits.take())
        self._show()

    def _take(self, member: Member, status: Status, commits: Commits) -> None:
        """Notes what a worker has done, and gives it its next order."""
        now, before = time.monotonic(), self._statuses.get(member.index)
        self._statuses[member.index] = status
        for one in status.ended:
            self._queue.ended(member.index, one.key or "", now)
            if one.key not in self._ended:
                self._ended.add(one.key)
                self._watch.add(one)
        for notice in status.notices:
            if notice not in self._said:
                self._said.add(notice)
                say(notice)
        if before is None or status.figures["sequences_made"] > before.figures["sequences_made"]:
            commits.ask(self._queue.held_keys())
        if status.phase == "ended":
            self._crew.retire(member)
            self._queue.lost(member.index)
            return
        ends = self._stop.requested or self._queue.is_done
        drawn = [] if ends else self._queue.draw(member.index, status.room, self._crew.at_work, now)
        self._crew.order(member, Order(drawn, hastens=self._queue.runs_dry, stops=ends))

    def _lose(self, member: Member, lost: Lost) -> None:
        """Takes back what a worker had that is gone."""
        if member.status is not None:
            self._statuses[member.index] = member.status
        units = self._queue.units_of(member.index)
        self._queue.lost(member.index, lost.reason if lost.blames else None)
        back = f"; {units} units of work go back to the queue" if units else ""
        say(f"{member.name} is gone: {lost.reason}{back}")

    def _show(self) -> None:
        """Brings what is shown of the run up to date."""
        progress, members = self._watch.progress, self._crew.members.values()
        there = [(one, one.status) for one in members if one.status is not None]
        progress.tokens = sum(status.tokens for status in self._statuses.values())
        progress.slots = sum(status.slots for _, status in there)
        progress.slots_in_use = sum(status.slots_in_use for _, status in there)
        progress.workers = [
            WorkerLine(
                one.index,
                str(one.place),
                "starting" if one.status is None else one.status.phase,
                *(
                    (0.0, 0, 0)
                    if one.status is None
                    else (one.status.tokens_per_second, one.status.slots_in_use, one.status.slots)
                ),
                one.heard,
            )
            for one in members
        ]
        if (progress.tokens or self._ended) and not self._watch.generating.seconds:
            self._beginning.end()
            self._clock.enter_context(self._watch.generation())

    def _describe(self) -> str:
        """Says how far the workers are that have not begun to generate."""
        phases = collections.Counter(one.phase for one in self._watch.progress.workers)
        count = ", ".join(f"{number} {phase}" for phase, number in phases.items())
        return f"waiting for the workers ({count or 'none yet'})"


def without(job: Job, given_up: Mapping[str, str], committed: Container[str]) -> Job:
    """Returns a job without sequences that were given up, by key and reason; their tasks count as failed."""
    reasons: dict[str, list[str]] = {}
    kept: list[SequenceRequest] = []
    for request in job.requests:
        key = request.key or ""
        if key in given_up and key not in committed:
            reasons.setdefault(request.id.task_id, []).append(given_up[key])
        else:
            kept.append(request)
    failures = tuple(
        TaskFailure(task_id, f"{len(of_task)} sequences failed {MOST_FAILURES} times: {of_task[0]}")
        for task_id, of_task in reasons.items()
    )
    return dataclasses.replace(job, requests=kept, failures=(*job.failures, *failures))


def assign(job: Job, widths: Collection[int]) -> Assignment:
    """Returns what each worker of a job is told, whose prompts are of some widths. The store is open."""
    options = job.options
    return Assignment(
        options=_for_workers(options),
        settings=job.settings,
        eos=job.eos,
        interventions=job.interventions,
        widths=tuple(sorted(widths)),
        lock=lock_of(options.activations_dir),
    )


def _for_workers(options: RunOptions) -> RunOptions:
    """Returns the options of a worker, which has another current directory and is no driver."""
    changes: dict[str, Any] = {"ray": None, "ray_workers": None}
    if local_store(options) is not None:
        changes["activations_dir"] = str(Path(options.activations_dir.removeprefix("file://")).absolute())
    if Path(options.model_path).exists():
        changes["model_path"] = str(Path(options.model_path).absolute())
    if options.compilation_cache_dir not in (None, NO_CACHE):
        changes["compilation_cache_dir"] = str(Path(options.compilation_cache_dir).absolute())
    return dataclasses.replace(options, **changes)
