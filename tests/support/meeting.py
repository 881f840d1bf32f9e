"""The coordination service of JAX in this process, as process 0 of a run has it once all have met."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

from arc_runner.cluster import barrier
from arc_runner.cluster.membership import ProcessInfo


def free_address() -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


def processes(count: int, address: str) -> list[ProcessInfo]:
    """The processes of a run that meet at ``address``."""
    return [ProcessInfo(index, count, address) for index in range(count)]


@contextlib.contextmanager
def meeting(count: int) -> Iterator[list[ProcessInfo]]:
    """So many processes that have met, and left again. The service stays for the time of the body."""
    address = free_address()
    service = _jax.get_distributed_runtime_service(address, count, heartbeat_timeout=99, shutdown_timeout=99)
    members = processes(count, address)

    def join(process: ProcessInfo) -> None:
        with barrier._connected(process):
            pass

    try:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(join, members))
        yield members
    finally:
        service.shutdown()
