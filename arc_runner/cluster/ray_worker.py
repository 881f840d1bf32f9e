"""One worker of a run on Ray: the model on this host's devices, fed by the driver. Does not import Ray.

It generates on a thread of its own, so that it answers the driver at any time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence

from activation_store import ActivationWriter, FinishedSequence, RetryPolicy
from activation_store.format import host_name
from activation_store.local_files import LOCK
from activation_store.remote_files import open_files
from arc_runner.cluster.figures import figures_of, leave_figures
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.ray_messages import ANSWER_SECONDS, Assignment, Order, Status
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
from arc_runner.report import Report
from arc_runner.signals import StopRequest
from qwen2_core.checkpoint_files import checkpoint_fingerprint
from qwen2_core.requests import SequenceRequest


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
        self._failure = ""
        threading.Thread(target=self._work, name="worker", daemon=True).start()

    def exchange(self, order: Order) -> Status:
        """Takes an order, and answers once there is news, within ANSWER_SECONDS."""
        with self._changed:
            room = self._feed.room
            self._feed.add(order.requests)
            self._feed.hastens = order.hastens
            self._stop.requested |= order.stops
            self._changed.notify_all()
            most = self._feed.room if order.requests else room  # what was not filled need not be told again
            self._changed.wait_for(lambda: self._has_news(most), ANSWER_SECONDS)
            return self._status()

    def _has_news(self, room: int) -> bool:
        wants = self._feed.wants_more and self._feed.room > room
        return wants or bool(self._watch.ended or self._notices) or self._watch.phase_name == "ended"
