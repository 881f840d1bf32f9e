"""A file is put in its place whole or not at all, whatever breaks, and is durable when that is done."""

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from activation_store import StoreError, local_files
from activation_store.local_files import LocalFiles, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("as_path", [Path, str])
def test_the_chunks_lie_end_to_end_and_are_measured(tmp_path: Path, as_path: Callable[[Path], str | Path]):
    path = tmp_path / "file"
    empty = np.empty(0, np.uint8).data
    stored = write_atomic(as_path(path), [b"one", memoryview(b" and "), empty, b"two"])
    assert path.read_bytes() == b"one and two"
    assert stored.size == 11
    assert stored.sha256 == hashlib.sha256(b"one and two").hexdigest()
    assert stored.mtime_ns == path.stat().st_mtime_ns
    assert names(tmp_path) == ["file"]


def test_what_was_there_is_replaced_as_a_whole(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"a longer old content")
    write_atomic(path, [b"new"])
    assert path.read_bytes() == b"new"


def test_the_mode_is_that_of_any_new_file(tmp_path: Path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", [b"x"])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_the_file_is_synced_before_its_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        calls.append(f"fsync {'folder' if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 'file'}")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        assert self.parent == target.parent
        return real_replace(self, target)

    monkeypatch.setattr(local_files.os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomic(tmp_path / "file", [b"x"])
    assert calls == ["fsync file", "rename", "fsync folder"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, "replace") if step == "replace" else (local_files.os, step)), full)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomic(path, [b"new"])
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_an_error_of_the_chunks_passes_and_leaves_the_old_file(tmp_path: Path):
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise MemoryError("copy failed")

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(MemoryError, match="copy failed"):
        write_atomic(tmp_path / "file", chunks())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "away" / "file", [b"x"])
    assert names(tmp_path) == []


def test_two_that_write_the_same_file_at_once_both_write_it_whole(tmp_path: Path):
    """The second one begins and ends while the first one writes."""
    path = tmp_path / "file"

    def chunks() -> Iterator[bytes]:
        yield b"fir"
        other = threading.Thread(target=write_atomic, args=(path, [b"second"]))
        other.start()
        other.join()
        assert path.read_bytes() == b"second"
        yield b"st"

    write_atomic(path, chunks())
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


# --- The folder of one writer -------------------------------------------------------------------------------


def test_who_is_kept_out_is_told_by_whom(tmp_path: Path):
    release = LocalFiles(tmp_path, str(tmp_path)).open_host(0)
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    who = rf"as host 0 \(process {os.getpid()} on [\w.-]+, since {since}\); wait for it"
    for _ in range(2):
        with pytest.raises(StoreError, match=who):
            LocalFiles(tmp_path, str(tmp_path)).open_host(0)
    release()
    LocalFiles(tmp_path, str(tmp_path)).open_host(0)()


@pytest.mark.parametrize("noted", ["", "process 1 on \x1b[2J", "\xff" * 5000, "process x on y, since 1"])
def test_what_a_lock_says_is_quoted_only_if_it_is_ours(noted: str, tmp_path: Path):
    release = LocalFiles(tmp_path, str(tmp_path)).open_host(0)
    (tmp_path / "host-00000" / "writer.lock").write_text(noted)
    with pytest.raises(StoreError, match=r"as host 0; wait for it"):
        LocalFiles(tmp_path, str(tmp_path)).open_host(0)
    release()
