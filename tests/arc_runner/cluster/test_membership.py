"""Finding out which of several processes this one is: from the flags, or from the environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from runner_cases import ERROR, arguments, assert_refused, four, run_main, start_python

from arc_runner.cluster import membership
from arc_runner.cluster.membership import ProcessInfo, find_process
from arc_runner.errors import UsageError
from arc_runner.options import RunOptions

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments with which clusters are joined."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(membership, "_join", lambda who, **given: calls.append({"who": who} | given))
    return calls


def announce(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_on_a_machine_without_a_cluster_the_process_is_alone_and_joins_nothing(joined: list[Any]):
    assert find_process(RunOptions()) == ProcessInfo(0, 1, claims=False)
    assert joined == []
    assert not jax.distributed.is_initialized()


def test_slurm_says_which_process_this_is(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM)
    find_process(RunOptions())
    assert joined == [{"who": "process 1 of 2 (Slurm)"}]


def test_a_slurm_job_of_one_process_joins_nothing(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert find_process(RunOptions()) == ProcessInfo()
    assert joined == []


def test_a_shard_joins_nothing_even_in_a_cluster(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM)
    assert find_process(RunOptions(num_shards=3, shard_index=2)) == ProcessInfo(2, 3, claims=False)
    assert joined == []


def test_the_coordinator_listens_on_the_given_address_only(joined: list[Any]):
    find_process(RunOptions(coordinator_address="127.0.0.1:99", num_processes=4, process_id=3))
    (given,) = joined
    assert given["coordinator_bind_address"] == given["coordinator_address"] == "127.0.0.1:99"
    assert (given["num_processes"], given["process_id"]) == (4, 3)


def test_a_kubernetes_pod_outside_an_indexed_job_joins_nothing(
    joined: list[Any], monkeypatch: pytest.MonkeyPatch
):
    announce(monkeypatch, KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert find_process(RunOptions()) == ProcessInfo()
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
def test_a_cluster_in_which_the_process_cannot_be_identified_is_refused(
    variables: dict[str, str], sentence: str, joined: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    announce(monkeypatch, **variables)
    with pytest.raises(UsageError, match=f"{sentence}.*give --coordinator_address.*or --num_shards"):
        find_process(RunOptions())
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
import runpy
from arc_runner.cluster import membership
membership.JOIN_SECONDS = 2.0
runpy.run_module("distributed_kv_cached_inference", run_name="__main__")
"""


def test_a_process_whose_others_do_not_come_says_so_and_ends(tmp_path: Path, port: int):
    address = f"127.0.0.1:{port}"
    flags = {"coordinator_address": address, "num_processes": 2, "process_id": 1}
    process = start_python(IMPATIENT, *arguments(four(tmp_path), **flags))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        75,
        f"{ERROR}process 1 of 2 at {address}: the others did not all come within 2 s; "
        "the same command continues\n",
    )
