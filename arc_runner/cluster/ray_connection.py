"""Connects the driver to a Ray cluster, or starts one on this machine; every flaw is one sentence, soon."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from arc_runner.console import say
from arc_runner.errors import ClusterError, UsageError
from arc_runner.waiting import Waiting

_REACHED_SECONDS = 10.0
_OBJECT_BYTES = 2**27  # for Ray's own objects, where the cluster is ours; a run keeps none there


def import_ray() -> ModuleType:
    """Returns the module ``ray``.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing unless the user says so
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its future default, else it warns
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"--ray needs the package ray ({error}): pip install 'qwen2-jax-activations[ray]'"
        ) from error
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Connects to the cluster at ``address`` for the time of the body; yields the module ``ray``.

    An empty address means that of RAY_ADDRESS, else the cluster that this machine is in, else one that is
    started here and ends with the body. Signals are handled as before.

    Raises:
        UsageError: Ray is not installed.
        ClusterError: the cluster cannot be reached.
    """
    ray = import_ray()
    found = address or os.environ.get("RAY_ADDRESS", "") or _started_here()
    own = not found
    if found:
        _check_reached(found)
    what = "starting Ray on this machine" if own else f"connecting to Ray at {found}"
    with Waiting(what), _keeping_handlers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Ray itself will change
        # On stdout it would tell of each lost worker in many words, which the driver does in a sentence.
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
        settings = {"include_dashboard": False, "object_store_memory": _OBJECT_BYTES} if own else {}
        try:
            ray.init(
                address="local" if own else found,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                **settings,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())
            raise ClusterError(f"cannot {what.replace('ing', '', 1)} ({reason})") from error
    say("started Ray on this machine, for this run" if own else f"connected to Ray at {found}")
    try:
        yield ray
    finally:
        with _keeping_handlers():
            ray.shutdown()


def _started_here() -> str:
    """Returns the address of the cluster that `ray start` began on this machine, if it answers; else ""."""
    try:
        address = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
        _reach(address)
    except (OSError, ValueError):
        return ""
    return address


def _check_reached(address: str) -> None:
    """Raises ClusterError where nobody listens: Ray itself would try for minutes."""
    with Waiting(f"looking for Ray at {address}"):
        try:
            _reach(address)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ClusterError(
                f"nothing answers at --ray {address} ({reason}): is the cluster up (`ray status`), and is "
                "this the head's HOST:PORT, by default port 6379?"
            ) from error


def _reach(address: str) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _REACHED_SECONDS).close()


@contextlib.contextmanager
def _keeping_handlers() -> Iterator[None]:
    """Sets back the handlers of signals, which Ray replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                with contextlib.suppress(ValueError):  # not the main thread
                    signal.signal(number, handler)
