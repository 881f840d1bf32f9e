"""Which of a run's processes this one is, found out before jax touches a device.

jax's own runtime introduces the processes of a cluster to each other, so that each finds its devices, and is
left again at once. Every process generates alone, and what the runtime does from then on would only cost
work: it ends all processes when one dies, and lets none go before the slowest.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from typing import Any

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; it has no public name
from jax.extend.backend import clear_backends

from arc_runner.options import RunOptions, UsageError

JOIN_SECONDS = 300.0  # machines of one cluster start minutes apart
_BY_HAND = "give --coordinator_address, --num_processes and --process_id, or --num_shards and --shard_index"


class ClusterError(RuntimeError):
    """The processes of a run did not find each other; one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of a run; ``index`` is its host index in the store."""

    index: int = 0
    count: int = 1
    claims: bool = False  # work is claimed as it is needed; else each process has a fixed share

    def __str__(self) -> str:
        return f"{'process' if self.claims else 'shard'} {self.index} of {self.count}"


def find_place(options: RunOptions) -> Place:
    """The flags' word, else the environment's; joins the cluster where there is one.

    Raises:
        UsageError: the environment says that there are several processes, and not which one this is.
        ClusterError: the others did not come.
    """
    if options.num_shards is not None and options.shard_index is not None:
        return Place(options.shard_index, options.num_shards)
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
    return Place() if announced is None else _join(announced)


def _announced() -> str | None:
    """What the environment calls this process, when it is one of several."""
    in_job = "JOB_COMPLETION_INDEX" in os.environ  # any other pod of Kubernetes is a machine of its own
    for kind in ClusterEnv._cluster_types:
        name = kind.__name__.removesuffix("Cluster")
        if kind.opt_in_only_method or (name == "K8s" and not in_job):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a package is missing is said below
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


def _join(who: str, **arguments: Any) -> Place:
    """Meets the other processes, finds the devices, and takes leave of the others.

    On a thread of its own: signals are handled on the main thread, which must not sit in the runtime. Our
    time limit is the shorter one, as the runtime ends the process by abort().
    """
    errors: list[Exception] = []
    places: list[Place] = []

    def join() -> None:
        try:
            # It would handle SIGTERM from now on.
            jax.config.update("jax_enable_preemption_service", False)
            patience = int(2 * JOIN_SECONDS) + 1
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=patience,
                heartbeat_timeout_seconds=patience,
                shutdown_timeout_seconds=patience,
            )
            jax.local_devices()
            places.append(Place(jax.process_index(), jax.process_count(), claims=jax.process_count() > 1))
            jax.distributed.shutdown()
            # Else only process 0 would keep what it compiles; each has its own, often on its own disk.
            distributed.global_state.process_id, distributed.global_state.num_processes = 0, 1
            if jax.default_backend() == "cpu":
                # Its number among all devices would count for what is compiled, and none could be shared.
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
    return places[0]
