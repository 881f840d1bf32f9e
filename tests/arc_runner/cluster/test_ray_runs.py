"""Runs on real local Ray clusters: the bytes of a run in one process, whoever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runner_cases import (
    PYTHON,
    arguments,
    assert_whole,
    digests,
    environment,
    puzzle,
    report,
    run_main,
    store_of,
    write_tasks,
)

from activation_store import ActivationWriter

pytest.importorskip("ray", reason="the extra `ray` is not installed")

import psutil
import ray_faults
from ray.cluster_utils import Cluster

# Ray starts the nodes as children of this process, in which JAX has run.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

DONE, TASKS_FAILED, RESUMABLE = 0, 1, 75
TASKS = 16
FLAGS: dict[str, Any] = {"batch_size": 2}


def tasks(folder: Path) -> Path:
    """Sixteen puzzles of one shape, of two sequences each."""
    folder.mkdir(exist_ok=True)
    write_tasks(
        folder / "tasks.json", **{f"task-{i:02}": puzzle(*range(i % 7, i % 7 + 3)) for i in range(TASKS)}
    )
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, without Ray."""
    folder = tasks(tmp_path_factory.mktemp("alone"))
    assert run_main(folder, **FLAGS).code == DONE
    return folder


def wait_until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    """Returns what ``condition`` does as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)
    return found


def start_cluster(nodes: int) -> Cluster:
    """A cluster of nodes with one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    return cluster


@pytest.fixture(scope="module", autouse=True)
def variables() -> Iterator[None]:
    """What all nodes start with: their workers find the modules that are tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes."""
    cluster = start_cluster(2)
    yield cluster
    cluster.shutdown()


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Run:
    """The command on a cluster, whose workers stand still in their first window until it is let go."""

    def __init__(self, folder: Path, address: str | None, held: bool = True, **flags: Any) -> None:
        self.folder = folder
        for file in folder.glob("window-*"):
            file.unlink()
        if held:
            (folder / "hold").write_text("yes")
        words = arguments(folder, **FLAGS | {"ray": True if address is None else address} | flags)
        self.process = subprocess.Popen(
            [*PYTHON, "-c", ray_faults.SCRIPT, *words],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def worker(self, index: int) -> int:
        """Waits until a worker generates; returns its process id."""
        file = self.folder / f"window-{index}"
        wait_until(lambda: file.exists() or self.process.poll() is not None)
        assert file.exists(), self.process.communicate()
        return int(file.read_text())

    def workers(self) -> list[int]:
        """Returns the process ids of all workers that have begun to generate."""
        return [int(file.read_text()) for file in self.folder.glob("window-*")]

    def go_on(self) -> None:
        (self.folder / "hold").unlink()

    def end(self, seconds: float = 100) -> Ended:
        out, err = self.process.communicate(timeout=seconds)
        return Ended(self.process.returncode, out, err)


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """Starts runs that do not outlive the test."""
    runs: list[Run] = []

    def start(*args: Any, **flags: Any) -> Run:
        runs.append(Run(*args, **flags))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate()


def assert_gone(pids: list[int], seconds: float = 20) -> None:
    """None of the processes outlives the run that it was of."""
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), seconds)


def test_what_a_killed_worker_had_not_stored_is_made_by_others(
    cluster: Cluster, alone: Path, tmp_path: Path, start: Callable[..., Run]
):
    run = start(tasks(tmp_path), cluster.address)
    first, second = run.worker(1), run.worker(2)
    os.kill(first, signal.SIGKILL)
    third = run.worker(3)
    run.go_on()
    ended = run.end()
    assert (ended.code, ended.err) == (DONE, ""), ended
    assert "worker 1 (" in ended.out
    assert "is gone" in ended.out
    assert_whole(tmp_path, alone)
    assert {one["process"] for one in report(tmp_path)["processes"]} <= {2, 3}
    lines = [json.loads(line) for line in (tmp_path / "submission.metrics.jsonl").read_text().splitlines()]
    seen = {worker["host"]: worker for line in lines for worker in line.get("workers", [])}
    assert {2, 3} <= set(seen)
    assert {"phase", "tokens_per_second", "slots_in_use", "seconds_since_heard"} <= set(seen[2])
    assert_gone([first, second, third])


@pytest.mark.slow
def test_workers_and_a_node_are_killed_and_a_node_comes_and_nothing_is_lost(
    alone: Path, tmp_path: Path, start: Callable[..., Run], nodes: Callable[[int], Cluster]
):
    cluster = nodes(3)
    run = start(tasks(tmp_path), cluster.address)
    pids = [run.worker(index) for index in (1, 2, 3)]
    for index in (4, 5):  # twice on the way
        os.kill(pids[-1], signal.SIGKILL)
        pids.append(run.worker(index))
    kill_node(next(iter(cluster.worker_nodes)))
    cluster.add_node(num_cpus=1)
    wait_until(lambda: len(run.workers()) > len(pids))
    run.go_on()
    ended = run.end()
    assert ended.code == DONE, ended
    assert "its node is gone" in ended.out or "it cannot be reached" in ended.out
    assert_whole(tmp_path, alone)
    assert_gone(run.workers())


@pytest.mark.slow
def test_a_driver_is_killed_twice_and_the_same_command_without_ray_does_the_rest(
    cluster: Cluster, alone: Path, tmp_path: Path, start: Callable[..., Run]
):
    tasks(tmp_path)
    (tmp_path / "pause").write_text("0.3")
    for _ in range(2):
        before = len(digests_so_far(tmp_path))
        run = start(tmp_path, cluster.address, held=False)
        run.worker(1)
        wait_until(lambda before=before: len(digests_so_far(tmp_path)) > before)
        run.process.kill()
        run.process.communicate()
        assert_gone(run.workers())  # in the middle of a window, too
        assert len(digests_so_far(tmp_path)) < len(digests(alone))
    assert run_main(tmp_path, **FLAGS).code == DONE
    # A worker that was killed in a commit may have left a shard, which the next writer of its folder removes.
    for host in (1, 2):
        open_and_close(tmp_path, host)
    assert_whole(tmp_path, alone)


@pytest.mark.slow
def test_sigterm_stores_what_has_ended_within_twenty_seconds_and_the_same_command_continues(
    cluster: Cluster, alone: Path, tmp_path: Path, start: Callable[..., Run]
):
    run = start(tasks(tmp_path), cluster.address)
    run.worker(1)
    run.worker(2)
    run.process.send_signal(signal.SIGTERM)
    run.go_on()
    ended = run.end(20)
    assert ended.code == RESUMABLE, ended
    assert "stopped early; the same command continues" in ended.out
    assert_gone(run.workers())
    stopped = digests(tmp_path)
    assert 0 < len(stopped) < len(digests(alone))  # each worker's first window ended two
    again = start(tmp_path, cluster.address, held=False).end()
    assert again.code == DONE, again
    assert f"{len(stopped)} of them done already" in again.out
    assert report(tmp_path)["sequences_resumed"] == len(stopped)
    assert report(tmp_path)["device"] == "Ray, cpu"
    assert_whole(tmp_path, alone)


@pytest.mark.slow
def test_a_second_sigterm_ends_the_driver_at_once_and_its_workers_with_it(
    cluster: Cluster, tmp_path: Path, start: Callable[..., Run]
):
    run = start(tasks(tmp_path), cluster.address)
    pids = [run.worker(1), run.worker(2)]
    run.process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(5).code == RESUMABLE
    assert_gone(pids)  # though they never left their window


@pytest.mark.slow
def test_a_worker_ten_times_slower_makes_less_and_holds_nobody_up(
    cluster: Cluster, alone: Path, tmp_path: Path, start: Callable[..., Run]
):
    window = 0.5  # seconds; two sequences each
    run = start(tasks(tmp_path), cluster.address)
    run.worker(1)
    run.worker(2)
    (tmp_path / "pause").write_text(str(window))
    (tmp_path / "pause-2").write_text(str(10 * window))
    begun = time.monotonic()
    run.go_on()
    wait_until(lambda: len(digests_so_far(tmp_path)) == 2 * TASKS)
    seconds = time.monotonic() - begun
    assert run.end().code == DONE
    assert_whole(tmp_path, alone)
    ideal = TASKS * window / 1.1
    assert seconds <= 1.3 * ideal + 2.0, (seconds, ideal)


@pytest.mark.slow
def test_a_store_that_is_away_for_half_a_minute_is_waited_for(
    cluster: Cluster, alone: Path, tmp_path: Path, start: Callable[..., Run]
):
    run = start(tasks(tmp_path), cluster.address)
    run.worker(1)
    run.worker(2)
    store, away = tmp_path / "activations", tmp_path / "away"
    store.rename(away)
    run.go_on()
    time.sleep(30)
    assert not store.exists()
    away.rename(store)
    ended = run.end()
    assert ended.code == DONE, ended
    assert_whole(tmp_path, alone)


@pytest.mark.slow
def test_a_task_that_kills_its_worker_again_and_again_is_reported_and_all_others_are_made(
    cluster: Cluster, alone: Path, tmp_path: Path, start: Callable[..., Run]
):
    (tasks(tmp_path) / "poison").write_text("task-05")
    ended = start(tmp_path, cluster.address, held=False).end()
    assert ended.code == TASKS_FAILED, ended
    (failure,) = report(tmp_path)["tasks_failed"]
    assert failure["task_id"] == "task-05"
    assert "2 sequences failed 3 times: " in failure["reason"]
    made = digests(tmp_path)
    assert made.items() <= digests(alone).items()
    assert len(made) == 2 * TASKS - 2
    (tmp_path / "poison").unlink()
    assert start(tmp_path, cluster.address, held=False).end().code == DONE
    assert_whole(tmp_path, alone)


@pytest.mark.slow
def test_a_cluster_that_the_run_has_started_ends_with_it_though_it_is_killed(
    tmp_path: Path, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
):
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        # No other cluster is found there. Not in `tmp_path`: the paths of sockets must be short.
        monkeypatch.setenv("RAY_TMPDIR", folder)
        run = start(tasks(tmp_path), None, ray_workers=2)
        workers = [run.worker(1), run.worker(2)]
        rays = {one.name(): one.pid for one in psutil.Process(run.process.pid).children()}
        run.process.kill()
        run.process.communicate()
        # Two helpers of Ray's try for a minute to tell the dead cluster of its death, and end then.
        assert_gone([*workers, rays["gcs_server"], rays["raylet"]])


def open_and_close(folder: Path, host: int) -> None:
    """Writes nothing to a store as one of its hosts."""
    ActivationWriter(
        folder / "activations", store_of(folder).settings, host_index=host, provenance={}
    ).close()


def digests_so_far(folder: Path) -> dict[str, str]:
    """What is stored of a run that goes on."""
    return digests(folder) if (folder / "activations" / "manifest.json").exists() else {}


def kill_node(node: Any) -> None:
    """Kills the processes of a node at once, as when its power is cut."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in (raylet, *raylet.children(recursive=True)):
        process.kill()


@pytest.fixture
def nodes() -> Iterator[Callable[[int], Cluster]]:
    """Starts clusters of this test alone."""
    clusters: list[Cluster] = []

    def start_nodes(count: int) -> Cluster:
        clusters.append(start_cluster(count))
        return clusters[-1]

    yield start_nodes
    for cluster in clusters:
        cluster.shutdown()
