"""Which of several processes this one is: by flags, by the environment, and never on a plain machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from runner_cases import arguments, assert_refused, four, run_main, start_python

import distributed_kv_cached_inference
from arc_runner.cluster import membership as run_processes
from arc_runner.cluster.membership import Place, find_place
from arc_runner.options import RunOptions, UsageError

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the clusters are joined with."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(run_processes, "_join", lambda who, **given: calls.append({"who": who} | given))
    return calls


def announce(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_plain_machine_is_alone_and_joins_nothing(joined: list[Any]):
    assert find_place(RunOptions()) == Place(0, 1, claims=False)
    assert joined == []
    assert not jax.distributed.is_initialized()


def test_slurm_says_which_process_this_is(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM)
    find_place(RunOptions())
    assert joined == [{"who": "process 1 of 2 (Slurm)"}]


def test_a_job_of_one_process_is_a_plain_machine(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert find_place(RunOptions()) == Place()
    assert joined == []


def test_shards_know_no_others_even_in_a_cluster(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM)
    assert find_place(RunOptions(num_shards=3, shard_index=2)) == Place(2, 3, claims=False)
    assert joined == []


def test_the_given_address_is_bound_and_nothing_else(joined: list[Any]):
    find_place(RunOptions(coordinator_address="127.0.0.1:99", num_processes=4, process_id=3))
    (given,) = joined
    assert given["coordinator_bind_address"] == given["coordinator_address"] == "127.0.0.1:99"
    assert (given["num_processes"], given["process_id"]) == (4, 3)


def test_a_pod_that_is_none_of_a_job_is_a_plain_machine(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert find_place(RunOptions()) == Place()
    assert joined == []


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}, "package kubernetes"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        (SLURM | {"SLURM_NTASKS": "many"}, r"jax cannot tell from the environment \(Slurm\)"),
    ],
    ids=["kubernetes", "open-mpi", "slurm"],
)
def test_what_is_announced_and_cannot_be_found_out_is_said(
    variables: dict[str, str], sentence: str, joined: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    announce(monkeypatch, **variables)
    with pytest.raises(UsageError, match=f"{sentence}.*give --coordinator_address.*or --num_shards"):
        find_place(RunOptions())
    assert joined == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"process_id": 0}, "--num_processes, --process_id go together: --coordinator_address is missing"),
        ({"shard_index": 0}, "--num_shards, --shard_index go together: --num_shards is missing"),
        ({"num_shards": 2, "shard_index": 2}, "--shard_index 2 is none of --num_shards 2"),
        (
            {"coordinator_address": "here", "num_processes": 2, "process_id": 0},
            "--coordinator_address here is not of the form HOST:PORT",
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": -1},
            "--process_id -1 is none of --num_processes 2",
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}
            | {"num_shards": 2, "shard_index": 0},
            "contradict each other",
        ),
        ({"merge": True, "num_shards": 2, "shard_index": 0}, "--merge works alone"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else None,
)
def test_flags_that_do_not_fit_together_are_refused(flags: dict[str, Any], sentence: str, tmp_path: Path):
    assert_refused(run_main(four(tmp_path), **flags), sentence)


IMPATIENT = """
import runpy, sys
from arc_runner.cluster import membership
membership.JOIN_SECONDS = 2.0
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_process_whose_others_do_not_come_says_so_and_ends(tmp_path: Path, port: int):
    script = distributed_kv_cached_inference.__file__
    address = f"127.0.0.1:{port}"
    flags = {"coordinator_address": address, "num_processes": 2, "process_id": 1}
    process = start_python(IMPATIENT, script, *arguments(four(tmp_path), **flags))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        75,
        f"error: process 1 of 2 at {address}: the others did not all come within 2 s; "
        "the same command continues\n",
    )
