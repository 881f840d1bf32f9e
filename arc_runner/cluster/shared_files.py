"""Small files that the processes of a run share: made once or written anew, dated by the file system.

Through fsspec, so that a directory and a URL are the same. Every operation is tried again while the store
is away.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from activation_store import Patience

_FOLDER = "run"


class SharedFiles:
    """Files in a folder of the store in ``directory``, a path or URL, by name.

    Raises:
        StoreWriteError: by every method, what ``patiently`` raises.
    """

    def __init__(self, directory: str, patiently: Patience | None = None) -> None:
        self._filesystem, root = fsspec.core.url_to_fs(directory)
        self._is_local = isinstance(self._filesystem, LocalFileSystem)
        self._folder = f"{root.rstrip('/')}/{_FOLDER}"
        self.patiently = patiently or Patience(directory)
        self.patiently(self._make_folder)

    def _make_folder(self) -> None:
        if self._is_local:  # in the store's own directory, which may be away and is not to be made
            Path(self._folder).mkdir(exist_ok=True)
        else:
            self._filesystem.makedirs(self._folder, exist_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """Makes a file that is not there; False when it is, whoever else is just making it."""

        def create() -> bool:
            try:
                if self._is_local:  # where fsspec looks first and creates then, and two may do so at once
                    with Path(self._path(name)).open("xb") as file:
                        file.write(data)
                else:
                    self._filesystem.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

        return self.patiently(create)

    def write(self, name: str, data: bytes) -> float:
        """Puts ``data`` in a file's place, whole; when, in seconds by the file system's clock."""

        def write() -> float:
            path = self._path(name)
            if self._is_local:  # where a reader would see the file empty while it is written
                new = Path(f"{path}.{uuid.uuid4().hex}")
                new.write_bytes(data)
                new.replace(path)
            else:
                self._filesystem.pipe_file(path, data)
            return self._modified(name)

        return self.patiently(write)

    def read(self, name: str) -> tuple[bytes, float] | None:
        """A file and when it was written; None when there is none. One that is just being made is empty."""

        def read() -> tuple[bytes, float] | None:
            try:
                # In this order: it is opening a file that makes NFS ask the server how old it is.
                return self._filesystem.cat_file(self._path(name)), self._modified(name)
            except FileNotFoundError:
                if not self._filesystem.exists(self._folder):
                    raise  # it is the folder that is away
                return None

        return self.patiently(read)

    def remove(self, name: str) -> None:
        def remove() -> None:
            try:
                self._filesystem.rm_file(self._path(name))
            except FileNotFoundError:
                if not self._filesystem.exists(self._folder):
                    raise

        self.patiently(remove)

    def names(self) -> list[str]:
        def names() -> list[str]:
            self._filesystem.invalidate_cache(self._folder)
            return sorted(path.rsplit("/", 1)[-1] for path in self._filesystem.ls(self._folder, detail=False))

        return self.patiently(names)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _modified(self, name: str) -> float:
        self._filesystem.invalidate_cache(self._folder)
        return self._filesystem.modified(self._path(name)).timestamp()
