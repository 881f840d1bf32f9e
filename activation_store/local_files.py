"""A store in a local directory, and the one way in which this project puts a whole file in its place."""

import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock
import numpy as np

from activation_store.format import MANIFEST, StoreError, host_name, host_number, shard_number
from activation_store.store_files import (
    COMMIT_SECONDS,
    INDEX,
    INDEX_FOLDER,
    FileStatus,
    StoredFile,
    cannot,
    index_part,
    writing,
)

LOCK = "writer.lock"
_TEMP = ".tmp"
_POLL_SECONDS = 0.01
# A link in a store could lead anywhere, a pipe would be waited for for ever.
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
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
    """A store's files in a directory. Each change counts once file, rename and folder are fsynced.

    Only regular files in folders of the store's own are read or written. The directory itself may be a link;
    a link, pipe or device within it is refused with a StoreError that names it.
    """

    excludes_others = True

    def __init__(self, root: Path, location: str) -> None:
        self.root = root
        self._path = os.fspath(root)
        self.location = location
        self._index_ends: dict[int, int] = {}  # how much of a host's index is whole, once written to

    def hosts(self) -> list[int]:
        if not self.root.is_dir():
            return []
        numbers = []
        for entry in self.root.iterdir():
            if (number := host_number(entry.name)) is not None and (entry.is_symlink() or entry.is_dir()):
                self._require_folder(entry.name)
                numbers.append(number)
        return sorted(numbers)

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(entry.name for entry in (self.root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

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
            if index_part(name)
        }
        with contextlib.suppress(FileNotFoundError):
            found[f"{folder}/{INDEX}"] = _status((self.root / folder / INDEX).lstat())
        for name, status in found.items():
            if status.oddity:
                raise StoreError(_refusal(f"{self._path}/{name}", status.oddity))
        return found

    def _listing(self, folder: str) -> dict[str, FileStatus]:
        self._require_folder(folder)
        try:
            with os.scandir(self.root / folder) as entries:
                found = {entry.name: _status(entry.stat(follow_symlinks=False)) for entry in entries}
        except FileNotFoundError:
            return {}
        return dict(sorted(found.items()))

    def _require_folder(self, name: str) -> None:
        """Raises StoreError where a folder of the store, or one above it, is a link; it need not be there."""
        while name:
            if os.path.islink(f"{self._path}/{name}"):  # noqa: PTH114 - for every shard that is opened
                raise StoreError(_refusal(f"{self._path}/{name}", _KINDS[stat.S_IFLNK]))
            name = name.rpartition("/")[0]

    def _open(self, name: str, flags: int) -> int:
        """Opens a regular file of the store; StoreError for anything else that has its name."""
        self._require_folder(name.rpartition("/")[0])
        return _open_regular(f"{self._path}/{name}", flags)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with os.fdopen(self._open(name, os.O_RDONLY), "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)

    def open_file(self, name: str) -> "LocalFile":
        return LocalFile(self._open(name, os.O_RDONLY))

    def open_host(self, host: int) -> Callable[[], None]:
        folder = self.root / host_name(host)
        self._require_folder(folder.name)
        holder = ""
        try:
            _make_folder(folder)
            holder = self._holder(host)  # first: some versions of filelock empty the file they ask for
            lock = filelock.FileLock(folder / LOCK, timeout=0.1, thread_local=False)
            lock.acquire()  # not quite at once: `in_use` may be looking
        except filelock.Timeout as error:
            raise StoreError(
                f"{folder} is in use: another run writes to this directory as host {host}{holder}; "
                "wait for it to end or choose another directory"
            ) from error
        except OSError as error:
            raise cannot(f"write to {folder}", error) from error

        def release() -> None:
            with contextlib.suppress(OSError):  # of a file server that is away or has forgotten the lock
                lock.release()

        try:
            _note_holder(folder / LOCK)
            for stale in folder.glob(f"*{_TEMP}"):  # only the holder of the lock may think them stale
                if not stale.is_dir() or stale.is_symlink():
                    stale.unlink()
        except OSError as error:
            release()
            raise cannot(f"write to {folder}", error) from error
        return release

    def _holder(self, host: int) -> str:
        """Returns who has noted itself in a host's lock, as ``" (process ...)"``, or ""."""
        try:
            noted = self.read(f"{host_name(host)}/{LOCK}", 0, 200).decode(errors="replace")
        except OSError:
            return ""
        return f" ({noted})" if _HOLDER.fullmatch(noted) else ""

    def in_use(self, host: int) -> bool:
        try:
            descriptor = self._open(f"{host_name(host)}/{LOCK}", os.O_RDONLY)
        except (OSError, StoreError):
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def begin_commit(self) -> tuple[bool, Callable[[], None]]:
        # The manifest is what all hosts have, and where the store is away nothing must be made in its place.
        with writing(self.location, MANIFEST):
            try:
                descriptor = self._open(MANIFEST, os.O_RDWR)  # NFS locks no file that is only read
            except PermissionError:
                return False, lambda: None
        return _locks_within(descriptor, COMMIT_SECONDS), lambda: os.close(descriptor)

    def create(self, host: int, name: str, data: bytes) -> None:
        # In the host's own folder the lock protects the temporary file; link() refuses to replace.
        temp = self.root / host_name(host) / f"{name}{_TEMP}"
        with writing(self.location, name):
            try:
                _write_synced(temp, [memoryview(data)])
                os.link(temp, self.root / name)
            finally:
                temp.unlink(missing_ok=True)
            _sync_folder(self.root)

    def commit(self, name: str, chunks: Iterable[memoryview]) -> StoredFile:
        path = self.root / name
        self._require_folder(name.rpartition("/")[0])
        with writing(self.location, name):
            return write_atomic(path, chunks, temporary=f"{path}{_TEMP}")

    def append_index(self, host: int, number: int, lines: bytes) -> None:
        name = f"{host_name(host)}/{INDEX}"
        with writing(self.location, name):
            end = self._index_ends.get(host)
            descriptor = self._open(name, os.O_RDWR | (0 if end else os.O_CREAT))
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
                _sync_folder(self.root / host_name(host))
            self._index_ends[host] = end + len(lines)

    def replace(self, name: str, data: bytes, *, host: int | None = None) -> None:
        temp = None if host is None else self.root / host_name(host) / f"{name}{_TEMP}"
        with writing(self.location, name):
            write_atomic(self.root / name, [data], temporary=temp)
        self._index_ends = {}  # it may have been an index

    def set_aside(self, name: str) -> None:
        path = self.root / name
        self._require_folder(name.rpartition("/")[0])
        with writing(self.location, name), contextlib.suppress(FileNotFoundError):
            path.replace(path.with_name(path.name + ".damaged"))

    def discard(self, name: str) -> None:
        with writing(self.location, name), contextlib.suppress(FileNotFoundError):
            (self.root / name).unlink()


class LocalFile:
    """A local file, read or mapped. Views stay valid after this object is gone.

    A view of a file that is cut afterwards must not be used: the system ends a process that does.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self._bytes: np.ndarray | None = None

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when Python ends
        close(self._descriptor)

    def view(self, start: int, stop: int) -> np.ndarray:
        size = os.fstat(self._descriptor).st_size  # it may have been cut since it was opened
        if size < stop:
            raise OSError(f"the file ends at byte {size}")
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


def _open_regular(path: str | Path, flags: int) -> int:
    """Opens a regular file, which is not waited for; StoreError for anything else."""
    try:
        descriptor = os.open(path, flags | _SAFELY, 0o666)  # less the umask
    except OSError:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if oddity := _oddity(os.lstat(path).st_mode):
                raise StoreError(_refusal(path, oddity)) from None
        raise
    if oddity := _oddity(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(_refusal(path, oddity))
    return descriptor


def _oddity(mode: int) -> str:
    """Returns what there is instead of a regular file; "" for one."""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something unknown")


def _refusal(path: str | Path, oddity: str) -> str:
    return f"{path} is {oddity}, which a store never has there: move it away"


def _note_holder(lock: Path) -> None:
    """Writes into a lock that this process holds who holds it, for whom it keeps out."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk says so where it matters
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}")


def _status(status: os.stat_result) -> FileStatus:
    return FileStatus(status.st_size, status.st_mtime_ns, status.st_ino, _oddity(status.st_mode))


def _locks_within(descriptor: int, seconds: float) -> bool:
    """Returns whether an open file could be locked, which another process may have done for a while."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_SECONDS)
        except OSError:  # a file system without locks
            return False
        else:
            return True


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
    descriptor = _open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
