"""The few file operations that a store needs, as a protocol.

`local_files.LocalFiles` offers them for a directory, `remote_files.RemoteFiles` for an object store. A local
host folder has one `index.jsonl` that is appended to. Objects cannot be appended to, so a remote host folder
has one `index/000000.jsonl` per commit. Both kinds are read from either place, so a store can be copied from
one to the other and read there.
"""

import contextlib
import errno
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from activation_store.format import StoreError, StoreWriteError

INDEX = "index.jsonl"
INDEX_FOLDER = "index"
FIGURES = "figures.json"  # of the last run of a host, for the report that it and others make
COMMIT_SECONDS = 2.0  # how long a commit waits for another host's to end
_PART = re.compile(r"([0-9]{6}|[1-9][0-9]{6,11})\.jsonl")
# What stays as it is until a person changes something; anything else may be over when it is tried again.
_LASTING = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENOENT,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
    }
)


def index_part(name: str) -> bool:
    """Returns whether a file in the folder INDEX_FOLDER is one of the index: "000012.jsonl"."""
    return _PART.fullmatch(name) is not None


class FileView(Protocol):
    """The bytes of one file, read-only."""

    @property
    def size(self) -> int | None:
        """How many bytes there were when it was opened; None where that would have to be asked for."""
        ...

    def view(self, start: int, stop: int) -> np.ndarray:
        """Returns bytes [start, stop) as uint8; mapped, not copied, where the file is local.

        Raises:
            OSError: the file ends before `stop`.
        """
        ...

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills the C-contiguous array `out` with the bytes from `start` on; OSError when the file ends."""
        ...

    def prefetch(self, start: int, stop: int) -> None:
        """Asks the system to read these bytes soon; returns at once."""
        ...


class StoredFile(NamedTuple):
    """What was written, as measured while writing it."""

    size: int  # bytes
    sha256: str  # hex
    mtime_ns: int  # 0 in an object store


class FileStatus(NamedTuple):
    """Enough to notice that a file changed. An object never changes in place: time and inode are 0."""

    size: int
    mtime_ns: int
    inode: int
    oddity: str = ""  # what there is instead of a regular file: "a symbolic link", "a folder", ...


class StoreFiles(Protocol):
    """The operations on one store. Names are relative to the store and use `/`."""

    location: str  # as the user wrote it, for messages; passwords masked
    excludes_others: bool  # whether `open_host` makes this the only writer of the host folder

    def hosts(self) -> list[int]:
        """Returns the indices of the host folders, in order."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Returns the base names of all in a folder, by default the store's own, sorted; [] without it."""
        ...

    def shards(self, host: int) -> dict[str, FileStatus]:
        """Returns the shards of a host folder by base name, odd ones too; {} without the folder."""
        ...

    def indexes(self, host: int) -> dict[str, FileStatus]:
        """Returns the index files of a host in commit order, by name below the store.

        Raises:
            StoreError: one of them is no regular file.
        """
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns bytes [start, stop) of a file, or all from `start` on; FileNotFoundError without it."""
        ...

    def open_file(self, name: str) -> FileView:
        """Opens a file for reading parts of it."""
        ...

    def open_host(self, host: int) -> Callable[[], None]:
        """Takes the host folder for one writer, cleans up after a crashed one, returns how to release it.

        Raises:
            StoreError: the folder is another writer's, or it cannot be written to.
        """
        ...

    def in_use(self, host: int) -> bool:
        """Returns whether a writer may have taken the host folder; in an object store that is not known."""
        ...

    def begin_commit(self) -> tuple[bool, Callable[[], None]]:
        """Keeps the other hosts from committing; returns whether it could, and how to let them again.

        A host that is stopped while it commits must not stop all others: it is waited for COMMIT_SECONDS at
        most. An object store has nothing that could keep others away.

        Raises:
            StoreWriteError: the store is away.
        """
        ...

    def create(self, host: int, name: str, data: bytes) -> None:
        """Writes a new file; FileExistsError when there is one, whoever else is creating it."""
        ...

    def commit(self, name: str, chunks: Iterable[memoryview]) -> StoredFile:
        """Writes a shard durably: when this returns it is there, whole, after any crash.

        After an error it may be called again.

        Raises:
            StoreWriteError: it cannot be written.
        """
        ...

    def append_index(self, host: int, number: int, lines: bytes) -> None:
        """Adds the index lines of commit `number` durably; after an error it may be called again.

        Raises:
            StoreWriteError: they cannot be written, or another writer has changed the index.
        """
        ...

    def replace(self, name: str, data: bytes, *, host: int | None = None) -> None:
        """Puts `data` durably in the place of a small file; one that would be empty may be removed instead.

        Args:
            name: the file.
            data: its new content.
            host: in whose folder the file is made ready. Where that is away, nothing is written.

        Raises:
            StoreWriteError: it cannot be written.
        """
        ...

    def set_aside(self, name: str) -> None:
        """Moves a damaged file out of the way.

        Raises:
            StoreWriteError: it cannot be moved.
        """
        ...

    def discard(self, name: str) -> None:
        """Removes a file, if it is there, that no index line has ever named.

        Raises:
            StoreWriteError: it cannot be removed.
        """
        ...


def cannot(what: str, error: OSError) -> StoreError:
    """Returns the error for what could not be done: a StoreWriteError where trying again may help."""
    kind = StoreError if error.errno in _LASTING else StoreWriteError
    return kind(f"cannot {what}: {error.strerror or error}")


@contextlib.contextmanager
def writing(location: str, name: str) -> Iterator[None]:
    """Turns an OSError of the body into a StoreWriteError about `name`; FileExistsError passes."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {name} in {location}: {error.strerror or error}; what was committed before is safe"
        ) from error
