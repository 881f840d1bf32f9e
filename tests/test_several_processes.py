"""Several processes on one store: the same sequences, byte for byte, once each, whoever dies on the way."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
import run_merge
import run_work
from activation_store import ActivationStore, verify_store
from continuous import _Driver
from run_claims import Claims
from run_options import RunOptions, parse_options
from run_processes import Place
from run_signals import StopRequest
from run_work import Shared, Unit

DONE, RESUMABLE = 0, 75
FLAGS: dict[str, Any] = {"batch_size": 2}  # each call and each window ends two of the eight sequences

# Leases of seconds.
IMPATIENT = """
import run_claims, run_merge, run_work
run_claims.HEARTBEAT_SECONDS, run_claims.LEASE_SECONDS = 0.3, 3.0
run_work.POLL_SECONDS = run_merge.POLL_SECONDS = 0.1
"""


def start(
    folder: Path, port: int, index: int, call: int = 0, something: str = "", **flags: Any
) -> subprocess.Popen[str]:
    """One of two processes, of a real cluster on this machine."""
    cluster = {"coordinator_address": f"127.0.0.1:{port}", "num_processes": 2, "process_id": index}
    return start_runner(call, something, *arguments(folder, **FLAGS | cluster | flags), settings=IMPATIENT)


def assert_whole(folder: Path, expected: Path) -> None:
    """All is there once, and the answers are those of a run in one process."""
    assert digests(folder) == digests(expected)
    assert list(verify_store(store_of(folder))) == []
    assert submission(folder) == submission(expected)
    assert (report(folder)["sequences"], report(folder)["stopped_early"]) == (8, False)


def assert_all_counted(folder: Path) -> None:
    figures, records = report(folder), list(store_of(folder).sequences())
    made = [one["sequences_made"] for one in figures["processes"]]
    assert [one["process"] for one in figures["processes"]] == [0, 1]
    assert sum(made) == 8
    assert min(made) > 0
    assert figures["tokens_generated"] == sum(record.generated_length for record in records)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    folder = four(tmp_path_factory.mktemp("alone"))
    assert run_main(folder, **FLAGS).code == DONE
    return folder


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that do not outlive the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_two_processes_share_the_work(
    alone: Path, tmp_path: Path, port: int, started: list[subprocess.Popen[str]]
):
    # A while for the other one to come out of its compiler.
    started += [start(four(tmp_path), port, index, 1, "time.sleep(3)") for index in range(2)]
    outputs = [process.communicate(timeout=100) for process in started]
    assert [(process.returncode, err) for process, (_, err) in zip(started, outputs, strict=True)] == [
        (DONE, "here\n")
    ] * 2
    assert_whole(tmp_path, alone)
    assert_all_counted(tmp_path)
    for index, (out, _) in enumerate(outputs):
        assert f"process {index} of 2" in out
        assert "the answers are written by process" in out or "\ndone\n" in out


@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_kill_the_other_process_makes_what_was_claimed(
    victim: int, alone: Path, tmp_path: Path, port: int, started: list[subprocess.Popen[str]]
):
    """Process 0 is the one that the cluster met at."""
    kill = {"call": 1, "something": "os.kill(os.getpid(), signal.SIGKILL)"}
    wait = {"call": 1, "something": "time.sleep(3)"}
    four(tmp_path)
    started += [start(tmp_path, port, i, **(kill if i == victim else wait)) for i in range(2)]
    outputs = [process.communicate(timeout=100) for process in started]
    codes = [process.returncode for process in started]
    assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, DONE), outputs
    assert_whole(tmp_path, alone)


def test_sigterm_to_one_process_leaves_its_work_to_the_other(
    alone: Path, tmp_path: Path, port: int, started: list[subprocess.Popen[str]]
):
    four(tmp_path)
    started += [
        start(tmp_path, port, 0, 1, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)"),
        start(tmp_path, port, 1, 1, "time.sleep(5)"),
    ]
    (out, err), other = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [RESUMABLE, DONE], (out, err, other)
    assert "stopping as soon as the running work is done" in err
    assert "process 0 of 2: 2 sequences made; " in out
    assert "of all are left, the answers are written once all are done" in out
    assert_whole(tmp_path, alone)


# --- As threads of this process, which are quicker to start -------------------------------------------------


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster, the places that the flags give, and no patience."""

    def place(options: RunOptions) -> Place:
        index, count = options.process_id, options.num_processes
        return Place() if index is None or count is None else Place(index, count, claims=True)

    monkeypatch.setattr(distributed_kv_cached_inference, "find_place", place)
    monkeypatch.setattr(run_work, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(run_merge, "POLL_SECONDS", 0.05)


def run_threads(folder: Path, count: int, stop: StopRequest | None = None, **flags: Any) -> list[int]:
    """``count`` runs at once; their exit codes."""

    def run_one(index: int) -> int:
        cluster = {"coordinator_address": "none:1", "num_processes": count, "process_id": index}
        options = parse_options(arguments(folder, **FLAGS | cluster | flags))
        return distributed_kv_cached_inference.run(options, stop)

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
                time.sleep(pause if self._place.index == 0 else 0)
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


def test_more_processes_than_work(threads: None, alone: Path, tmp_path: Path):
    assert run_threads(four(tmp_path), 6) == [DONE] * 6
    assert_whole(tmp_path, alone)


def test_a_slow_process_does_not_hold_the_others(
    threads: None, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin_together(monkeypatch, pause=2)
    assert run_threads(four(tmp_path), 2) == [DONE, DONE]
    assert_whole(tmp_path, alone)
    assert [one["sequences_made"] for one in report(tmp_path)["processes"]] == [2, 6]


def test_sequences_that_two_processes_have_made_are_there_once(
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


def test_a_store_behind_a_url_is_shared_too(threads: None, alone: Path, tmp_path: Path):
    url = f"memory:/{tmp_path}"
    assert run_threads(four(tmp_path), 2, activations_dir=url) == [DONE, DONE]
    store = ActivationStore(url)
    assert {one.key: store.sequence_digest(one) for one in store.sequences()} == digests(alone)
    assert submission(tmp_path) == submission(alone)


def test_all_stop_and_another_number_of_processes_goes_on(
    threads: None, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stop = StopRequest()
    dispatch = _Driver._dispatch

    def stopped(driver: _Driver) -> Any:
        stop.requested = True
        return dispatch(driver)

    with monkeypatch.context() as patch:
        patch.setattr(_Driver, "_dispatch", stopped)
        assert run_threads(four(tmp_path), 2, stop) == [RESUMABLE, RESUMABLE]
    assert 0 < len(digests(tmp_path)) < 8
    assert not (tmp_path / "submission.json").exists()
    assert run_threads(tmp_path, 3) == [DONE] * 3
    assert_whole(tmp_path, alone)


# --- Shards, which need no cluster --------------------------------------------------------------------------


def test_shards_make_fixed_shares_and_the_last_one_answers(alone: Path, tmp_path: Path):
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


def test_merge_answers_with_what_is_there(alone: Path, tmp_path: Path, no_weights: None):
    flags = {"dataset_path": alone / "tasks.json", "activations_dir": alone / "activations", "merge": True}
    outcome = run_main(tmp_path, **flags)
    assert (outcome.code, outcome.err) == (DONE, "")
    assert submission(tmp_path) == submission(alone)
    assert (report(tmp_path)["sequences"], report(tmp_path)["sequences_resumed"]) == (8, 8)


def test_merge_of_a_part_says_that_it_is_one(tmp_path: Path):
    assert run_main(four(tmp_path), num_shards=2, shard_index=0, **FLAGS).code == DONE
    outcome = run_main(tmp_path, merge=True, **FLAGS)
    assert outcome.code == RESUMABLE
    assert "stopped early; the same command continues" in outcome.out
    assert report(tmp_path)["sequences"] == 4


def test_merge_of_other_settings_is_refused(alone: Path, tmp_path: Path):
    flags = {"dataset_path": alone / "tasks.json", "activations_dir": alone / "activations"}
    assert_refused(
        run_main(tmp_path, merge=True, random_seed=1, **flags), "made with other settings (seed is 0"
    )
    assert_refused(run_main(four(tmp_path), merge=True), "activations")
