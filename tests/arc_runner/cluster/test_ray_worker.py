"""A worker of a run on Ray, in this process: what it makes of its orders, and what it refuses."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runner_cases import arguments, copy_small, digests, four, run_main, store_of

from activation_store import ActivationWriter
from activation_store.format import SequenceId
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.ray_driver import assign, without
from arc_runner.cluster.ray_messages import Assignment, Order, Status
from arc_runner.cluster.ray_queue import UNIT_SEQUENCES
from arc_runner.cluster.ray_worker import Feed, Worker
from arc_runner.command_line import parse_options
from arc_runner.job import Job, prepare
from arc_runner.signals import StopRequest
from qwen2_core.requests import SequenceRequest

FLAGS: dict[str, Any] = {"batch_size": 2}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Eight sequences of one width."""
    return prepare(parse_options(arguments(four(tmp_path), **FLAGS, ray=True)))[0]


@pytest.fixture
def driver(job: Job) -> Iterator[ActivationWriter]:
    """The driver's own host folder, which it holds as long as it runs."""
    with job.open_writer(ProcessInfo(0), None) as writer:
        yield writer


@pytest.fixture
def assignment(job: Job, driver: ActivationWriter) -> Assignment:
    return assign(job, {request.width for request in job.requests})


def until(worker: Worker, condition: Callable[[Status], bool], order: Order | None = None) -> list[Status]:
    """Gives a worker an order, then empty ones until a status is as it must be; all that it answers."""
    answers = [worker.exchange(order or Order())]
    end = time.monotonic() + 60
    while not condition(answers[-1]):
        assert time.monotonic() < end, answers[-1]
        answers.append(worker.exchange(Order()))
    return answers


def test_a_worker_makes_what_it_is_given_and_commits_it_as_soon_as_it_is_waited_for(
    job: Job, driver: ActivationWriter, assignment: Assignment, tmp_path: Path
):
    worker = Worker(assignment, 7)
    loaded = until(worker, lambda status: status.room > 0)
    assert {one.phase for one in loaded} <= {"starting", "loading", "generating", "waiting"}
    assert loaded[-1].room == 2 + UNIT_SEQUENCES
    answers = until(worker, lambda status: status.phase == "waiting", Order(job.requests[:5]))
    ended = [one for status in answers for one in status.ended]
    assert sorted(one.key or "" for one in ended) == sorted(one.key or "" for one in job.requests[:5])
    assert all(one.rows is None for one in ended)
    assert answers[-1].tokens == sum(len(one.token_ids) for one in ended)
    until(worker, lambda status: status.figures["sequences_made"] == 5)
    rest = until(worker, lambda status: status.phase == "waiting", Order(job.requests[5:], hastens=True))
    until(worker, lambda status: status.figures["sequences_made"] == 8)
    assert rest[-1].failure == ""
    (last,) = until(worker, lambda status: status.phase == "ended", Order(stops=True))[-1:]
    assert last.failure == ""
    assert {record.host for record in store_of(tmp_path).sequences()} == {7}
    (tmp_path / "alone").mkdir()
    alone = four(tmp_path / "alone")
    assert run_main(alone, **FLAGS).code == 0
    assert digests(tmp_path) == digests(alone)


def test_a_worker_reads_prompts_that_want_no_tokens(tmp_path: Path):
    flags = FLAGS | {"max_output_tokens": 0, "extract_prompt": True}
    job, _ = prepare(parse_options(arguments(four(tmp_path), **flags, ray=True)))
    with job.open_writer(ProcessInfo(0), None):
        worker = Worker(assign(job, {request.width for request in job.requests}), 1)
        until(worker, lambda status: status.room > 0)
        for some in (job.requests[:3], job.requests[3:]):
            until(worker, lambda status: status.phase == "waiting", Order(some, hastens=True))
        until(worker, lambda status: status.figures["sequences_made"] == len(job.requests))
        until(worker, lambda status: status.phase == "ended", Order(stops=True))
    assert {record.generated_length for record in store_of(tmp_path).sequences()} == {0}
    assert len(digests(tmp_path)) == len(job.requests)


def test_a_worker_that_sees_another_directory_under_the_stores_name_refuses(assignment: Assignment):
    worker = Worker(dataclasses.replace(assignment, lock=b"process 1 on another machine"), 1)
    (last,) = until(worker, lambda status: status.phase == "ended")[-1:]
    assert "is not the driver's directory here: name one that all machines share" in last.failure
    assert not last.blames


def test_a_worker_that_has_other_weights_under_the_models_name_refuses(
    assignment: Assignment, tmp_path: Path
):
    settings = dataclasses.replace(assignment.settings, model_fingerprint="0" * 64)
    worker = Worker(dataclasses.replace(assignment, settings=settings), 1)
    (last,) = until(worker, lambda status: status.phase == "ended")[-1:]
    assert "has other weights here than where the driver is" in last.failure
    assert not last.blames


def test_a_worker_whose_generation_fails_says_why_and_that_its_work_may_be_to_blame(
    job: Job, assignment: Assignment, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise RuntimeError("a device\nbroke")

    monkeypatch.setattr("qwen2_engine.continuous_batching.RunningSlots._dispatch", fail)
    worker = Worker(assignment, 1)
    until(worker, lambda status: status.room > 0)
    (last,) = until(worker, lambda status: status.phase == "ended", Order(job.requests))[-1:]
    assert last.failure == "RuntimeError: a device broke"
    assert last.blames


def test_a_worker_that_cannot_load_the_model_says_why(assignment: Assignment, tmp_path: Path):
    folder = copy_small(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    options = dataclasses.replace(assignment.options, model_path=str(folder))
    worker = Worker(dataclasses.replace(assignment, options=options), 1)
    (last,) = until(worker, lambda status: status.phase == "ended")[-1:]
    assert str(folder) in last.failure
    assert not last.blames


def request(number: int, width: int = 64) -> SequenceRequest:
    prompt = np.ones(width, np.int32)
    return SequenceRequest(prompt, 8, number, SequenceId("a", 0, number, "identity", prompt), key=str(number))


def test_a_feed_hands_out_one_width_at_a_time_and_none_while_there_is_none():
    changed = threading.Condition()
    stop = StopRequest()
    feed = Feed({64, 128}, stop, changed)
    assert feed.room == 0  # before the model is there
    feed.slots = 2
    assert feed.room == 2 + UNIT_SEQUENCES
    feed.add([request(0), request(1, 128), request(2)])
    assert feed.room == UNIT_SEQUENCES - 1
    assert feed.next_width() == 64
    of_width = feed.requests({64})
    assert getattr(next(of_width), "key", None) == "0"
    assert next(of_width) is None
    assert feed.running == {"0"}
    assert feed.room == UNIT_SEQUENCES - 1
    assert feed.next_width() == 128
    stop.requested = True
    assert feed.next_width() is None


def test_what_was_given_up_is_a_failure_of_its_task_and_no_longer_asked_for(job: Job):
    keys = [one.key or "" for one in job.requests]
    left = without(job, {keys[0]: "it broke", keys[1]: "it broke", keys[2]: "not this one"}, {keys[2]})
    assert [one.key for one in left.requests] == keys[2:]
    (failure,) = left.failures
    assert failure.task_id == job.requests[0].id.task_id
    assert failure.reason == "2 sequences failed 3 times: it broke"
