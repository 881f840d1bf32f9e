"""A store whose directory is away for a moment is waited for where it is shared; nothing is lost or twice."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import activation_fakes
import numpy as np
import pytest
from activation_fakes import read_index, settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    RetryPolicy,
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
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.005)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "store"


def open_writer(place: Path, should_stop: Callable[[], bool] = lambda: False) -> ActivationWriter:
    """Opens the writer of one of several processes."""
    return ActivationWriter(
        place, SETTINGS, provenance={}, patiently=RetryPolicy(str(place), WHO, should_stop)
    )


def assert_whole(place: Path) -> None:
    """Every sequence is there once, and every byte is right."""
    store = ActivationStore(place)
    assert len(read_index(place)) == len(store) == len(TASKS)
    assert list(verify_store(store)) == []
    assert not list(place.rglob("*.tmp"))


def content(place: Path) -> dict[str, str]:
    store = ActivationStore(place)
    return {record.key: store.sequence_digest(record) for record in store.sequences()}


def test_a_commit_waits_for_a_directory_that_comes_back_and_warns_once(
    place: Path, caplog: pytest.LogCaptureFixture
):
    gone = place.with_name("gone")
    with open_writer(place) as writer:
        place.rename(gone)
        for task in TASKS[:2]:
            writer.submit(batch(task))
        threading.Timer(0.3, lambda: gone.rename(place)).start()
        writer.submit(batch(TASKS[2]))  # as the third one in flight it waits for the first
    assert_whole(place)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"{WHO}: waiting for {place} (No such file or directory)")
    ]


def test_the_warning_is_a_line_on_stderr_where_nobody_has_set_up_logging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    missing = tmp_path / "file"

    tries = itertools.count()

    def read() -> bytes:
        if next(tries) == 1:
            missing.write_bytes(b"there")
        return missing.read_bytes()

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert RetryPolicy("the/store", WHO)(read) == b"there"
    assert capfd.readouterr().err == f"{WHO}: waiting for the/store (No such file or directory)\n"


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
                with contextlib.suppress(FileNotFoundError):  # of a file that is looked for and not there yet
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
    number: int, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    writer = open_writer(place)
    monkeypatch.setattr(local_files.os, "write", fail)
    writer.submit(batch("a"))
    with pytest.raises(StoreWriteError, match=f"shard-000000.safetensors .*{os.strerror(number)}; what was"):
        writer.close()
    assert caplog.records == []


def test_a_run_that_is_alone_waits_for_nothing(place: Path, caplog: pytest.LogCaptureFixture):
    writer = ActivationWriter(place, SETTINGS, provenance={})
    place.rename(place.with_name("gone"))
    writer.submit(batch("a"))
    with pytest.raises(StoreWriteError, match="No such file or directory; what was committed before is safe"):
        writer.close()
    assert caplog.records == []


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


def test_giving_up_ends_a_wait_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 60.0)
    policy = RetryPolicy("the/store", WHO)
    giving_up = threading.Timer(0.1, policy.give_up)
    giving_up.start()
    started = time.monotonic()
    with pytest.raises(StoreWriteError, match=rf"^{WHO}: the/store cannot be reached \(No such file"):
        policy((tmp_path / "file").read_bytes)
    assert time.monotonic() - started < 30
    giving_up.join()


def test_after_giving_up_each_action_is_tried_once(tmp_path: Path):
    policy = RetryPolicy("the/store", WHO)
    policy.give_up()
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        (tmp_path / "file").read_bytes()

    with pytest.raises(StoreWriteError, match="cannot be reached"):
        policy(fail)
    assert len(tries) == 1
    assert policy(lambda: "done") == "done"


@pytest.mark.parametrize("error", [StoreError("damaged"), KeyError("x"), KeyboardInterrupt(), MemoryError()])
def test_an_error_that_is_not_about_reaching_the_store_passes_as_it_is(error: BaseException):
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)) as raised:
        RetryPolicy("the/store", WHO)(fail)
    assert raised.value is error
    assert len(tries) == 1


def test_what_an_action_holds_is_let_go_of_when_it_is_done():
    """A batch's arrays must not wait for the garbage collector."""
    held = np.zeros(3)
    gone = weakref.ref(held)
    tries = itertools.count()

    def action(array: np.ndarray) -> None:
        if next(tries) == 0:
            raise TimeoutError("later")

    gc.disable()
    try:
        RetryPolicy("the/store", WHO)(functools.partial(action, held))
        del held
        assert gone() is None
    finally:
        gc.enable()


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
