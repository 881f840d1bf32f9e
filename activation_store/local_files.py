"""A store in a local directory, and the one way in which this project puts a whole file in its place."""

import contextlib
import hashlib
import mmap
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock
import numpy as np

from activation_store.format import StoreError, host_name, host_number, shard_number
from activation_store.store_files import INDEX, INDEX_FOLDER, FileStatus, StoredFile, writing

_LOCK = "writer.lock"
_TEMP = ".tmp"
_HOLDER = re.compile(r"process \d+ on [\w.-]+, since [\d :-]+")


def write_atomic(
    path: str | os.PathLike[str],
    chunks: Iterable[bytes | memoryview],
    *,
    temporary: str | os.PathLike[str] | None = None,
) -> StoredFile:
    """Writes `chunks` end to end so that `path` at any moment holds its old content or all of the new.

    The bytes go to a temporary file in the same folder, which is fsynced and renamed to `path`; then the
    folder is fsynced. When this returns, the file survives a crash. It gets the mode that the umask gives any
    new file. After an error the temporary file is removed, and calling again is safe.

    Args:
        path: a file in a folder that exists; a file that is there is replaced.
        chunks: the bytes; views are one-dimensional, of single bytes. Errors of the iterable pass through.
        temporary: the temporary file's path, for a caller who keeps others from writing there and clears away
            what a crash leaves. By default it is hidden and has a name that nobody else uses.

    Raises:
        OSError: the file cannot be written. `path` is then as it was, unless only the last fsync failed.
    """
    path = Path(path)
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_TEMP}")
    temp = hidden if temporary is None else Path(temporary)
    try:
        written = _write_synced(temp, chunks)
        temp.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that is raised is the one that says what is wrong
            temp.unlink()
        raise
    _sync_folder(path.parent)
    return written


class LocalFiles:
    """A store's files in a directory. Each change counts once file, rename and folder are fsynced."""

    excludes_others = True

    def __init__(self, root: Path, location: str) -> None:
        self.root = root
        self.location = location
        self._index_ends: dict[int, int] = {}  # how much of a host's index is whole, once written to

    def hosts(self) -> list[int]:
        if not self.root.is_dir():
            return []
        numbers = (host_number(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted(number for number in numbers if number is not None)

    def shards(self, host: int) -> dict[str, FileStatus]:
        return {
            name: status
            for name, status in self._listing(host_name(host)).items()
            if shard_number(name) is not None
        }

    def indexes(self, host: int) -> dict[str, FileStatus]:
        folder = host_name(host)
        found = {
            f"{folder}/{INDEX_FOLDER}/{name}": status
            for name, status in self._listing(f"{folder}/{INDEX_FOLDER}").items()
        }
        with contextlib.suppress(FileNotFoundError):
            found[f"{folder}/{INDEX}"] = _status((self.root / folder / INDEX).stat())
        return found

    def _listing(self, folder: str) -> dict[str, FileStatus]:
        try:
            with os.scandir(self.root / folder) as entries:
                found = {entry.name: _status(entry.stat()) for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}
        return dict(sorted(found.items()))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with (self.root / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)

    def open_file(self, name: str) -> "LocalFile":
        return LocalFile(f"{self.root}/{name}")

    def open_host(self, host: int) -> Callable[[], None]:
        folder = self.root / host_name(host)
        holder = _read_holder(folder / _LOCK)  # first: some versions of filelock empty the file they ask for
        try:
            _make_folder(folder)
            lock = filelock.FileLock(folder / _LOCK, timeout=0, thread_local=False)
            lock.acquire()
        except filelock.Timeout as error:
            raise StoreError(
                f"{folder} is in use: another run writes to this directory as host {host}{holder}; "
                "wait for it to end or choose another directory"
            ) from error
        except OSError as error:
            raise StoreError(f"cannot write to {folder}: {error.strerror or error}") from error
        _note_holder(folder / _LOCK)
        for stale in folder.glob(f"*{_TEMP}"):  # only the holder of the lock may think them stale
            stale.unlink()

        def release() -> None:
            with contextlib.suppress(OSError):  # of a file server that is away or has forgotten the lock
                lock.release()

        return release

    def create(self, host: int, name: str, data: bytes) -> None:
        # In the host's own folder the lock protects the temporary file; link() refuses to replace.
        temp = self.root / host_name(host) / f"{name}{_TEMP}"
        with writing(self.location, name):
            _write_synced(temp, [memoryview(data)])
            try:
                os.link(temp, self.root / name)
            finally:
                temp.unlink()
            _sync_folder(self.root)

    def commit(self, name: str, chunks: Iterable[memoryview]) -> StoredFile:
        path = self.root / name
        with writing(self.location, name):
            return write_atomic(path, chunks, temporary=f"{path}{_TEMP}")

    def append_index(self, host: int, number: int, lines: bytes) -> None:
        path = self.root / host_name(host) / INDEX
        with writing(self.location, f"{host_name(host)}/{INDEX}"):
            end = self._index_ends.get(host)
            descriptor = os.open(path, os.O_RDWR | (0 if end else os.O_CREAT), 0o666)
            try:
                size = os.fstat(descriptor).st_size
                if end is None:
                    end = self._index_ends[host] = size
                # At the recorded end, not at the file's: trying again completes what was written in part, and
                # writes nothing twice.
                if size < end or not lines.startswith(os.pread(descriptor, len(lines) + 1, end)):
                    raise OSError("somebody else has changed it")
                os.lseek(descriptor, end, os.SEEK_SET)
                _write_all(descriptor, memoryview(lines))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if not end:
                _sync_folder(path.parent)
            self._index_ends[host] = end + len(lines)

    def replace(self, name: str, data: bytes) -> None:
        self.commit(name, [memoryview(data)])

    def set_aside(self, name: str) -> None:
        path = self.root / name
        with contextlib.suppress(FileNotFoundError):
            path.replace(path.with_name(path.name + ".damaged"))


class LocalFile:
    """A local file, read or mapped. Views stay valid after this object is gone."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._bytes: np.ndarray | None = None

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when Python ends
        if hasattr(self, "_descriptor"):  # not when it could not be opened
            close(self._descriptor)

    def view(self, start: int, stop: int) -> np.ndarray:
        if self._bytes is None:
            self._bytes = np.frombuffer(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
        return self._bytes[start:stop]

    def read_into(self, start: int, out: np.ndarray) -> None:
        rest = out.reshape(-1).view(np.uint8)
        while len(rest):
            count = os.preadv(self._descriptor, [rest.data], start)
            if not count:
                raise OSError(f"the file ends at byte {start}")
            rest, start = rest[count:], start + count

    def prefetch(self, start: int, stop: int) -> None:
        # Without it a cold map is read fault by fault, at a tenth of the disk's speed.
        if hasattr(os, "posix_fadvise"):  # macOS has none
            os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)


def _note_holder(lock: Path) -> None:
    """Writes into a lock that this process holds who holds it, for whom it keeps out."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk says so where it matters
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}")


def _read_holder(lock: Path) -> str:
    """Returns who has noted itself in a lock, as ``" (process ...)"``, or ""."""
    try:
        with lock.open(encoding="utf-8", errors="replace") as file:
            noted = file.read(200)
    except OSError:
        return ""
    return f" ({noted})" if _HOLDER.fullmatch(noted) else ""


def _status(status: os.stat_result) -> FileStatus:
    return FileStatus(status.st_size, status.st_mtime_ns, status.st_ino)


def _make_folder(folder: Path) -> None:
    """Creates a folder and its parents, each made durable in the one above."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> StoredFile:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)  # less the umask
    try:
        for chunk in chunks:
            data = memoryview(chunk)
            _write_all(descriptor, data)
            digest.update(data)
            size += len(data)
        os.fsync(descriptor)
        return StoredFile(size, digest.hexdigest(), os.fstat(descriptor).st_mtime_ns)
    finally:
        os.close(descriptor)
