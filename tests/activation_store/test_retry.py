"""A store whose directory is away for a moment: waited for where it is shared, and nothing lost or twice."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import activation_fakes
import pytest
from activation_fakes import read_index, settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    Patience,
    StoreError,
    StoreWriteError,
    local_files,
    retry,
    verify_store,
)

SETTINGS = settings(hook_names=("blocks.10.hook_resid_post",))
TASKS = ("a", "bb", "ccc")
WHO = "process 1 of 4"


def batch(task: str) -> list[FinishedSequence]:
    return activation_fakes.batch(task, samples=1, of=SETTINGS)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.005)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "store"


def open_writer(place: Path, should_stop: Callable[[], bool] = lambda: False) -> ActivationWriter:
    """Of one of several processes."""
    return ActivationWriter(place, SETTINGS, provenance={}, patiently=Patience(str(place), WHO, should_stop))


def assert_whole(place: Path) -> None:
    """Every sequence is there once, and every byte is right."""
    store = ActivationStore(place)
    assert len(read_index(place)) == len(store) == len(TASKS)
    assert list(verify_store(store)) == []
    assert not list(place.rglob("*.tmp"))


def content(place: Path) -> dict[str, str]:
    store = ActivationStore(place)
    return {record.key: store.sequence_digest(record) for record in store.sequences()}


def test_a_commit_waits_for_a_directory_that_comes_back(place: Path, capfd: pytest.CaptureFixture[str]):
    gone = place.with_name("gone")
    with open_writer(place) as writer:
        place.rename(gone)
        for task in TASKS[:2]:
            writer.submit(batch(task))
        threading.Timer(0.3, lambda: gone.rename(place)).start()
        writer.submit(batch(TASKS[2]))  # as the third one in flight it waits for the first
    assert_whole(place)
    assert capfd.readouterr().err == f"{WHO}: waiting for {place} (No such file or directory)\n"


def test_a_mount_point_without_its_mount_gets_no_new_store(place: Path):
    gone = place.with_name("gone")
    with open_writer(place) as writer:
        place.rename(gone)
        place.mkdir()

        def come_back() -> None:
            assert list(place.iterdir()) == []
            place.rmdir()
            gone.rename(place)

        for task in TASKS[:2]:
            writer.submit(batch(task))
        back = threading.Timer(0.3, come_back)
        back.start()
        writer.submit(batch(TASKS[2]))
        back.join()
    assert_whole(place)


class Flaky:
    """The steps of commits, of which number ``failing`` fails, and is done nevertheless or not.

    Writes that follow each other are one step, of which half of the first one is done.
    """

    def __init__(self, failing: int = -1, *, done: bool = False) -> None:
        self.steps, self._last = 0, ""
        self._failing, self._done = failing, done

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("open", "write", "fsync"):
            patch.setattr(local_files.os, name, self._flaky(name, getattr(os, name)))
        patch.setattr(Path, "replace", self._flaky("replace", Path.replace))

    def _flaky(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            same, self._last = name == self._last == "write", name
            self.steps += not same
            if same or self.steps - 1 != self._failing:
                return real(*args)
            if self._done:
                result = real(*args) if name != "write" else real(args[0], args[1][: len(args[1]) // 2])
                if name == "open":
                    os.close(result)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        return call


def write(place: Path, flaky: Flaky) -> None:
    with open_writer(place) as writer, pytest.MonkeyPatch.context() as patch:
        flaky.install(patch)
        for task in TASKS:
            writer.submit(batch(task))
        writer.close()


@pytest.mark.parametrize("done", [False, True], ids=["not-done", "done"])
def test_whichever_step_of_a_commit_fails_the_store_is_whole(done: bool, tmp_path: Path):
    """As on NFS, where an error does not tell whether what was asked for is done."""
    undisturbed = Flaky()
    write(tmp_path / "undisturbed", undisturbed)
    expected = content(tmp_path / "undisturbed")
    for failing in range(undisturbed.steps):
        place = tmp_path / str(failing)
        flaky = Flaky(failing, done=done)
        write(place, flaky)
        assert flaky.steps > undisturbed.steps
        assert_whole(place)
        assert content(place) == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_directory_is_not_waited_for(
    number: int, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    writer = open_writer(place)
    monkeypatch.setattr(local_files.os, "write", fail)
    writer.submit(batch("a"))
    with pytest.raises(StoreWriteError, match=f"shard-000000.safetensors .*{os.strerror(number)}; what was"):
        writer.close()
    assert capfd.readouterr().err == ""


def test_a_run_that_is_alone_waits_for_nothing(place: Path, capfd: pytest.CaptureFixture[str]):
    writer = ActivationWriter(place, SETTINGS, provenance={})
    place.rename(place.with_name("gone"))
    writer.submit(batch("a"))
    with pytest.raises(StoreWriteError, match="No such file or directory; what was committed before is safe"):
        writer.close()
    assert capfd.readouterr().err == ""


def test_a_directory_that_stays_away_ends_the_run_and_is_not_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retry, "AWAY_SECONDS", 0.1)
    writer = open_writer(place)
    place.rename(place.with_name("gone"))
    writer.submit(batch("a"))
    with pytest.raises(StoreWriteError, match=rf"^{WHO}: {place} cannot be reached \(No such file"):
        writer.close()
    assert not place.exists()


def test_a_run_that_is_to_stop_waits_no_longer(place: Path):
    stopping = threading.Event()
    writer = open_writer(place, stopping.is_set)
    place.rename(place.with_name("gone"))
    writer.submit(batch("a"))
    threading.Timer(0.1, stopping.set).start()
    with pytest.raises(StoreWriteError, match="cannot be reached"):
        writer.close()


def test_the_lock_holds_while_the_directory_is_away_and_after(place: Path):
    with open_writer(place):
        gone = place.rename(place.with_name("gone"))
        with pytest.raises(StoreError, match="in use"):
            open_writer(gone)
        gone.rename(place)
        with pytest.raises(StoreError, match="in use"):
            open_writer(place)


def test_an_index_that_somebody_else_has_written_to_is_left_as_it_is(place: Path):
    index = place / "host-00000" / "index.jsonl"
    with open_writer(place) as writer:
        writer.submit(batch("a"))
        writer.close()
    others = index.read_bytes()
    writer = open_writer(place)
    writer.submit(batch("bb"))
    while len(read_index(place)) < 2:
        pass
    index.write_bytes(others)
    writer.submit(batch("ccc"))
    with pytest.raises(StoreWriteError, match="somebody else has changed it"):
        writer.close()
    assert index.read_bytes() == others
