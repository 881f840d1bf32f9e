"""Finds out which of a run's processes this one is, before JAX touches a device.

JAX's distributed runtime introduces the processes of a cluster to each other, so that each finds its devices.
The processes leave it at once: each generates alone, and the runtime would only do harm from then on. It ends
all processes when one dies, and lets none go before the slowest.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from typing import Any

import jax
from jax._src import distributed  # to set back what initialize leaves behind; shutdown does not
from jax._src.clusters import ClusterEnv  # the list that jax.distributed.initialize asks has no public name
from jax.extend.backend import clear_backends

from arc_runner.errors import ClusterError, UsageError
from arc_runner.options import RunOptions

JOIN_SECONDS = 300.0  # machines of one cluster start minutes apart
_BY_HAND = "give --coordinator_address, --num_processes and --process_id, or --num_shards and --shard_index"


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Tells which of a run's processes this one is; ``index`` is also its host index in the store."""

    index: int = 0
    count: int = 1
    claims: bool = False  # True: work is claimed as it is needed; False: each process has a fixed share

    def __str__(self) -> str:
        return f"{'process' if self.claims else 'shard'} {self.index} of {self.count}"


def find_process(options: RunOptions) -> ProcessInfo:
    """Finds out which process this is, from the flags or else the environment, and joins its cluster if any.

    Raises:
        UsageError: the environment says that there are several processes, and not which one this is.
        ClusterError: the others did not come.
    """
    if options.num_shards is not None and options.shard_index is not None:
        return ProcessInfo(options.shard_index, options.num_shards)
    if options.coordinator_address is not None:
        # The address is bound as it was given: by itself jax listens on every network of the machine.
        who = f"process {options.process_id} of {options.num_processes} at {options.coordinator_address}"
        return _join(
            who,
            coordinator_address=options.coordinator_address,
            coordinator_bind_address=options.coordinator_address,
            num_processes=options.num_processes,
            process_id=options.process_id,
            cluster_detection_method="deactivate",
        )
    announced = _announced()
    return ProcessInfo() if announced is None else _join(announced)


def _announced() -> str | None:
    """Returns what the environment calls this process if it is one of several, else None."""
    in_job = "JOB_COMPLETION_INDEX" in os.environ  # any other pod of Kubernetes is a machine of its own
    for kind in ClusterEnv._cluster_types:
        name = kind.__name__.removesuffix("Cluster")
        if kind.opt_in_only_method or (name == "K8s" and not in_job):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error below says that a package is missing
                if kind.is_env_present():
                    count = kind.get_process_count()
                    return f"process {kind.get_process_id()} of {count} ({name})" if count > 1 else None
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
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise UsageError(f"jax does not find the other processes of this Open MPI by itself: {_BY_HAND}")
    return None


def _join(who: str, **arguments: Any) -> ProcessInfo:
    """Joins the cluster, finds the devices, and leaves the cluster again.

    Done on another thread: Python handles signals on the main thread, which must not wait in the runtime.
    Our time limit is shorter than the runtime's, which ends the process by abort().

    Raises:
        ClusterError: the others did not come in time, or the runtime cannot reach them.
    """
    errors: list[Exception] = []
    found: list[ProcessInfo] = []

    def join() -> None:
        try:
            # The service would handle SIGTERM from now on.
            jax.config.update("jax_enable_preemption_service", False)
            seconds = int(2 * JOIN_SECONDS) + 1
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=seconds,
                heartbeat_timeout_seconds=seconds,
                shutdown_timeout_seconds=seconds,
            )
            jax.local_devices()
            found.append(
                ProcessInfo(jax.process_index(), jax.process_count(), claims=jax.process_count() > 1)
            )
            jax.distributed.shutdown()
            # JAX writes its compilation cache in process 0 only; each process has its own cache.
            distributed.global_state.process_id, distributed.global_state.num_processes = 0, 1
            if jax.default_backend() == "cpu":
                # A CPU device keeps its number in the cluster, which counts for the compilation cache: no
                # program could be shared with a process that ran alone.
                clear_backends()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=join, name="join-cluster", daemon=True)
    thread.start()
    thread.join(JOIN_SECONDS)
    if thread.is_alive():
        raise ClusterError(f"{who}: the others did not all come within {JOIN_SECONDS:.0f} s")
    if errors:
        reason = " ".join(str(errors[0]).split())
        raise ClusterError(f"{who}: cannot join the others ({reason})") from errors[0]
    return found[0]
