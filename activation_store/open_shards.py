"""The shards that a reader has open, and reading ahead of it."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

from activation_store.format import StoreError, StoreSettings
from activation_store.shard import Shard
from activation_store.store_files import StoreFiles

Item = TypeVar("Item")
SHARDS_AHEAD = 8  # on their way from disk while one is read
_OPEN_SHARDS = 128  # a file descriptor or two each


class OpenShards:
    """Opens shards and keeps the last few open.

    It has no lock, which a forked process could find held for ever: two threads that want one shard at the
    same moment may both open it.
    """

    def __init__(self, files: StoreFiles, settings: StoreSettings) -> None:
        self._files = files
        self._settings = settings
        self._open: OrderedDict[str, Shard] = OrderedDict()

    def get(self, path: str, size: int) -> Shard:
        """Returns the shard at `SequenceRecord.path`, of `shard_bytes` bytes; StoreError without it."""
        shard = self._open.pop(path, None)
        if shard is None:
            where = f"{self._files.location}/{path}"
            try:
                file = self._files.open_file(path)
            except OSError as error:
                raise StoreError(f"cannot read {where}: {error.strerror or error}") from error
            shard = Shard(file, size, where, self._settings)
        self._open[path] = shard
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def forget(self, path: str) -> None:
        """Opens a shard anew the next time, because another file may be in its place."""
        self._open.pop(path, None)


def ahead(items: Iterable[Item], distance: int) -> Iterator[Item]:
    """Yields the items in order, each drawn `distance` items before it is yielded."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > distance:
            yield waiting.popleft()
    yield from waiting
