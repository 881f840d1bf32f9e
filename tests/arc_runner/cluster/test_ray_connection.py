"""A cluster that cannot be reached, and a Ray that is not there, are told at once in a sentence."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runner_cases import ERROR, assert_refused, four, run_main

from arc_runner.cluster import ray_connection
from arc_runner.cluster.ray_connection import connected
from arc_runner.errors import ClusterError

RESUMABLE = 75


def test_without_ray_the_command_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.util.metrics", None)
    outcome = run_main(four(tmp_path), ray=True)
    assert_refused(outcome, "pip install 'qwen2-jax-activations[ray]'")


class FakeRay:
    """Ray as far as a connection uses it; replaces the handler of SIGTERM as the real one does."""

    def __init__(self, **errors: Exception) -> None:
        self.calls: list[dict[str, Any]] = []
        self.exceptions = SimpleNamespace(RayError=KeyError)
        self._private = SimpleNamespace(worker=SimpleNamespace(print_to_stdstream=print))
        self._error = errors.get("error")
        self.was_shut_down = False

    def init(self, **settings: Any) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.calls.append(settings)
        if self._error is not None:
            raise self._error

    def shutdown(self) -> None:
        self.was_shut_down = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray_connection, "import_ray", lambda: fake)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


def test_an_address_where_nobody_listens_is_told_at_once(fake: FakeRay, port: int):
    begun = time.monotonic()
    with (
        pytest.raises(
            ClusterError, match=rf"nothing answers at --ray 127.0.0.1:{port} \(Connection refused\)"
        ),
        connected(f"127.0.0.1:{port}"),
    ):
        pytest.fail("it is connected")
    assert time.monotonic() - begun < 5
    assert fake.calls == []


def test_the_command_ends_with_75_where_nobody_listens(tmp_path: Path, port: int):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    outcome = run_main(four(tmp_path), ray=f"127.0.0.1:{port}")
    assert outcome.code == RESUMABLE
    assert outcome.err.startswith(f"{ERROR}nothing answers at --ray 127.0.0.1:{port}")
    assert outcome.err.count("\n") == 1


@pytest.fixture
def listening() -> Any:
    """An address at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_signals_are_handled_as_before_and_the_connection_ends(fake: FakeRay, listening: str):
    before = signal.getsignal(signal.SIGTERM)
    with connected(listening) as ray:
        assert ray is fake
        assert signal.getsignal(signal.SIGTERM) is before
        assert not fake.was_shut_down
    assert fake.was_shut_down
    assert signal.getsignal(signal.SIGTERM) is before
    assert fake.calls[0]["address"] == listening


def test_without_an_address_that_of_the_environment_counts_then_that_of_this_machine_then_a_new_cluster(
    fake: FakeRay, listening: str, port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with connected(""):
        pass
    started = tmp_path / "ray" / "ray_current_cluster"
    started.parent.mkdir()
    started.write_text(f"127.0.0.1:{port}\n")  # of a cluster that is gone
    with connected(""):
        pass
    started.write_text(f"{listening}\n")
    with connected(""):
        pass
    monkeypatch.setenv("RAY_ADDRESS", listening.replace("127.0.0.1", "localhost"))
    with connected(""):
        pass
    addresses = [one["address"] for one in fake.calls]
    assert addresses == ["local", "local", listening, listening.replace("127.0.0.1", "localhost")]


def test_what_ray_says_against_a_connection_is_told(fake: FakeRay, listening: str):
    fake._error = ConnectionError("no node\nhere")
    refused = pytest.raises(ClusterError, match=r"cannot connect to Ray at .* \(no node here\)")
    with refused, connected(listening):
        pytest.fail("it is connected")
