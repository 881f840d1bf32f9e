"""Fixed shares: together they are all of a job, none of it twice, and each as much as the others."""

from __future__ import annotations

import pytest
from runner_cases import arguments, puzzle, write_tasks

from arc_runner.cluster.membership import ProcessInfo
from arc_runner.command_line import parse_options
from arc_runner.job import Job, prepare

TASKS = 11


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Tasks of very different lengths, the long ones on every second place."""
    folder = tmp_path_factory.mktemp("tasks")
    cells = {f"task-{i:02d}": [5] * (3 + i % 2 * 15 + i) for i in range(TASKS)}
    write_tasks(folder / "tasks.json", **{name: puzzle(*row) for name, row in cells.items()})
    return prepare(parse_options(arguments(folder)))[0]


def tokens(job: Job) -> int:
    return sum(len(request.id.prompt_token_ids) for request in job.requests)


@pytest.mark.parametrize("count", [1, 2, 3, 4, TASKS + 2])
def test_the_shares_are_all_of_the_job_and_as_even_as_they_can_be(job: Job, count: int):
    parts = [job.part_of(ProcessInfo(index, count)) for index in range(count)]
    keys = [request.key for part in parts for request in part.requests]
    assert sorted(map(str, keys)) == sorted(str(request.key) for request in job.requests)
    tasks = [{request.id.task_id for request in part.requests} for part in parts]
    assert sum(map(len, tasks)) == TASKS  # the sequences of a task are together
    assert max(map(len, tasks)) - min(map(len, tasks)) <= 1
    longest = max(tokens(job.part_of(ProcessInfo(index, TASKS))) for index in range(TASKS))
    assert max(map(tokens, parts)) - min(map(tokens, parts)) <= longest


def test_a_share_keeps_the_order_of_the_job(job: Job):
    part = job.part_of(ProcessInfo(1, 3))
    assert part.requests == [request for request in job.requests if request in part.requests]
