"""A run on Ray with a sleep in the place of the generation: what the driver costs, and how long the tail is.

    python benchmarks/simulate_ray.py [--units 100000 --workers 32 --processes 4 --slow 1 --scale 25]

The queue, the messages and the orders are those of a run; the answers have the lengths of real ARC answers,
eight to a unit. Each worker is a thread beside others in ``--processes`` actors of a local Ray cluster: 32
processes are too many for a small machine. Workers sleep ``scale`` times shorter than they would generate, so
the driver is that much busier than it would be. ``--slow`` workers are ten times slower. What ends is
committed at once, without a store.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

from arc_runner.cluster.ray_messages import ANSWER_SECONDS, Order
from arc_runner.cluster.ray_queue import UNIT_SEQUENCES, Unit, WorkQueue
from qwen2_core.requests import SequenceRequest

# Tokens of an answer grid over the public ARC tasks: quantiles, and the lengths there.
QUANTILES = ((0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0), (2, 12, 42, 110, 272, 728, 930, 930))
SLOTS, TOKENS_PER_SECOND = 64, 30.0  # of a worker, and of each of its slots
SLOW = 10.0


class SleepingWorker:
    """Makes sequences in slots as a worker does, by waiting for their time to pass."""

    def __init__(self, speed: float) -> None:
        self._speed = speed  # tokens a second of each slot
        self._changed = threading.Condition()
        self._waiting: list[SequenceRequest] = []
        self._slots: list[tuple[float, SequenceRequest]] = []
        self._ended: list[str] = []
        self._stops = False
        self.busy = 0.0  # seconds times slots
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def _room(self) -> int:
        return SLOTS + SLOTS // 4 - len(self._waiting) - len(self._slots)

    def exchange(self, order: Order) -> tuple[int, list[str], float]:
        """Answers an order with the room there is, what has ended, and how long the slots were in use."""
        with self._changed:
            had_room = 0 if order.requests else self._room
            self._waiting += order.requests
            self._stops |= order.stops
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._room > max(SLOTS // 8, had_room), ANSWER_SECONDS)
            ended, self._ended = self._ended, []
            return self._room, ended, self.busy

    def _run(self) -> None:
        while not self._stops:
            with self._changed:
                now = time.monotonic()
                over = [one for end, one in self._slots if end <= now]
                self._slots = [(end, one) for end, one in self._slots if end > now]
                self._ended += [one.key or "" for one in over]
                while self._waiting and len(self._slots) < SLOTS:
                    one = self._waiting.pop(0)
                    seconds = one.max_tokens / self._speed
                    self.busy += seconds
                    self._slots.append((now + seconds, one))
                self._changed.notify_all()
                next_end = min((end for end, _ in self._slots), default=now + 0.05)
                self._changed.wait(max(0.002, next_end - now))


class Process:
    """Several workers in one process."""

    def __init__(self, speeds: list[float]) -> None:
        self._workers = [SleepingWorker(speed) for speed in speeds]

    def exchange(self, number: int, order: Order) -> tuple[int, list[str], float]:
        return self._workers[number].exchange(order)


def make_units(units: int, seed: int) -> list[Unit]:
    rng = np.random.default_rng(seed)
    lengths = np.interp(rng.random((units, UNIT_SEQUENCES)), *QUANTILES).astype(int)
    prompt = np.zeros(1, np.int32)
    return [
        Unit(
            tuple(
                SequenceRequest(
                    prompt, int(tokens), i, SimpleNamespace(), f"{number * UNIT_SEQUENCES + i:032x}"
                )
                for i, tokens in enumerate(of_unit)
            )
        )
        for number, of_unit in enumerate(lengths)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--slow", type=int, default=0, help="workers that are ten times slower")
    parser.add_argument("--scale", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ray.init(num_cpus=options.processes, include_dashboard=False, log_to_driver=False)
    simulate(options)
    ray.shutdown()


def simulate(options: argparse.Namespace) -> None:
    units = make_units(options.units, options.seed)
    tokens = sum(request.max_tokens for unit in units for request in unit.requests)
    speed = TOKENS_PER_SECOND * options.scale
    speeds = [speed / SLOW if number < options.slow else speed for number in range(options.workers)]
    process = ray.remote(Process).options(max_concurrency=64)
    processes: list[Any] = [
        process.remote(speeds[number :: options.processes]) for number in range(options.processes)
    ]
    before = resource.getrusage(resource.RUSAGE_SELF)
    queue = WorkQueue(units)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss

    def order(worker: int, given: Order) -> Any:
        number, of_process = divmod(worker, options.processes)
        return processes[of_process].exchange.remote(number, given)

    answers = {order(worker, Order()): worker for worker in range(options.workers)}
    ray.wait(list(answers), num_returns=len(answers))
    began, used, exchanges, drawing, ran_dry = time.monotonic(), time.process_time(), 0, 0.0, 0.0
    busy = [0.0] * options.workers
    while not queue.is_done:
        ray.wait(list(answers), num_returns=1, timeout=0.2)
        ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=0)
        for answer in ready:
            worker = answers.pop(answer)
            room, ended, busy[worker] = ray.get(answer)
            started = time.perf_counter()
            now = time.monotonic()
            for key in ended:
                queue.ended(worker, key, now)
            queue.committed(ended)
            drawn = queue.draw(worker, room, options.workers, now)
            drawing += time.perf_counter() - started
            if queue.runs_dry and not ran_dry:
                ran_dry = now
            answers[order(worker, Order(drawn, hastens=queue.runs_dry))] = worker
            exchanges += 1
    seconds, used = time.monotonic() - began, time.process_time() - used
    ideal = tokens / (SLOTS * sum(speeds))
    copied = sum(busy[i] * speeds[i] for i in range(options.workers)) / tokens - 1
    print(
        f"{options.workers} workers ({options.slow} slow) in {options.processes} processes, {len(units)} "
        f"units of {tokens / len(units):.0f} tokens, x{options.scale:g}"
    )
    print(f"  whole run            {seconds:.1f} s; {ideal:.1f} s if all slots were always in use")
    print(f"  tail                 {began + seconds - ran_dry:.2f} s from the last draw (x{options.scale:g})")
    print(f"  made twice           {copied:.2%} of all tokens")
    print(f"  driver               {used / len(units) * 1e3:.3f} ms of CPU a unit, {exchanges} exchanges")
    print(f"  of it in the queue   {drawing / len(units) * 1e3:.3f} ms a unit")
    print(f"  busy                 {used / seconds:.0%} of one core")
    print(
        f"  memory               {memory / 1024:.0f} MB of the queue; the driver at its peak {peak():.0f} MB"
    )


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
