"""Finds out which of a run's processes this one is, before JAX touches a device.

JAX's distributed runtime introduces the processes of a cluster to each other, so that each finds its devices.
The processes leave it at once, as it aborts all of them when process 0 dies. Its service, in process 0, stays
until that process ends: there the others tell that they have ended (``barrier``).
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
from jax._src import distributed  # to set back what initialize leaves behind; shutdown does not
from jax._src.clusters import ClusterEnv  # the list that jax.distributed.initialize asks has no public name
from jax.extend.backend import clear_backends

from arc_runner.errors import ClusterError, UsageError
from arc_runner.options import RunOptions
from arc_runner.waiting import Waiting

Result = TypeVar("Result")
JOIN_SECONDS = 300.0  # machines of one cluster start minutes apart
_OUTSIDE = ("192.0.2.1", 9)  # an address of no machine (RFC 5737); nothing is sent there
_FIRST_OWN_STEP = (
    4294967290  # of SLURM; from here on they are of the shell itself: interactive, batch, extern
)
_BY_HAND = "give --coordinator_address, --num_processes and --process_id, or --num_shards and --shard_index"


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Tells which of a run's processes this one is; ``index`` is also its host index in the store."""

    index: int = 0
    count: int = 1
    coordinator: str = ""  # HOST:PORT of the service of JAX in process 0; "" without a cluster

    def __str__(self) -> str:
        return f"{'process' if self.coordinator else 'shard'} {self.index} of {self.count}"


def find_process(options: RunOptions) -> ProcessInfo:
    """Finds out which process this is, from the flags or else the environment, and joins its cluster if any.

    Raises:
        UsageError: the environment says that there are several processes, and not which one this is.
        ClusterError: the others did not come.
    """
    if options.num_shards is not None and options.shard_index is not None:
        return ProcessInfo(options.shard_index, options.num_shards)
    address, count, index = options.coordinator_address, options.num_processes, options.process_id
    if address is not None and count is not None and index is not None:
        return _join(
            f"process {index} of {count}", count, lambda: _arguments(address, count, index) | _UNDETECTED
        )
    with Waiting("asking the environment which of several processes this is"):
        found = _announced()
    if found is None:
        return ProcessInfo()
    return _join(str(found), found.count, lambda: _arguments(found.address(), found.count, found.index))


_UNDETECTED = {"cluster_detection_method": "deactivate"}


@dataclasses.dataclass(frozen=True)
class _Announced:
    """Tells what the environment calls this process."""

    name: str  # of the kind of cluster
    index: int
    count: int
    kind: type[ClusterEnv]

    def __str__(self) -> str:
        return f"process {self.index} of {self.count} ({self.name})"

    def address(self) -> str:
        """Returns where the processes meet; may wait for the name of the first machine to be known."""
        port = os.environ.get("JAX_COORDINATOR_PORT")
        return _reachable(
            self.kind.get_coordinator_address(timeout_secs=int(JOIN_SECONDS), override_coordinator_port=port)
        )


def _arguments(address: str, count: int, index: int) -> dict[str, Any]:
    """Returns the arguments of ``jax.distributed.initialize``.

    The address is bound as it is: by itself jax listens on every network of the machine.
    """
    return {
        "coordinator_address": address,
        "coordinator_bind_address": os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address),
        "num_processes": count,
        "process_id": index,
    }


def _reachable(address: str) -> str:
    """Returns ``address`` in a form under which the other machines reach it as well.

    Some systems let a machine's own name mean 127.0.1.1, which no other machine reaches. Such a name is
    replaced by the machine's address on the network; this process is on that machine then.
    """
    host, _, port = address.rpartition(":")
    name = host.strip("[]")
    try:
        found = {info[4][0] for info in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)}
        if name == "localhost" or name in found or not all(map(_is_loopback, found)):
            return address
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outwards:
            outwards.connect(_OUTSIDE)
            return f"{outwards.getsockname()[0]}:{port}"
    except OSError:  # not known yet, or no network
        return address


def _check_listening(address: str) -> None:
    """Raises OSError where this machine cannot listen at ``address``: the runtime may crash there."""
    host, _, port = address.rpartition(":")
    error: OSError = OSError("the name means no address")
    for family, kind, _, _, place in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind) as listening:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind(place)
            return
        except OSError as refused:
            error = refused
    raise error


def _is_loopback(address: Any) -> bool:
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback


def _announced() -> _Announced | None:
    """Returns what the environment calls this process if it is one of several, else None.

    Raises:
        UsageError: it says that there are several, and not which one this is.
    """
    in_job = "JOB_COMPLETION_INDEX" in os.environ  # any other pod of Kubernetes is a machine of its own
    for kind in ClusterEnv._cluster_types:
        name = kind.__name__.removesuffix("Cluster")
        if kind.opt_in_only_method or (name == "K8s" and not in_job):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error below says that a package is missing
                if kind.is_env_present():
                    return _process(name, kind)
        except Exception as error:  # many kinds: requests to metadata servers, missing or odd variables
            reason = " ".join(str(error).split())
            raise UsageError(
                f"jax cannot tell from the environment ({name}) which process this is ({reason}); {_BY_HAND}"
            ) from error
    if in_job:
        raise UsageError(
            "this pod is one of an indexed Job, but jax finds the others only with the package kubernetes "
            f"(pip install 'jax[k8s]'): install it, or {_BY_HAND}"
        )
    for launcher, variables in _NOT_DETECTED.items():
        for variable, least in variables.items():
            text = os.environ.get(variable, "0")
            if not text.isdecimal() or int(text) >= least:
                raise UsageError(
                    f"{variable}={text} says that this is one of several processes, but jax does not find "
                    f"the other processes of this {launcher} by itself: {_BY_HAND}"
                )
    return None


# What says that there are several processes, where jax has not detected the launcher: from which number on.
_NOT_DETECTED = {
    "SLURM": {"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": 2},
    "MPI": {"PMI_SIZE": 2},
}


def _process(name: str, kind: type[ClusterEnv]) -> _Announced | None:
    """Returns which process this is in a cluster of one kind; None where it is the only one."""
    count = kind.get_process_count()
    if name == "Slurm":
        # That count is of the whole allocation where the command was not started by srun.
        count = int(os.environ.get("SLURM_STEP_NUM_TASKS", count))
        if int(os.environ.get("SLURM_STEP_ID", 0)) >= _FIRST_OWN_STEP:
            count = 1
    if count <= 1:
        return None
    index = kind.get_process_id()
    if not 0 <= index < count:
        raise ValueError(f"it is said to be process {index} of {count}, which are counted from 0")
    return _Announced(name, index, count, kind)


def call_within(seconds: float, action: Callable[[], Result]) -> Result:
    """Returns what ``action`` returns, or raises what it raises.

    It runs on another thread: Python handles signals on the main thread, which must not wait in the runtime.
    The limit is to be shorter than the runtime's own, which ends the process by abort().

    Raises:
        TimeoutError: it takes longer, and goes on until the process ends.
    """
    outcome: Future[Result] = Future()

    def call() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, name="jax-cluster", daemon=True).start()
    return outcome.result(seconds)


def _join(who: str, count: int, arguments: Callable[[], dict[str, Any]]) -> ProcessInfo:
    """Joins the cluster, finds the devices, and leaves the cluster again; process 0 keeps its service.

    Raises:
        ClusterError: the others did not come in time, or the runtime cannot reach them.
    """
    place = ""

    def join() -> ProcessInfo:
        nonlocal place
        given = arguments()
        place = f" at {given['coordinator_address']}"
        if given["process_id"] == 0:
            _check_listening(given["coordinator_bind_address"])
        # The service would handle SIGTERM from now on.
        jax.config.update("jax_enable_preemption_service", False)
        seconds = int(2 * JOIN_SECONDS) + 1
        jax.distributed.initialize(
            **given,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
        jax.local_devices()
        found = ProcessInfo(jax.process_index(), jax.process_count(), given["coordinator_address"])
        state = distributed.global_state
        if state.client is not None:
            state.client.shutdown()
        # JAX writes its compilation cache in process 0 only; each process has its own cache.
        state.client, state.process_id, state.num_processes = None, 0, 1
        if jax.default_backend() == "cpu":
            # A CPU device keeps its number in the cluster, which counts for the compilation cache: no
            # program could be shared with a process that ran alone.
            clear_backends()
        return found

    try:
        with Waiting(lambda: f"{who}: waiting for the other {count - 1}{place}"):
            return call_within(JOIN_SECONDS, join)
    except TimeoutError as error:
        raise ClusterError(
            f"{who}{place}: the others did not all come within {JOIN_SECONDS:.0f} s; "
            f"start all {count} at once"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ClusterError(
            f"{who}{place}: cannot join the others ({reason}); start all {count} again"
        ) from error
