"""Real processes that meet on this machine: killed, stopped, and without their store for a while."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runner_cases import arguments, digests, four, report, run_main, start_runner, store_of, submission

from activation_store import verify_store

pytestmark = pytest.mark.slow

DONE, RESUMABLE = 0, 75
FLAGS: dict[str, Any] = {"batch_size": 2}  # the first window of a process ends its two sequences

# No torch, which transformers would import for longer than all else takes.
SETTINGS = """
from arc_runner.cluster import barrier
barrier.NEWS_SECONDS, barrier.POLL_SECONDS = 10.0, 0.1
sys.modules["torch"] = None
def wait_at(gate):
    while not os.path.exists(gate):
        time.sleep(0.02)
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Cluster:
    """Processes of one run; in its first window each waits for a gate to open."""

    def __init__(self, folder: Path, port: int, count: int, **flags: Any) -> None:
        self._gate = folder / f"gate-of-{count}"
        address = {"coordinator_address": f"127.0.0.1:{port}", "num_processes": count}
        self.processes = [
            start_runner(
                1,
                f"wait_at({str(self._gate)!r})",
                *arguments(folder, **FLAGS | address | flags, process_id=index),
                settings=SETTINGS,
            )
            for index in range(count)
        ]

    def wait_until_all_generate(self) -> None:
        for index in range(len(self.processes)):
            assert self.read_line(index) == "here\n"

    def read_line(self, index: int) -> str:
        """The next one on its stderr; "" once it has ended."""
        stderr = self.processes[index].stderr
        assert stderr is not None
        return stderr.readline()

    def stop(self, index: int) -> None:
        """SIGTERM; returns once the process has heard it."""
        self.processes[index].send_signal(signal.SIGTERM)
        assert "stopping as soon as the running work is done" in self.read_line(index)

    def go_on(self) -> None:
        self._gate.touch()

    def ends(self, seconds: float = 150) -> list[Ended]:
        """How each of them ends, within so many seconds."""
        deadline = time.monotonic() + seconds
        outputs = [one.communicate(timeout=deadline - time.monotonic()) for one in self.processes]
        return [Ended(one.returncode, *output) for one, output in zip(self.processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    folder = four(tmp_path_factory.mktemp("alone"))
    assert run_main(folder, **FLAGS).code == DONE
    return folder


@pytest.fixture
def start(port: int) -> Iterator[Callable[..., Cluster]]:
    """Starts clusters whose processes do not outlive the test."""
    clusters: list[Cluster] = []

    def start(folder: Path, count: int, **flags: Any) -> Cluster:
        clusters.append(Cluster(folder, port, count, **flags))
        return clusters[-1]

    yield start
    for process in (process for cluster in clusters for process in cluster.processes):
        process.kill()
        process.communicate()


def assert_whole(folder: Path, expected: Path) -> None:
    """All is there once, and the answers are those of a run in one process."""
    assert digests(folder) == digests(expected)
    assert list(verify_store(store_of(folder))) == []
    assert submission(folder) == submission(expected)
    assert not report(folder)["stopped_early"]


def test_after_kill_9_of_one_process_0_says_what_is_missing_and_the_same_command_makes_it(
    alone: Path, tmp_path: Path, start: Callable[..., Cluster]
):
    cluster = start(four(tmp_path), 4)
    cluster.wait_until_all_generate()
    cluster.processes[3].kill()
    cluster.go_on()
    ends = cluster.ends()
    assert [one.code for one in ends] == [RESUMABLE, DONE, DONE, -signal.SIGKILL], ends
    assert "process 0 of 4: nothing has been heard of process 3 and nothing stored for" in ends[0].out
    assert "process 0 of 4: 2 sequences made; 2 of all are left; the same command" in ends[0].out
    assert [one.err for one in ends[:3]] == [""] * 3
    assert not (tmp_path / "submission.json").exists()

    cluster = start(tmp_path, 2)
    cluster.go_on()
    ends = cluster.ends()
    assert [one.code for one in ends] == [DONE, DONE], ends
    assert_whole(tmp_path, alone)
    assert sum(one["sequences_made"] for one in report(tmp_path)["processes"]) == 2


def test_a_killed_process_0_and_a_stopped_one_keep_the_others_from_nothing(
    alone: Path, tmp_path: Path, start: Callable[..., Cluster]
):
    cluster = start(four(tmp_path), 4)
    cluster.wait_until_all_generate()
    cluster.processes[0].kill()
    cluster.stop(2)
    cluster.go_on()
    ends = cluster.ends()
    assert [one.code for one in ends] == [-signal.SIGKILL, DONE, DONE, DONE], ends
    for index in (1, 2, 3):
        assert f"process {index} of 4: 2 sequences made; " in ends[index].out
        assert "process 0 has ended; the same command makes what is missing" in ends[index].out
    assert len(digests(tmp_path)) == 6
    assert run_main(tmp_path, **FLAGS).code == DONE
    assert_whole(tmp_path, alone)


def test_a_directory_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, start: Callable[..., Cluster]):
    expected = tmp_path / "expected"
    expected.mkdir()
    flags = {"predictions_per_task": 4}  # 16 sequences, of which each process makes two in its first window
    assert run_main(four(expected), **FLAGS | flags).code == DONE

    cluster = start(four(tmp_path), 2, **flags)
    cluster.wait_until_all_generate()
    store, away = tmp_path / "activations", tmp_path / "away"
    store.rename(away)
    cluster.go_on()
    for index in range(2):
        assert f"process {index} of 2: waiting for {store} (No such file" in cluster.read_line(index)
    time.sleep(0.5)
    assert not store.exists()
    away.rename(store)
    ends = cluster.ends()
    assert [(one.code, one.err) for one in ends] == [(DONE, "")] * 2
    assert_whole(tmp_path, expected)
    assert [one["sequences_made"] for one in report(tmp_path)["processes"]] == [8, 8]
