"""Small files that the processes of a run share, created once or written anew, and dated by the file system.

They are accessed through fsspec, so that a directory and a URL work alike. Every operation is tried again
while the store is away.
"""

from __future__ import annotations

from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from activation_store import RetryPolicy
from activation_store.local_files import write_atomic

_FOLDER = "run"


class SharedFiles:
    """Accesses files by name in a folder of the store in ``directory``, a path or URL.

    The folder is made, unless they are only to be read: the store may be read-only then.

    Raises:
        StoreWriteError: every method, if the store stays away or cannot be used (see ``patiently``).
    """

    def __init__(
        self, directory: str, patiently: RetryPolicy | None = None, *, read_only: bool = False
    ) -> None:
        self._filesystem, root = fsspec.core.url_to_fs(directory)
        self._is_local = isinstance(self._filesystem, LocalFileSystem)
        self._folder = f"{root.rstrip('/')}/{_FOLDER}"
        self._read_only = read_only
        self.patiently = patiently or RetryPolicy(directory)
        if not read_only:
            self.patiently(self._make_folder)

    def _make_folder(self) -> None:
        if self._is_local:  # not the store's own directory: it may be away, and must not be made then
            Path(self._folder).mkdir(exist_ok=True)
        else:
            self._filesystem.makedirs(self._folder, exist_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """Creates a file; False if it exists, also if another process creates it at the same moment."""

        def create() -> bool:
            try:
                if self._is_local:  # fsspec would look and then create, and two processes may do so at once
                    with Path(self._path(name)).open("xb") as file:
                        file.write(data)
                else:
                    self._filesystem.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

        return self.patiently(create)

    def write(self, name: str, data: bytes) -> float:
        """Replaces a file as a whole; returns its time in seconds by the file system's clock."""

        def write() -> float:
            path = self._path(name)
            if self._is_local:  # else a reader would see the file empty while it is written
                write_atomic(path, [data])
            else:
                self._filesystem.pipe_file(path, data)
            return self._modified(name)

        return self.patiently(write)

    def read(self, name: str) -> tuple[bytes, float] | None:
        """Returns a file and its time, or None if there is none. A file that is being created is empty."""

        def read() -> tuple[bytes, float] | None:
            try:
                # In this order: opening a file makes NFS ask the server how old it is.
                return self._filesystem.cat_file(self._path(name)), self._modified(name)
            except FileNotFoundError:
                if not self._filesystem.exists(self._folder):
                    raise  # it is the folder that is away
                return None

        return self.patiently(read)

    def remove(self, name: str) -> None:
        """Removes a file, if there is one."""

        def remove() -> None:
            try:
                self._filesystem.rm_file(self._path(name))
            except FileNotFoundError:
                if not self._filesystem.exists(self._folder):
                    raise

        self.patiently(remove)

    def names(self) -> list[str]:
        """Returns the names of all files, sorted."""

        def names() -> list[str]:
            self._filesystem.invalidate_cache(self._folder)
            if self._read_only and not self._filesystem.exists(self._folder):
                return []
            return sorted(path.rsplit("/", 1)[-1] for path in self._filesystem.ls(self._folder, detail=False))

        return self.patiently(names)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _modified(self, name: str) -> float:
        self._filesystem.invalidate_cache(self._folder)
        return self._filesystem.modified(self._path(name)).timestamp()
