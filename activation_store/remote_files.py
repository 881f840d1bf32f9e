"""A store in an object store, behind any fsspec URL, and the choice between that and a local directory."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from activation_store.format import StoreError, StoreWriteError, host_name, host_number, shard_number
from activation_store.local_files import LocalFiles
from activation_store.store_files import (
    INDEX,
    INDEX_FOLDER,
    FileStatus,
    StoredFile,
    StoreFiles,
    index_part,
    writing,
)
from qwen2_core.messages import masked


def open_files(directory: str | os.PathLike[str]) -> StoreFiles:
    """Returns the files of a store at a path, a `file://` URL or any other fsspec URL such as
    `gs://bucket/run`. A leading `~` is the home directory. Messages show no passwords of the URL.

    Raises:
        StoreError: it is no path, no file system is known for the URL, or its library is missing.
    """
    url = os.fspath(directory)
    location = masked(url)
    try:
        is_path = b"\0" not in os.fsencode(url)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise StoreError(f"{location!a} is no path: it has a NUL byte or half of a character in it")
    if "://" not in url:
        # Absolute, so that it stays the same place when the process changes its directory.
        return LocalFiles(Path(os.path.expanduser(url)).absolute(), location)  # noqa: PTH111 - raises for no user
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # each kind of URL has its own library, with errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"{location} cannot be opened: {masked(reason)[:500]}") from error
    if isinstance(filesystem, LocalFileSystem):  # file:// or local://
        return LocalFiles(Path(path), location)
    return RemoteFiles(filesystem, path.rstrip("/"), location)


class RemoteFile:
    """An object whose ranges are fetched when they are asked for."""

    size = None

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read

    def view(self, start: int, stop: int) -> np.ndarray:
        data = np.frombuffer(self._read(start, stop), np.uint8)
        if len(data) < stop - start:
            raise OSError(f"the object ends at byte {start + len(data)}")
        return data

    def read_into(self, start: int, out: np.ndarray) -> None:
        into = out.reshape(-1).view(np.uint8)
        into[:] = self.view(start, start + len(into))

    def prefetch(self, start: int, stop: int) -> None:
        """Does nothing: a request would have to be waited for."""


class RemoteFiles:
    """A store's files as objects: one per shard and per index commit, created once and never changed.

    There is no lock: a second writer on the same host index is refused when it creates an object that exists.
    """

    excludes_others = False

    def __init__(self, filesystem: Any, root: str, location: str) -> None:
        self._filesystem = filesystem
        self._root = root
        self.location = location

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _entries(self, path: str) -> list[dict[str, Any]]:
        self._filesystem.invalidate_cache(path)  # other hosts write too
        try:
            return self._filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return []

    def hosts(self) -> list[int]:
        return sorted(number for name in self.names() if (number := host_number(name)) is not None)

    def names(self, folder: str = "") -> list[str]:
        path = self._path(folder) if folder else self._root
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in self._entries(path))

    def shards(self, host: int) -> dict[str, FileStatus]:
        found = self._listing(host_name(host))
        return {name: status for name, status in found.items() if shard_number(name) is not None}

    def indexes(self, host: int) -> dict[str, FileStatus]:
        folder = host_name(host)
        found = {
            f"{folder}/{INDEX_FOLDER}/{name}": status
            for name, status in self._listing(f"{folder}/{INDEX_FOLDER}").items()
            if index_part(name)
        }
        with contextlib.suppress(FileNotFoundError):
            size = self._filesystem.info(self._path(f"{folder}/{INDEX}"))["size"]
            found[f"{folder}/{INDEX}"] = FileStatus(size, 0, 0)
        return found

    def _listing(self, folder: str) -> dict[str, FileStatus]:
        found = {
            entry["name"].rsplit("/", 1)[-1]: FileStatus(entry["size"], 0, 0)
            for entry in self._entries(self._path(folder))
            if entry["type"] == "file"
        }
        return dict(sorted(found.items()))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return self._filesystem.cat_file(self._path(name), start=start, end=stop)

    def open_file(self, name: str) -> "RemoteFile":
        return RemoteFile(lambda start, stop: self.read(name, start, stop))

    def open_host(self, host: int) -> Callable[[], None]:
        return lambda: None

    def in_use(self, host: int) -> bool:
        return True

    def begin_commit(self) -> tuple[bool, Callable[[], None]]:
        return True, lambda: None

    def create(self, host: int, name: str, data: bytes) -> None:
        with writing(self.location, name):
            self._filesystem.pipe_file(self._path(name), data, mode="create")

    def commit(self, name: str, chunks: Iterable[memoryview]) -> StoredFile:
        data = b"".join(chunks)
        digest = hashlib.sha256(data).hexdigest()
        with writing(self.location, name):
            self._upload(name, data)
            if self._filesystem.info(self._path(name))["size"] != len(data):
                raise OSError(f"the object is not {len(data)} bytes long after its upload")
            if hashlib.sha256(self.read(name)).hexdigest() != digest:
                raise OSError("the object reads back with another checksum than was uploaded")
        return StoredFile(len(data), digest, 0)

    def _upload(self, name: str, data: bytes) -> None:
        try:
            self._filesystem.pipe_file(self._path(name), data, mode="create")
        except FileExistsError as error:
            raise StoreWriteError(
                f"{name} in {self.location} was just created by someone else: "
                "another run writes to this directory under the same host index"
            ) from error

    def append_index(self, host: int, number: int, lines: bytes) -> None:
        name = f"{host_name(host)}/{INDEX_FOLDER}/{number:06d}.jsonl"
        with writing(self.location, name):
            self._upload(name, lines)

    def replace(self, name: str, data: bytes, *, host: int | None = None) -> None:
        with writing(self.location, name):
            if data:
                self._filesystem.pipe_file(self._path(name), data)
            else:
                self._filesystem.rm_file(self._path(name))

    def set_aside(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path(name))

    def discard(self, name: str) -> None:
        with writing(self.location, name):
            self.set_aside(name)
