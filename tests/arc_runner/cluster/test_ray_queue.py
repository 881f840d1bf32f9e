"""The queue of a run on Ray: everything is handed out, taken back and given up as it must be."""

from __future__ import annotations

import random

import numpy as np
import pytest

from activation_store.format import SequenceId
from arc_runner.cluster.ray_queue import MOST_FAILURES, UNIT_SEQUENCES, WorkQueue, make_units
from qwen2_core.requests import SequenceRequest

PROMPT = np.ones(10, np.int32)
MANY = 1000  # room


def request(number: int, task: str = "task", prompt: np.ndarray = PROMPT) -> SequenceRequest:
    return SequenceRequest(
        prompt, 8, number, SequenceId(task, 0, number, "identity", prompt), key=f"{number:032x}"
    )


def queue_of(*sizes: int) -> WorkQueue:
    """A queue with a unit of each size; the sequences are numbered through."""
    numbers = iter(range(sum(sizes)))
    requests = [request(next(numbers), f"task-{i}") for i, size in enumerate(sizes) for _ in range(size)]
    return WorkQueue(make_units(requests))


def keys(requests: list[SequenceRequest]) -> list[str]:
    return [one.key or "" for one in requests]


def make(queue: WorkQueue, worker: int, drawn: list[SequenceRequest], now: float = 0.0) -> None:
    for key in keys(drawn):
        queue.ended(worker, key, now)


def test_a_unit_has_sequences_of_one_task_and_width_and_at_most_eight():
    wide = np.ones(100, np.int32)
    requests = [request(i, "a") for i in range(10)] + [request(10, "b"), request(11, "b", wide)]
    units = make_units(requests)
    assert [len(unit.requests) for unit in units] == [UNIT_SEQUENCES, 2, 1, 1]
    assert [key for unit in units for key in unit.keys] == keys(requests)


def test_units_are_drawn_in_their_order_as_far_as_there_is_room():
    queue = queue_of(2, 2, 2)
    assert keys(queue.draw(1, 3, 1, 0)) == keys([request(i) for i in range(4)])
    assert queue.draw(1, 0, 1, 0) == []
    assert not queue.runs_dry
    assert keys(queue.draw(1, 1, 1, 0)) == keys([request(4), request(5)])
    assert queue.runs_dry
    assert not queue.is_done


def test_near_the_end_each_worker_draws_a_fair_part_of_what_is_left():
    queue = queue_of(*[1] * 12)
    assert len(queue.draw(1, MANY, 3, 0)) == 4
    assert queue.draw(1, MANY, 3, 0) == []  # it has its part
    assert len(queue.draw(2, MANY, 3, 0)) == 4
    assert len(queue.draw(3, MANY, 3, 0)) == 4


def test_only_what_the_store_has_is_done():
    queue = queue_of(2)
    drawn = queue.draw(1, MANY, 1, 0)
    make(queue, 1, drawn)
    assert not queue.is_done
    queue.committed(keys(drawn)[:1])
    assert queue.held_keys() == set(keys(drawn)[1:])
    queue.committed(keys(drawn)[1:])
    assert queue.is_done


def test_what_a_lost_worker_had_not_committed_is_drawn_again_and_first():
    queue = queue_of(2, 2, 2)
    drawn = queue.draw(1, 4, 1, 0)
    make(queue, 1, drawn)
    queue.committed(keys(drawn)[:1])
    queue.lost(1)
    assert keys(queue.draw(2, MANY, 1, 0)) == keys([request(i) for i in range(1, 6)])


def test_what_was_committed_while_it_waited_is_not_drawn():
    queue = queue_of(2, 1)
    queue.committed([f"{0:032x}"])
    assert keys(queue.draw(1, MANY, 1, 0)) == keys([request(1), request(2)])
    queue.lost(1)
    queue.committed([f"{1:032x}", f"{2:032x}"])
    assert queue.is_done
    assert queue.draw(1, MANY, 1, 0) == []


def test_an_idle_worker_copies_what_another_has_held_for_unusually_long():
    queue = queue_of(1, 1, 1, 1)
    fast, slow = queue.draw(1, 2, 2, 0), queue.draw(2, 2, 2, 0)
    make(queue, 1, fast, now=1.0)
    assert queue.draw(1, MANY, 2, 1.2) == []  # it is not late yet
    assert keys(queue.draw(1, 1, 2, 2.0)) == keys(slow)[:1]
    assert queue.draw(2, MANY, 2, 2.0) == []  # who still has to make it copies nothing
    assert keys(queue.draw(3, MANY, 3, 2.0)) == keys(slow)[1:]  # one copy of each
    queue.committed(keys(fast) + keys(slow))
    assert queue.is_done


def test_a_copy_survives_the_loss_of_either_worker():
    for lost, other in ((1, 2), (2, 1)):
        queue = queue_of(1, 1)
        first, second = queue.draw(1, 1, 2, 0), queue.draw(2, 1, 2, 0)
        make(queue, 2, second, now=1.0)
        assert keys(queue.draw(2, MANY, 2, 5.0)) == keys(first)
        queue.lost(lost)
        assert queue.held_keys() >= set(keys(first)), other
        queue.lost(other)
        assert keys(queue.draw(3, MANY, 1, 5.0)) == keys(first + second)


def test_a_unit_whose_worker_fails_three_times_is_given_up_with_the_reason():
    queue = queue_of(1)
    for attempt in range(MOST_FAILURES):
        assert keys(queue.draw(attempt, MANY, 1, 0)) == [f"{0:032x}"]
        queue.lost(attempt, f"crash {attempt}")
    assert queue.is_done
    assert queue.given_up == {f"{0:032x}": "crash 2"}


def test_the_last_time_a_unit_is_made_alone_and_after_all_others():
    queue = queue_of(1, 1, 1)
    first = request(0, "task-0")
    for worker in range(MOST_FAILURES - 1):
        assert keys(queue.draw(worker, 1, 1, 0)) == keys([first])
        queue.lost(worker, "crash")
    others = queue.draw(10, MANY, 1, 0)
    assert keys(others) == [f"{1:032x}", f"{2:032x}"]
    assert queue.draw(10, MANY, 1, 0) == []
    make(queue, 10, others)
    assert keys(queue.draw(10, MANY, 1, 0)) == keys([first])
    assert queue.draw(10, MANY, 1, 0) == []
    make(queue, 10, [first])
    queue.committed(keys([first, *others]))
    assert queue.is_done
    assert queue.given_up == {}


def test_a_neighbour_of_what_ends_workers_is_not_given_up():
    queue = queue_of(1, 1)
    bad, good = (f"{i:032x}" for i in range(2))
    for worker in range(MOST_FAILURES - 1):
        assert keys(queue.draw(worker, MANY, 1, 0)) == [bad, good]
        queue.lost(worker, "crash")
    assert keys(queue.draw(10, MANY, 1, 0)) == [bad]
    assert keys(queue.draw(11, MANY, 1, 0)) == [good]
    queue.lost(10, "crash")
    queue.ended(11, good, 1.0)
    queue.committed([good])
    assert queue.is_done
    assert queue.given_up == {bad: "crash"}


def test_a_worker_that_is_not_to_blame_costs_no_unit_a_try():
    queue = queue_of(1)
    for worker in range(10):
        assert queue.draw(worker, MANY, 1, 0)
        queue.lost(worker)
    assert queue.draw(11, MANY, 1, 0)
    assert queue.given_up == {}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_all_is_made_and_nothing_is_drawn_twice_by_one_worker(seed: int):
    """Workers of any speed come, go and die; some commit before they die."""
    rng = random.Random(seed)
    queue = queue_of(*[rng.randint(1, 8) for _ in range(40)])
    stored: set[str] = set()
    left: dict[int, list[str]] = {}
    names = iter(range(10_000))
    for now in range(5000):
        if queue.is_done:
            break
        if len(left) < 4 and rng.random() < 0.5:
            left[next(names)] = []
        for worker in list(left):
            drawn = keys(queue.draw(worker, rng.randint(0, 12), len(left), now))
            assert not set(drawn) & stored
            assert len(set(drawn) | set(left[worker])) == len(drawn) + len(left[worker])
            left[worker] += drawn
            made, left[worker] = left[worker][: worker % 3], left[worker][worker % 3 :]
            for key in made:
                queue.ended(worker, key, now)
            if rng.random() < 0.05:
                stored |= set(made if rng.random() < 0.5 else ())
                queue.committed(stored)
                queue.lost(worker)
                del left[worker]
            else:
                stored |= set(made)
                queue.committed(stored)
    assert queue.is_done
    assert queue.given_up == {}
    assert len(stored) == sum(len(unit.requests) for unit in queue._units)
