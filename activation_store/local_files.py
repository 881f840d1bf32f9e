"""Where a store's bytes live: the few operations it needs, and a local directory that offers them.

A local host folder has one `index.jsonl` that is appended to. Objects cannot be appended to, so a remote host
folder (activation_remote.py) has one `index/000000.jsonl` per commit. Readers take both kinds from either, so
a store can be copied from one to the other and read there.
"""

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import filelock
import numpy as np

from activation_store.format import StoreError, StoreWriteError, host_name, host_number, shard_number

INDEX = "index.jsonl"
INDEX_FOLDER = "index"
_LOCK = "writer.lock"
_TEMP = ".tmp"


class FileView(Protocol):
    """The bytes of one file, read-only."""

    def view(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) as uint8; mapped, not copied, where the file is local."""
        ...

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill the contiguous array `out` with the bytes from `start` on; OSError when the file ends."""
        ...

    def prefetch(self, start: int, stop: int) -> None:
        """Say that these bytes are wanted soon; returns at once."""
        ...


class StoredFile(NamedTuple):
    """What was written, as measured while writing it."""

    size: int
    sha256: str
    mtime_ns: int


class FileStatus(NamedTuple):
    """Enough to notice that a file changed. An object never changes in place: time and inode are 0."""

    size: int
    mtime_ns: int
    inode: int


class StoreFiles(Protocol):
    """The operations a store needs. Names are relative to the store and use `/`."""

    location: str  # as the user wrote it, for messages
    excludes_others: bool  # whether `open_host` makes this the only writer of the host folder

    def hosts(self) -> list[int]: ...
    def shards(self, host: int) -> dict[str, FileStatus]:
        """The shards of a host folder by base name; {} without the folder."""
        ...

    def indexes(self, host: int) -> dict[str, FileStatus]:
        """The index files of a host in commit order, by name below the store."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes: ...
    def open_file(self, name: str) -> FileView: ...
    def open_host(self, host: int) -> Callable[[], None]:
        """Take the host folder for one writer, clean up after a crashed one, return how to let go of it."""
        ...

    def create(self, host: int, name: str, data: bytes) -> None:
        """All of `data` under a new name; FileExistsError when there is one, whoever else is creating it."""
        ...

    def commit(self, name: str, chunks: Iterable[memoryview]) -> StoredFile:
        """Durably write a shard; when this returns it is there, whole, after any crash.

        After an error it may be called again.
        """
        ...

    def append_index(self, host: int, number: int, lines: bytes) -> None:
        """Durably add the index lines of commit `number`; after an error it may be called again."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Durably put `data` in the place of an index, or remove it when `data` is empty."""
        ...

    def set_aside(self, name: str) -> None:
        """Take a damaged shard out of the way."""
        ...


@contextlib.contextmanager
def writing(location: str, name: str) -> Iterator[None]:
    """Turn an OSError of the body into a StoreWriteError about `name`; FileExistsError passes."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {name} in {location}: {error.strerror or error}; what was committed before is safe"
        ) from error


class LocalFiles:
    """A directory. Every change is fsynced, file before rename before folder, before it counts."""

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
        try:
            _make_folder(folder)
            lock = filelock.FileLock(folder / _LOCK, timeout=0, thread_local=False)
            lock.acquire()
        except filelock.Timeout as error:
            raise StoreError(
                f"{folder} is in use: another run writes to this directory as host {host}; "
                "wait for it to end or choose another directory"
            ) from error
        except OSError as error:
            raise StoreError(f"cannot write to {folder}: {error.strerror or error}") from error
        for stale in folder.glob(f"*{_TEMP}"):  # only the holder of the lock may think them stale
            stale.unlink()

        def release() -> None:
            with contextlib.suppress(OSError):  # of a file server that is away or has forgotten the lock
                lock.release()

        return release

    def create(self, host: int, name: str, data: bytes) -> None:
        # The temp file lies in the host's own folder, where the lock protects it; link() refuses to replace.
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
        temp = path.with_name(path.name + _TEMP)
        with writing(self.location, name):
            try:
                written = _write_synced(temp, chunks)
            except BaseException:
                temp.unlink(missing_ok=True)
                raise
            temp.replace(path)
            _sync_folder(path.parent)
        return written

    def append_index(self, host: int, number: int, lines: bytes) -> None:
        path = self.root / host_name(host) / INDEX
        with writing(self.location, f"{host_name(host)}/{INDEX}"):
            end = self._index_ends.get(host)
            descriptor = os.open(path, os.O_RDWR | (0 if end else os.O_CREAT), 0o666)
            try:
                size = os.fstat(descriptor).st_size
                if end is None:
                    end = self._index_ends[host] = size
                # At their place, not at the end: half of them are completed, all of them are not there twice.
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
    """A local file: read, or mapped once it is viewed. Views stay valid when the file is let go of."""

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


def _status(status: os.stat_result) -> FileStatus:
    return FileStatus(status.st_size, status.st_mtime_ns, status.st_ino)


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, each made durable in the one above."""
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


def _write_synced(path: Path, chunks: Iterable[memoryview]) -> StoredFile:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)  # less the umask
    try:
        for chunk in chunks:
            _write_all(descriptor, chunk)
            digest.update(chunk)
            size += len(chunk)
        os.fsync(descriptor)
        return StoredFile(size, digest.hexdigest(), os.fstat(descriptor).st_mtime_ns)
    finally:
        os.close(descriptor)
