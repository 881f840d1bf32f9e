"""Several processes on one store: the same sequences, byte for byte, once each, whoever dies on the way."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runner_cases import (
    arguments,
    assert_refused,
    digests,
    four,
    report,
    run_main,
    start_runner,
    store_of,
    submission,
)

import distributed_kv_cached_inference
from activation_store import ActivationStore, verify_store
from arc_runner.cluster import merge, work
from arc_runner.cluster.claims import Claims
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.work import Shared, Unit
from arc_runner.command_line import parse_options
from arc_runner.options import RunOptions
from arc_runner.report import FIGURES

pytestmark = pytest.mark.slow

DONE, RESUMABLE = 0, 75
FLAGS: dict[str, Any] = {"batch_size": 2}  # each call and each window ends two of the eight sequences

# Leases of seconds, a gate, and no torch: transformers would import it, which takes longer than all else.
IMPATIENT = """
from arc_runner.cluster import claims, merge, work
claims.HEARTBEAT_SECONDS, claims.LEASE_SECONDS = 0.3, 3.0
work.POLL_SECONDS = merge.POLL_SECONDS = 0.1
sys.modules["torch"] = None
def wait_at(gate):
    while not os.path.exists(gate):
        time.sleep(0.02)
"""


class Cluster:
    """Real processes that meet on this machine; in its first window each waits for a gate to open."""

    def __init__(self, folder: Path, port: int, count: int, **flags: Any) -> None:
        self._gate = folder / f"gate-of-{count}"
        address = {"coordinator_address": f"127.0.0.1:{port}", "num_processes": count}
        self.processes = [
            start_runner(
                1,
                f"wait_at({str(self._gate)!r})",
                *arguments(folder, **FLAGS | address | flags, process_id=index),
                settings=IMPATIENT,
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

    def ends(self, seconds: float = 100) -> list[Ended]:
        """How each of them ends, within so many seconds."""
        deadline = time.monotonic() + seconds
        outputs = [one.communicate(timeout=deadline - time.monotonic()) for one in self.processes]
        return [Ended(one.returncode, *output) for one, output in zip(self.processes, outputs, strict=True)]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def assert_whole(folder: Path, expected: Path) -> None:
    """All is there once, and the answers are those of a run in one process."""
    assert digests(folder) == digests(expected)
    assert list(verify_store(store_of(folder))) == []
    assert submission(folder) == submission(expected)
    assert report(folder)["sequences"] == len(digests(expected))
    assert not report(folder)["stopped_early"]


def assert_all_counted(folder: Path, before: Collection[str] = ()) -> None:
    """Two processes have made what was not there ``before``."""
    figures, records = report(folder), list(store_of(folder).sequences())
    made = [one["sequences_made"] for one in figures["processes"]]
    assert [one["process"] for one in figures["processes"]] == [0, 1]
    assert sum(made) == len(records) - len(before)
    assert min(made) > 0
    new = [record.generated_length for record in records if record.key not in before]
    assert figures["tokens_generated"] == sum(new)


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


def test_one_of_four_processes_makes_what_was_claimed_by_the_killed_and_the_stopped(
    alone: Path, tmp_path: Path, start: Callable[..., Cluster]
):
    """Process 0 is the one that the cluster met at."""
    cluster = start(four(tmp_path), 4)
    cluster.wait_until_all_generate()
    cluster.processes[0].kill()
    cluster.processes[1].kill()
    cluster.stop(2)
    cluster.go_on()
    ends = cluster.ends()
    assert [one.code for one in ends] == [-signal.SIGKILL, -signal.SIGKILL, RESUMABLE, DONE], ends
    assert "process 2 of 4: 2 sequences made; " in ends[2].out
    assert "of all are left, the answers are written once all are done" in ends[2].out
    assert ends[3].err == ""
    assert_whole(tmp_path, alone)


def test_four_processes_stop_on_sigterm_and_two_go_on_though_the_directory_is_away_for_a_moment(
    tmp_path: Path, start: Callable[..., Cluster]
):
    alone = tmp_path / "alone"
    alone.mkdir()
    flags = {"predictions_per_task": 4}  # 16 sequences, of which each process makes two in its first window
    assert run_main(four(alone), **FLAGS | flags).code == DONE

    cluster = start(four(tmp_path), 4, **flags)
    cluster.wait_until_all_generate()
    for index in range(4):
        cluster.stop(index)
    cluster.go_on()
    for index, one in enumerate(cluster.ends(20)):
        assert one.code == RESUMABLE, one
        assert f"process {index} of 4: 2 sequences made; " in one.out
    stopped = digests(tmp_path)
    assert len(stopped) == 8
    assert not (tmp_path / "submission.json").exists()

    store, away = tmp_path / "activations", tmp_path / "away"
    cluster = start(tmp_path, 2, **flags)
    cluster.wait_until_all_generate()
    store.rename(away)
    cluster.go_on()
    for index in range(2):
        assert f"process {index} of 2: waiting for {store} (No such file" in cluster.read_line(index)
    time.sleep(0.5)
    assert not store.exists()
    away.rename(store)
    ends = cluster.ends()
    assert [(one.code, one.err) for one in ends] == [(DONE, "")] * 2
    for index, one in enumerate(ends):
        assert f"process {index} of 2" in one.out
        assert "the answers are written by process" in one.out or "\ndone\n" in one.out
    assert_whole(tmp_path, alone)
    assert_all_counted(tmp_path, stopped)


# --- As threads of this process, which are quicker to start -------------------------------------------------


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster: the processes are those that the flags name, and poll often."""

    def named(options: RunOptions) -> ProcessInfo:
        index, count = options.process_id, options.num_processes
        return ProcessInfo() if index is None or count is None else ProcessInfo(index, count, claims=True)

    monkeypatch.setattr(distributed_kv_cached_inference, "find_process", named)
    monkeypatch.setattr(work, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(merge, "POLL_SECONDS", 0.05)


def run_threads(folder: Path, count: int, **flags: Any) -> list[int]:
    """``count`` runs at once; their exit codes."""

    def run_one(index: int) -> int:
        cluster = {"coordinator_address": "none:1", "num_processes": count, "process_id": index}
        options = parse_options(arguments(folder, **FLAGS | cluster | flags))
        return distributed_kv_cached_inference.run(options)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run_one, range(count)))


def begin_together(monkeypatch: pytest.MonkeyPatch, pause: float = 0.0) -> None:
    """Neither of two processes claims before the other one can; process 0 pauses before each unit."""
    barrier = threading.Barrier(2)

    class Together(Shared):
        begun = False

        def take(self, units: Sequence[Unit], sequences: int) -> Iterator[Unit]:
            if not self.begun:
                self.begun = True
                barrier.wait(timeout=60)
            for unit in super().take(units, sequences):
                time.sleep(pause if self._process.index == 0 else 0)
                yield unit

    monkeypatch.setattr(distributed_kv_cached_inference, "Shared", Together)


def test_two_processes_share_calls(threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begin_together(monkeypatch)
    expected = tmp_path / "expected"
    expected.mkdir()
    assert run_main(four(expected), generation="task", **FLAGS).code == DONE
    assert run_threads(four(tmp_path), 2, generation="task") == [DONE, DONE]
    assert_whole(tmp_path, expected)
    assert_all_counted(tmp_path)


def test_with_more_processes_than_work_all_end_well(threads: None, alone: Path, tmp_path: Path):
    assert run_threads(four(tmp_path), 6) == [DONE] * 6
    assert_whole(tmp_path, alone)


def test_processes_that_find_everything_done_keep_the_figures_of_those_that_worked(
    threads: None, alone: Path, tmp_path: Path
):
    assert run_threads(four(tmp_path), 2) == [DONE, DONE]
    worked = report(tmp_path)
    assert worked["made_at"]
    assert run_threads(tmp_path, 2) == [DONE, DONE]
    assert run_main(tmp_path, merge=True, n_tasks=1, **FLAGS).code == DONE
    assert_whole(tmp_path, alone)
    figures = report(tmp_path)
    assert {name: figures[name] for name in FIGURES} == {name: worked[name] for name in FIGURES}


def test_a_process_that_has_met_no_other_in_the_store_says_so(
    threads: None, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As when its --activations_dir has a typo."""
    cluster = {"coordinator_address": "none:1", "num_processes": 2, "process_id": 0}
    options = parse_options(arguments(four(tmp_path), **FLAGS | cluster))
    assert distributed_kv_cached_inference.run(options) == DONE
    assert f"process 0 of 2: no other process has been seen in {tmp_path}" in capsys.readouterr().out
    assert_whole(tmp_path, alone)


def test_a_slow_process_does_not_hold_the_others(
    threads: None, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin_together(monkeypatch, pause=1)
    assert run_threads(four(tmp_path), 2) == [DONE, DONE]
    assert_whole(tmp_path, alone)
    assert [one["sequences_made"] for one in report(tmp_path)["processes"]] == [2, 6]


def test_a_sequence_that_two_processes_have_made_is_stored_once(
    threads: None, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As when one was thought dead: every lease on work is everybody's."""
    original = Claims.acquire

    def acquire(claims: Claims, name: str) -> bool:
        return original(claims, name) if name == "answers" else claims._held.setdefault(name, name) == name

    monkeypatch.setattr(Claims, "acquire", acquire)
    assert run_threads(four(tmp_path), 2) == [DONE, DONE]
    assert digests(tmp_path) == digests(alone)
    assert submission(tmp_path) == submission(alone)


def test_processes_share_a_store_behind_a_url(threads: None, alone: Path, tmp_path: Path):
    url = f"memory:/{tmp_path}"
    assert run_threads(four(tmp_path), 2, activations_dir=url) == [DONE, DONE]
    store = ActivationStore(url)
    assert {one.key: store.sequence_digest(one) for one in store.sequences()} == digests(alone)
    assert submission(tmp_path) == submission(alone)


# --- Shards, which need no cluster --------------------------------------------------------------------------


def test_each_shard_makes_its_fixed_share_and_the_last_one_answers(alone: Path, tmp_path: Path):
    first = run_main(four(tmp_path), num_shards=2, shard_index=1, **FLAGS)
    assert first.code == DONE
    assert "shard 1 of 2: 4 sequences made; 4 of all are left" in first.out
    assert not (tmp_path / "submission.json").exists()
    assert {one.task_id for one in store_of(tmp_path).sequences()} == {"task-1", "task-3"}
    assert {one.host for one in store_of(tmp_path).sequences()} == {1}
    assert run_main(tmp_path, num_shards=2, shard_index=0, **FLAGS).code == DONE
    assert_whole(tmp_path, alone)
    assert [one["sequences_made"] for one in report(tmp_path)["processes"]] == [4, 4]


def test_any_number_of_shards_finishes_what_another_began(alone: Path, tmp_path: Path):
    assert run_main(four(tmp_path), num_shards=2, shard_index=1, **FLAGS).code == DONE
    made = []
    for index in (2, 0, 1):
        outcome = run_main(tmp_path, num_shards=3, shard_index=index, **FLAGS)
        assert (outcome.code, outcome.err) == (DONE, "")
        made.append(len(digests(tmp_path)))
    assert made == [6, 8, 8]
    assert_whole(tmp_path, alone)


def test_merge_answers_from_the_store_alone(alone: Path, tmp_path: Path, no_weights: None):
    flags = {"dataset_path": alone / "tasks.json", "activations_dir": alone / "activations", "merge": True}
    outcome = run_main(tmp_path, **flags)
    assert (outcome.code, outcome.err) == (DONE, "")
    assert submission(tmp_path) == submission(alone)
    assert (report(tmp_path)["sequences"], report(tmp_path)["sequences_resumed"]) == (8, 8)


def test_merge_of_an_unfinished_run_says_that_it_is_not_done(tmp_path: Path):
    assert run_main(four(tmp_path), num_shards=2, shard_index=0, **FLAGS).code == DONE
    outcome = run_main(tmp_path, merge=True, **FLAGS)
    assert outcome.code == RESUMABLE
    assert "stopped early; the same command continues" in outcome.out
    assert report(tmp_path)["sequences"] == 4


def test_merge_of_a_store_with_other_settings_is_refused(alone: Path, tmp_path: Path):
    flags = {"dataset_path": alone / "tasks.json", "activations_dir": alone / "activations"}
    assert_refused(
        run_main(tmp_path, merge=True, random_seed=1, **flags), "made with other settings (--random_seed is 0"
    )
    assert_refused(run_main(four(tmp_path), merge=True), "activations")
