"""Several processes on one store: the same sequences, byte for byte, once each, whoever ends on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from meeting import meeting
from runner_cases import (
    arguments,
    assert_refused,
    assert_whole,
    digests,
    four,
    report,
    run_main,
    store_of,
    submission,
)

import distributed_kv_cached_inference
from activation_store import ActivationStore, StoreWriteError
from arc_runner.cluster import barrier
from arc_runner.command_line import parse_options
from arc_runner.report import FIGURES
from arc_runner.signals import StopRequest

DONE, RESUMABLE = 0, 75
FLAGS: dict[str, Any] = {"batch_size": 2}


def made_by(folder: Path) -> list[int]:
    """How many sequences each process has made, as the report says."""
    processes = report(folder)["processes"]
    assert [one["process"] for one in processes] == list(range(len(processes)))
    return [one["sequences_made"] for one in processes]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    folder = four(tmp_path_factory.mktemp("alone"))
    assert run_main(folder, **FLAGS).code == DONE
    return folder


# --- Threads of this process stand for the processes; they end at a real service of JAX -----------------


Run = Callable[..., list[int]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Makes so many runs at once, without those that are ``absent``; returns their exit codes.

    Those that are ``stopped`` are asked to stop from the beginning.
    """
    monkeypatch.setattr(barrier, "POLL_SECONDS", 0.05)

    def run(
        folder: Path, count: int, stopped: Sequence[int] = (), absent: Sequence[int] = (), **flags: Any
    ) -> list[int]:
        def run_one(index: int) -> int:
            cluster = {"coordinator_address": "none:1", "num_processes": count, "process_id": index}
            options = parse_options(arguments(folder, **FLAGS | cluster | flags))
            stop = StopRequest()
            stop.requested = index in stopped
            return distributed_kv_cached_inference.run(options, stop)

        with meeting(count) as members, ThreadPoolExecutor(count) as pool, monkeypatch.context() as patch:
            patch.setattr(
                distributed_kv_cached_inference,
                "find_process",
                lambda options: members[options.process_id or 0],
            )
            return list(pool.map(run_one, [index for index in range(count) if index not in absent]))

    return run


@pytest.mark.parametrize("generation", ["continuous", "task"])
def test_each_process_makes_its_share_and_process_0_answers_for_all(
    generation: str, run: Run, tmp_path: Path
):
    expected = tmp_path / "expected"
    expected.mkdir()
    assert run_main(four(expected), generation=generation, **FLAGS).code == DONE
    assert run(four(tmp_path), 4, generation=generation) == [DONE] * 4
    assert_whole(tmp_path, expected)
    assert made_by(tmp_path) == [2, 2, 2, 2]
    records = store_of(tmp_path).sequences()
    assert report(tmp_path)["tokens_generated"] == sum(one.generated_length for one in records)


def test_with_more_processes_than_tasks_all_end_well(run: Run, alone: Path, tmp_path: Path):
    assert run(four(tmp_path), 6) == [DONE] * 6
    assert_whole(tmp_path, alone)
    assert made_by(tmp_path) == [2, 2, 2, 2, 0, 0]


def test_processes_that_find_everything_done_keep_the_figures_of_those_that_worked(
    run: Run, alone: Path, tmp_path: Path
):
    assert run(four(tmp_path), 2) == [DONE, DONE]
    worked = report(tmp_path)
    assert worked["made_at"]
    assert run(tmp_path, 2) == [DONE, DONE]
    assert run_main(tmp_path, merge=True, n_tasks=1, **FLAGS).code == DONE
    assert_whole(tmp_path, alone)
    figures = report(tmp_path)
    assert {name: figures[name] for name in FIGURES} == {name: worked[name] for name in FIGURES}


def test_process_0_says_which_process_stopped_early_and_the_same_command_continues(
    run: Run, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(four(tmp_path), 3, stopped=[1]) == [RESUMABLE, RESUMABLE, DONE]
    out = capsys.readouterr().out
    assert "process 0 of 3: process 1 stopped early\n" in out
    assert "left; the same command makes what is missing, any number of processes may; --merge answers" in out
    assert not (tmp_path / "submission.json").exists()
    assert run(tmp_path, 2) == [DONE, DONE]
    assert_whole(tmp_path, alone)


def test_process_0_says_of_which_process_it_has_not_heard(
    run: Run, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(barrier, "NEWS_SECONDS", 2.0)
    assert run(four(tmp_path), 4, absent=[1, 3]) == [RESUMABLE, DONE]
    assert "nothing has been heard of process 1, 3 and nothing stored for" in capsys.readouterr().out
    assert run_main(tmp_path, merge=True, **FLAGS).code == RESUMABLE
    assert report(tmp_path)["sequences"] == 4
    assert made_by_hosts(tmp_path) == {0: 2, 2: 2}
    assert run_main(tmp_path, **FLAGS).code == DONE
    assert_whole(tmp_path, alone)


def made_by_hosts(folder: Path) -> dict[int, int]:
    return {one["process"]: one["sequences_made"] for one in report(folder)["processes"]}


def test_a_process_0_that_is_stopped_waits_for_nobody(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(four(tmp_path), 2, stopped=[0], absent=[1]) == [RESUMABLE]
    assert "process 0 of 2: 0 sequences made; 8 of all are left; the same command" in capsys.readouterr().out


def test_a_process_that_fails_does_not_let_process_0_wait(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    generate = distributed_kv_cached_inference.generate_missing

    def fail(*words: Any) -> None:
        if words[-1].index == 1:
            raise StoreWriteError("the disk is full")
        generate(*words)

    monkeypatch.setattr(distributed_kv_cached_inference, "generate_missing", fail)
    with pytest.raises(StoreWriteError, match="the disk is full"):
        run(four(tmp_path), 2)
    assert not (tmp_path / "submission.json").exists()


def test_processes_share_a_store_behind_a_url(run: Run, alone: Path, tmp_path: Path):
    url = f"memory:/{tmp_path}"
    assert run(four(tmp_path), 2, activations_dir=url) == [DONE, DONE]
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
