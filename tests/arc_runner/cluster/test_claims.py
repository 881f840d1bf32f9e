"""Leases: one owner at a time, taken over when it dies, whatever clocks and file systems do."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from activation_store import RetryPolicy, StoreWriteError, retry
from arc_runner.cluster import claims
from arc_runner.cluster.claims import LEASE_SECONDS, Claims
from arc_runner.cluster.shared_files import SharedFiles


def member(directory: Path | str, index: int) -> Claims:
    """Of a process that has given one sign of life."""
    return Claims(SharedFiles(str(directory), RetryPolicy(str(directory), f"process {index} of 2")), index)


def age(directory: Path, index: int, seconds: float) -> None:
    """The last sign of life of a process was so long ago."""
    path = directory / "run" / f"process-{index:05d}"
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("where", ["directory", "url"])
def test_what_one_process_has_claimed_no_other_can_claim(where: str, tmp_path: Path):
    directory = tmp_path if where == "directory" else f"memory:/{tmp_path}"
    first, second = member(directory, 0), member(directory, 1)
    assert first.acquire("a")
    assert not second.acquire("a")
    assert not first.acquire("a")  # it has it
    assert second.acquire("b")
    assert (first.holder("a"), first.holder("b"), first.holder("c")) == ("0", "1", None)
    first.release("a")
    assert second.acquire("a")
    assert first.holder("a") == "1"


def test_a_dead_owners_lease_is_taken_over_once_it_has_expired(tmp_path: Path):
    dead, heir, late = (member(tmp_path, index) for index in range(3))
    assert dead.acquire("a")
    age(tmp_path, 0, LEASE_SECONDS - 5)
    assert not heir.acquire("a")
    age(tmp_path, 0, 10)
    assert heir.holder("a") is None
    assert heir.acquire("a")
    assert not late.acquire("a")
    assert late.holder("a") == "1"
    heir.release("a")
    assert late.acquire("a")


def test_a_process_that_starts_again_claims_its_old_leases_at_once(tmp_path: Path):
    assert member(tmp_path, 0).acquire("a")
    assert member(tmp_path, 0).acquire("a")


def test_a_process_that_ends_frees_its_leases(tmp_path: Path):
    with member(tmp_path, 0) as first:
        assert first.acquire("a")
        assert not member(tmp_path, 1).acquire("a")
    assert member(tmp_path, 1).acquire("a")


def test_a_file_that_is_written_anew_is_never_seen_half_made(tmp_path: Path):
    files = SharedFiles(str(tmp_path))
    data = b"x" * 1_000_000
    files.write("figures", data)
    ended = threading.Event()

    def rewrite() -> None:
        while not ended.is_set():
            files.write("figures", data)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(rewrite)
        seen = {len(there[0]) for _ in range(200) if (there := files.read("figures"))}
        ended.set()
    assert seen == {len(data)}
    assert files.names() == ["figures"]


def test_of_many_processes_that_take_over_a_lease_one_gets_it(tmp_path: Path):
    assert member(tmp_path, 0).acquire("a")
    age(tmp_path, 0, LEASE_SECONDS + 1)
    heirs = [member(tmp_path, index) for index in range(1, 9)]
    start = threading.Barrier(len(heirs))
    with ThreadPoolExecutor(len(heirs)) as pool:
        got = list(pool.map(lambda heir: (start.wait(), heir.acquire("a"))[1], heirs))
    assert got.count(True) == 1


@pytest.mark.parametrize("skew", [-86400.0, 86400.0])
def test_a_machine_whose_clock_is_wrong_neither_takes_nor_loses_leases(
    skew: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    owner = member(tmp_path, 0)
    assert owner.acquire("a")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    other = member(tmp_path, 1)
    assert not other.acquire("a")
    age(tmp_path, 0, LEASE_SECONDS + 1)
    assert other.acquire("a")


@pytest.mark.parametrize("skew", [-86400.0, 86400.0])
def test_a_file_system_clock_that_differs_from_the_machines_does_no_harm(
    skew: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    modified = SharedFiles._modified
    monkeypatch.setattr(SharedFiles, "_modified", lambda self, name: modified(self, name) + skew)
    owner, other = member(tmp_path, 0), member(tmp_path, 1)
    assert owner.acquire("a")
    assert not other.acquire("a")
    age(tmp_path, 0, LEASE_SECONDS + 1)
    assert other.acquire("a")


def test_a_lease_file_that_is_still_empty_counts_until_it_is_old(tmp_path: Path):
    other = member(tmp_path, 1)
    half = tmp_path / "run" / "a.0"
    half.touch()
    assert not other.acquire("a")
    assert other.holder("a") == "?"
    then = half.stat().st_mtime - LEASE_SECONDS - 1
    os.utime(half, (then, then))
    assert other.acquire("a")


def test_a_process_at_work_keeps_its_heartbeat_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.02)
    life = tmp_path / "run" / "process-00000"
    with member(tmp_path, 0) as first:
        assert first.acquire("a")
        age(tmp_path, 0, LEASE_SECONDS + 1)
        deadline = time.monotonic() + 10
        while member(tmp_path, 1).holder("a") != "0":
            assert time.monotonic() < deadline
    assert not life.exists()


def test_a_process_whose_device_hangs_counts_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(claims, "STALL_SECONDS", 0.1)
    other = member(tmp_path, 1)
    with member(tmp_path, 0) as stuck:
        assert stuck.acquire("a")
        time.sleep(0.3)
        age(tmp_path, 0, LEASE_SECONDS + 1)
        time.sleep(0.1)
        assert other.holder("a") is None
        stuck.progress()
        time.sleep(0.1)
        assert other.holder("a") == "0"


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """A store whose directory is not there, as when a file server is rebooted."""
    store = tmp_path / "store"
    store.mkdir()
    return store


@pytest.mark.parametrize("what", ["acquire", "take-over", "release", "names"])
def test_a_directory_that_is_away_for_a_moment_is_waited_for(
    what: str, away: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.05)
    first, other = member(away, 0), member(away, 1)
    assert other.acquire("b")
    age(away, 1, LEASE_SECONDS + 1)
    away.rename(tmp_path / "gone")
    back = threading.Timer(0.3, lambda: (tmp_path / "gone").rename(away))
    back.start()
    if what == "acquire":
        assert first.acquire("a")
    elif what == "take-over":
        assert first.acquire("b")
    elif what == "release":
        other.release("b")
        assert first.acquire("b")
    else:
        assert first.files.names() == ["b.0", "process-00000", "process-00001"]
    back.join()


def test_a_directory_that_stays_away_is_an_error_that_names_the_process(
    away: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retry, "AWAY_SECONDS", 0.05)
    first = member(away, 0)
    away.rename(tmp_path / "gone")
    with pytest.raises(StoreWriteError, match=r"^process 0 of 2: .*/store cannot be reached \(No such"):
        first.acquire("a")


def test_a_run_that_is_to_stop_does_not_wait_for_the_directory(away: Path, tmp_path: Path):
    files = SharedFiles(str(away), RetryPolicy(str(away), should_stop=lambda: True))
    away.rename(tmp_path / "gone")
    with pytest.raises(StoreWriteError):
        files.create("a", b"")
