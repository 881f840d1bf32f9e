"""The actor of a run on Ray: a worker that also tells Ray's metrics how it is."""

from __future__ import annotations

import os

from ray.util.metrics import Counter, Gauge

from arc_runner.cluster.ray_messages import Assignment, Order, Status
from arc_runner.cluster.ray_worker import Worker

# How the chips of one TPU host stand to each other, by their number.
_CHIP_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
_GAUGES = {
    "qwen2_tokens_per_second": "tokens generated a second",
    "qwen2_slots": "sequences that can be generated at once",
    "qwen2_slots_in_use": "sequences being generated",
}


class WorkerActor(Worker):
    """A worker in a process of Ray's."""

    def __init__(self, assignment: Assignment, index: int, tpu_chips: int) -> None:
        """Begins to load the model; ``tpu_chips`` of this host are this worker's, 0 where it has none."""
        if tpu_chips:
            use_own_chips(tpu_chips)
        super().__init__(assignment, index)
        tags = {"host": str(index)}
        self._gauges = {name: Gauge(name, about, tag_keys=("host",)) for name, about in _GAUGES.items()}
        self._tokens = Counter("qwen2_tokens", "tokens generated", tag_keys=("host",))
        self._sequences = Counter("qwen2_sequences", "sequences generated", tag_keys=("host",))
        for metric in (*self._gauges.values(), self._tokens, self._sequences):
            metric.set_default_tags(tags)
        self._counted = 0

    def exchange(self, order: Order) -> Status:
        """Takes an order and answers it, as ``Worker.exchange``."""
        status = super().exchange(order)
        for name, gauge in self._gauges.items():
            gauge.set(getattr(status, name.removeprefix("qwen2_")))
        if status.tokens > self._counted:
            self._tokens.inc(status.tokens - self._counted)
            self._counted = status.tokens
        if status.ended:
            self._sequences.inc(len(status.ended))
        return status


def use_own_chips(count: int) -> None:
    """Lets JAX use the chips of this host alone, also where it is one of several of a slice.

    Without it each host would wait for all others of its slice. What the environment says already stays.
    """
    if count in _CHIP_BOUNDS:
        os.environ.setdefault("TPU_PROCESS_BOUNDS", "1,1,1")
        os.environ.setdefault("TPU_CHIPS_PER_PROCESS_BOUNDS", _CHIP_BOUNDS[count])
        os.environ.setdefault("TPU_VISIBLE_CHIPS", ",".join(map(str, range(count))))
