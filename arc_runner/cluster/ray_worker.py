"""One worker of a run on Ray: the model on its own devices, fed by the driver. Does not import Ray.

It generates on a thread of its own, so that it answers the driver at any time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence

from activation_store import ActivationWriter, FinishedSequence, RetryPolicy, StoreError
from arc_runner.cluster.figures import figures_of
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.ray_messages import ANSWER_SECONDS, Assignment, Order, Status, lock_of
from arc_runner.cluster.ray_queue import UNIT_SEQUENCES
from arc_runner.compilation_cache import use_compilation_cache, use_own_cache
from arc_runner.continuous_loop import make_continuously
from arc_runner.errors import UsageError
from arc_runner.failures import EXPECTED
from arc_runner.job import Job
from arc_runner.loaded_model import LoadedModel
from arc_runner.numerics import compare_numerics
from arc_runner.options import NO_CACHE
from arc_runner.preflight import choose_devices, load_config
from arc_runner.progress import Clock, Progress
from arc_runner.report import Report, peak_memory
from arc_runner.signals import StopRequest
from qwen2_core.checkpoint_files import checkpoint_fingerprint
from qwen2_core.requests import SequenceRequest
from qwen2_jax import CheckpointError

# Errors that no sequence can have caused.
_OF_SURROUNDINGS = (StoreError, UsageError, CheckpointError, OSError)


class Feed:
    """The sequences that a worker has been given and not made: the ``Work`` of its loop.

    Everything is read and changed under the lock of ``changed``, which is notified of what concerns others.
    """

    def __init__(self, widths: Collection[int], stop: StopRequest, changed: threading.Condition) -> None:
        self.widths = widths
        self.hastens = False
        self.slots = 0  # that the worker has or is going to have; 0 before the model is there
        self.is_waiting = False  # the loop has nothing to make
        self.running: set[str] = set()
        self._stop, self._changed = stop, changed
        self._coming: collections.deque[SequenceRequest] = collections.deque()

    @property
    def room(self) -> int:
        """Returns how many more sequences the worker could take: a few more than it has slots for."""
        held = len(self._coming) + len(self.running)
        return max(0, self.slots + self._ahead - held) if self.slots else 0

    @property
    def wants_more(self) -> bool:
        """Tells whether slots are about to be free and little is there for them."""
        return self.room > self._ahead // 2

    @property
    def _ahead(self) -> int:
        return max(UNIT_SEQUENCES, self.slots // 4)

    def add(self, requests: Sequence[SequenceRequest]) -> None:
        """Takes sequences to make."""
        self._coming.extend(requests)
        self.is_waiting &= not requests

    def next_width(self) -> int | None:
        with self._changed:
            self.is_waiting = True
            self._changed.wait_for(lambda: self._coming or self._stop.requested)
            self.is_waiting = False
            return None if self._stop.requested else self._coming[0].width

    def requests(self, widths: Collection[int]) -> Iterator[SequenceRequest | None]:
        while True:
            with self._changed:
                one = None
                if self._coming and self._coming[0].width in widths:
                    one = self._coming.popleft()
                    self.running.add(one.key or "")
                    self._changed.notify_all()
            yield one


class WorkerWatch:
    """Follows what a worker's loop does, for its next status: the ``LoopWatch`` of its loop."""

    def __init__(self, feed: Feed, changed: threading.Condition) -> None:
        self.generating = Clock()
        self.progress = Progress(0, self.generating, lambda: None)
        self.phase_name = "starting"
        self.ended: list[FinishedSequence] = []
        self._feed, self._changed = feed, changed

    @contextlib.contextmanager
    def phase(self, name: str, what: str | Callable[[], str] | None = None) -> Iterator[None]:
        self.phase_name = name
        yield

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        with self.phase("generating"), self.generating:
            yield

    def add(self, ended: FinishedSequence) -> None:
        with self._changed:
            self._feed.running.discard(ended.key or "")
            self.ended.append(dataclasses.replace(ended, rows=None, points={}))
            self._changed.notify_all()


class Worker:
    """Makes what it is ordered to make, and stores it in a host folder of its own."""

    def __init__(self, assignment: Assignment, index: int) -> None:
        """Begins to load the model; ``index`` is that of the host folder."""
        self._assignment, self._index = assignment, index
        self._changed = threading.Condition()
        self._stop = StopRequest()
        self._feed = Feed(assignment.widths, self._stop, self._changed)
        self._watch = WorkerWatch(self._feed, self._changed)
        self._report = Report(assignment.options.model_path, "")
        self._writer: ActivationWriter | None = None
        self._notices: list[str] = []
        self._failure, self._blames = "", False
        threading.Thread(target=self._work, name="worker", daemon=True).start()

    def exchange(self, order: Order) -> Status:
        """Takes an order, and answers once there is news, within ANSWER_SECONDS."""
        with self._changed:
            had_room = 0 if order.requests else self._feed.room  # what stayed empty need not be told again
            self._feed.add(order.requests)
            self._feed.hastens = order.hastens
            self._stop.requested |= order.stops
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_news(had_room), ANSWER_SECONDS)
            return self._status()

    def _has_news(self, had_room: int) -> bool:
        wants = self._feed.wants_more and self._feed.room > had_room
        return wants or bool(self._watch.ended or self._notices) or self._watch.phase_name == "ended"

    def _status(self) -> Status:
        watch, report, writer = self._watch, self._report, self._writer
        progress = watch.progress
        if writer is not None:
            report.bytes_stored, report.tokens_generated = writer.bytes_written, writer.tokens_written
        report.peak_memory_bytes, report.peak_memory_of = peak_memory() if report.device else (0, "")
        report.stamp()
        ended, watch.ended = watch.ended, []
        notices, self._notices = self._notices, []
        is_idle = self._feed.is_waiting and watch.phase_name == "generating"
        return Status(
            phase="waiting" if is_idle else watch.phase_name,
            room=self._feed.room,
            ended=ended,
            notices=notices,
            failure=self._failure,
            blames=self._blames,
            tokens=progress.tokens,
            tokens_per_second=progress.tokens_per_second,
            slots=progress.slots or self._feed.slots,
            slots_in_use=0 if is_idle else progress.slots_in_use,
            figures=figures_of(report, self._index, 0 if writer is None else writer.sequences_written),
        )

    def _work(self) -> None:
        """Loads, generates and stores, until the driver says stop or something fails."""
        failure, blames = "", False
        try:
            self._generate()
        except Exception as error:  # the driver tells it in a sentence, Ray's log has all of it
            traceback.print_exc()
            reason = " ".join(str(error).split())
            failure = (
                reason if isinstance(error, EXPECTED) and reason else f"{type(error).__name__}: {reason}"
            )
            blames = not isinstance(error, _OF_SURROUNDINGS)
        with self._changed:
            self._failure, self._blames, self._watch.phase_name = failure, blames, "ended"
            self._changed.notify_all()

    def _generate(self) -> None:
        given, watch = self._assignment, self._watch
        process = ProcessInfo(self._index, self._index + 1)
        patiently = RetryPolicy(
            given.options.activations_dir, f"worker {self._index}", lambda: self._stop.requested
        )
        with watch.phase("loading"):
            job, self._report.device = _prepare(given)
            with job.open_writer(process, patiently) as writer:
                self._writer = writer
                self._tell(compare_numerics(job.numerics or {}, writer.earlier_numerics))
                loading = Clock()
                with loading:
                    model = LoadedModel.load(job)
                self._report.load_seconds = loading.seconds
                with self._changed:
                    self._feed.slots = job.options.batch_size * job.layout.data_parallel
                    self._changed.notify_all()
                watch.phase_name = "generating"
                make_continuously(model, writer, self._report, self._stop, watch, self._feed)

    def _tell(self, sentence: str) -> None:
        if sentence:
            with self._changed:
                self._notices.append(sentence)
                self._changed.notify_all()


def _prepare(given: Assignment) -> tuple[Job, str]:
    """Returns the job as this machine sees it, without its sequences, and the name of the devices.

    Raises:
        UsageError, CheckpointError: the machine does not see the store or the model that the driver sees.
    """
    options = given.options
    if lock_of(options.activations_dir) != given.lock:
        raise UsageError(
            f"--activations_dir {options.activations_dir} is not the driver's directory here: name one that "
            "all machines share, or a URL"
        )
    if options.compilation_cache_dir is None:
        use_own_cache()
    elif options.compilation_cache_dir != NO_CACHE:
        use_compilation_cache(options.compilation_cache_dir)
    config = load_config(options)
    layout, devices = choose_devices(options, config)
    fingerprint = checkpoint_fingerprint(options.model_path, revision=options.revision)
    if fingerprint != given.settings.model_fingerprint:
        raise UsageError(f"--model_path {options.model_path} has other weights here than where the driver is")
    about_tasks = ((), (), (), None)  # these are the driver's
    job = Job(options, config, layout, *about_tasks, given.eos, given.settings, (), given.interventions)
    return job, devices
