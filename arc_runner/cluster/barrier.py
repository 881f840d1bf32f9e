"""The barrier at the end of a run of several processes: process 0 learns how each of the others has ended.

It is made of the coordination service of JAX, which runs in process 0. A process that ends connects for a
moment, leaves a word, and goes; process 0 alone waits. ``wait_at_barrier`` of JAX would keep all until the
slowest one, and a process that stays connected is aborted when process 0 dies.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage] - the client that jax.distributed.initialize makes has no public name

from arc_runner.cluster.membership import ProcessInfo, call_within
from arc_runner.errors import ClusterError
from arc_runner.signals import StopRequest
from arc_runner.waiting import Waiting

DONE, STOPPED = "done", "stopped"
NEWS_SECONDS = 1800.0  # process 0 waits while the others store something at least so often
FIGURES_SECONDS = 30.0  # what a process still does once it has stored its last sequence takes no longer
POLL_SECONDS = 1.0
_CONNECT_SECONDS = 60.0
_NEVER = 24 * 3600  # the runtime ends a process by abort() when its own time is up
_ENDED = "ended"


@contextlib.contextmanager
def telling_failure(process: ProcessInfo) -> Iterator[None]:
    """Lets process 0 know at once if the body ends by an error in another process."""
    try:
        yield
    except BaseException:
        if process.coordinator and process.index:
            tell_end(process, STOPPED)
        raise


def tell_end(process: ProcessInfo, how: str) -> bool:
    """Tells process 0 how this process has ended: DONE or STOPPED. Returns False if process 0 has ended."""
    try:
        with _connected(process) as client:
            client.key_value_set(f"{_ENDED}/{process.index}", how, allow_overwrite=True)
    except (ClusterError, jax.errors.JaxRuntimeError):
        return False
    return True


def wait_for_others(process: ProcessInfo, left: Callable[[], int], stop: StopRequest) -> dict[int, str]:
    """Waits in process 0 until all others have ended, and returns how those have of which it is known.

    Returns earlier if ``stop`` is requested, if one has stopped early, or if nothing has been stored for
    NEWS_SECONDS. ``left`` looks in the store and returns how many sequences are missing.
    """
    others = set(range(process.count)) - {process.index}
    ended: dict[int, str] = {}
    missing, since = left(), time.monotonic()

    def what() -> str:
        names = ", ".join(str(index) for index in sorted(others - set(ended)))
        return f"{process}: {missing} sequences left, waiting for process {names}"

    with stop.deferred(), Waiting(what), _connected(process) as client:
        while True:
            ended = {int(key.rpartition("/")[2]): how for key, how in client.key_value_dir_get(_ENDED)}
            now = left()
            if now < missing:
                missing, since = now, time.monotonic()
            if stop.requested or STOPPED in ended.values() or (not missing and others <= set(ended)):
                return ended
            # What another has just stored may be seen later here, as by NFS.
            nearly = not missing or others <= set(ended)
            if time.monotonic() - since >= (FIGURES_SECONDS if nearly else NEWS_SECONDS):
                return ended
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _connected(process: ProcessInfo) -> Iterator[Any]:
    """Connects to the service in process 0 for the time of the body.

    Raises:
        ClusterError: process 0 is not there, or does not answer.
    """

    def connect() -> Any:
        client = _jax.get_distributed_runtime_client(
            process.coordinator,
            process.index,
            init_timeout=_NEVER,
            heartbeat_timeout=_NEVER,
            use_compression=True,
        )
        client.connect()
        return client

    host, _, port = process.coordinator.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS):
            pass  # it listens: else connecting would go on for ever
        client = call_within(_CONNECT_SECONDS, connect)
    except OSError as error:
        reason = str(error) or "it does not answer"
        raise ClusterError(
            f"{process}: cannot reach process 0 at {process.coordinator} ({reason}); the same command "
            "continues"
        ) from error
    try:
        yield client
    finally:
        with contextlib.suppress(TimeoutError):
            call_within(_CONNECT_SECONDS, client.shutdown)
