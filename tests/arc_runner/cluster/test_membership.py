"""Finding out which of several processes this one is: from the flags, or from the environment."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from runner_cases import ERROR, arguments, assert_refused, four, run_main, start_python

from arc_runner.cluster import membership
from arc_runner.cluster.membership import ProcessInfo, find_process
from arc_runner.errors import ClusterError, UsageError
from arc_runner.options import RunOptions

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}

OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments with which clusters are joined."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        membership, "_join", lambda who, _, arguments: calls.append({"who": who} | arguments())
    )
    return calls


def announce(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_on_a_machine_without_a_cluster_the_process_is_alone_and_joins_nothing(joined: list[Any]):
    assert find_process(RunOptions()) == ProcessInfo(0, 1)
    assert joined == []
    assert not jax.distributed.is_initialized()


def test_slurm_says_which_process_this_is(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM)
    find_process(RunOptions())
    (given,) = joined
    assert (given["who"], given["num_processes"], given["process_id"]) == ("process 1 of 2 (Slurm)", 2, 1)
    assert given["coordinator_address"] == given["coordinator_bind_address"] == "node003:61517"


def test_a_slurm_job_of_one_process_joins_nothing(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert find_process(RunOptions()) == ProcessInfo()
    assert joined == []


def test_a_shard_joins_nothing_even_in_a_cluster(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM)
    assert find_process(RunOptions(num_shards=3, shard_index=2)) == ProcessInfo(2, 3)
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
        (SLURM | {"SLURM_STEP_NUM_TASKS": ""}, r"jax cannot tell from the environment \(Slurm\)"),
        (SLURM | {"SLURM_PROCID": "2"}, "it is said to be process 2 of 2"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS=4 says .* this SLURM"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, "SLURM_PROCID=3 says that this is one of several"),
        ({"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE=two"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE=2"),
        ({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:1"}, "'OMPI_COMM_WORLD_SIZE'"),
        (OMPI | {"OMPI_COMM_WORLD_RANK": "-1"}, "it is said to be process -1 of 2"),
    ],
)
def test_a_cluster_in_which_the_process_cannot_be_identified_is_refused(
    variables: dict[str, str], sentence: str, joined: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    announce(monkeypatch, **variables)
    with pytest.raises(UsageError, match=f"{sentence}.*give --coordinator_address.*or --num_shards"):
        find_process(RunOptions())
    assert joined == []


ALONE = [
    SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # salloc: its own shell
    SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},
    {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # sbatch's script
    {"SLURM_NTASKS": "4", "SLURM_NODELIST": "node[003-004]"},
    {"SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"PMI_SIZE": "1", "PMI_RANK": "0"},
    {"JAX_COORDINATOR_PORT": "1234"},
]


@pytest.mark.parametrize("variables", ALONE)
def test_in_an_allocation_one_process_is_one_process_at_once(
    variables: dict[str, str], joined: list[Any], monkeypatch: pytest.MonkeyPatch
):
    announce(monkeypatch, **variables)
    assert find_process(RunOptions()) == ProcessInfo()
    assert joined == []


def test_srun_counts_the_processes_of_its_step(joined: list[Any], monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, **SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_ID": "0"})
    find_process(RunOptions())
    assert joined[0]["who"] == "process 1 of 3 (Slurm)"
    assert joined[0]["num_processes"] == 3


def test_in_a_detected_cluster_the_coordinator_listens_on_its_own_address_only(
    joined: list[Any], monkeypatch: pytest.MonkeyPatch
):
    announce(monkeypatch, **OMPI)
    find_process(RunOptions())
    assert joined[0]["coordinator_bind_address"] == joined[0]["coordinator_address"]
    assert joined[0]["coordinator_address"].startswith("10.96.0.1:")
    announce(monkeypatch, JAX_COORDINATOR_PORT="1234", JAX_COORDINATOR_BIND_ADDRESS="[::]:1234")
    find_process(RunOptions())
    assert joined[1]["coordinator_address"] == "10.96.0.1:1234"
    assert joined[1]["coordinator_bind_address"] == "[::]:1234"


@pytest.mark.parametrize(
    ("address", "means", "reached"),
    [
        ("node:1", ["127.0.1.1"], "10.1.2.3:1"),
        ("node:1", ["127.0.1.1", "::1"], "10.1.2.3:1"),
        ("node:1", ["10.9.9.9"], "node:1"),
        ("node:1", ["127.0.1.1", "10.9.9.9"], "node:1"),
        ("127.0.0.1:1", ["127.0.0.1"], "127.0.0.1:1"),
        ("[::1]:1", ["::1"], "[::1]:1"),
        ("localhost:1", ["127.0.0.1", "::1"], "localhost:1"),
        ("nowhere:1", [], "nowhere:1"),
    ],
)
def test_a_name_that_means_only_this_machine_to_itself_is_replaced(
    address: str, means: list[str], reached: str, monkeypatch: pytest.MonkeyPatch
):
    def getaddrinfo(*_: object, **__: object) -> list[Any]:
        if not means:
            raise socket.gaierror
        return [(0, 0, 0, "", (one, 1)) for one in means]

    class Outwards:
        def __enter__(self) -> Outwards:
            return self

        def __exit__(self, *_: object) -> None: ...

        def connect(self, _: object) -> None: ...

        def getsockname(self) -> tuple[str, int]:
            return "10.1.2.3", 4711

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "socket", lambda *_: Outwards())
    assert membership._reachable(address) == reached


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
            "--process_id must be at least 0, not -1",
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
membership.JOIN_SECONDS = 3.0
runpy.run_module("distributed_kv_cached_inference", run_name="__main__")
"""


def test_a_process_whose_others_do_not_come_says_so_and_ends(tmp_path: Path, port: int):
    address = f"127.0.0.1:{port}"
    flags = {"coordinator_address": address, "num_processes": 2, "process_id": 1}
    process = start_python(IMPATIENT, *arguments(four(tmp_path), **flags))
    out, err = process.communicate(timeout=60)
    assert f"process 1 of 2: waiting for the other 1 at {address}, 2 s so far\n" in out
    assert (process.returncode, err) == (
        75,
        f"{ERROR}process 1 of 2 at {address}: the others did not all come within 3 s; start all 2 at once\n",
    )


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.7", "Cannot assign requested address"),
        ("no-such-host.invalid", "not known|resolution|address"),
    ],
)
def test_process_0_says_at_once_that_it_cannot_listen_where_it_is_told(host: str, reason: str):
    options = RunOptions(coordinator_address=f"{host}:4711", num_processes=2, process_id=0)
    with pytest.raises(
        ClusterError, match=f"process 0 of 2 at {host}:4711: cannot join the others .*{reason}"
    ):
        find_process(options)


def test_process_0_says_at_once_that_its_port_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        options = RunOptions(coordinator_address=address, num_processes=2, process_id=0)
        with pytest.raises(ClusterError, match="Address already in use"):
            find_process(options)
