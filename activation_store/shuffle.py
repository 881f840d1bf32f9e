"""Training batches: the rows of one layer in a seeded shuffle over the whole store.

Reading row by row at random would be bound by the disk's seeks. Instead the stored rows are cut into small
blocks, the blocks of the whole store are put in random order, and the rows of a pool of blocks are shuffled
in memory: each batch mixes rows from hundreds of places, every row comes exactly once an epoch, and the order
depends on (seed, epoch, reader, readers) only. So a place in it is three numbers, and resuming is exact.
"""

import copy
import hashlib
import importlib
import itertools
import math
import operator
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

from activation_store.format import SequenceRecord, StoreError, hook_name
from activation_store.open_shards import SHARDS_AHEAD, ahead
from activation_store.reader import ActivationStore
from activation_store.rows import RowFilter
from activation_store.shard import ALIGNMENT, Shard

BLOCK_ROWS = 128
POOL_ROWS = 1 << 15
FRAMEWORKS = ("numpy", "jax", "torch")


class RowBatch(NamedTuple):
    """Rows of one layer and what each of them is, as arrays of the framework asked for."""

    rows: Any  # [n, hidden] in the stored dtype
    token_ids: Any  # int32 [n]
    positions: Any  # int32 [n]
    is_generated: Any  # bool [n]
    sequences: Any  # int32 [n]: `ShuffledBatches.keys[i]` is the key of sequence i


_Pieces = tuple[Shard, list[tuple[int, int]]]  # rows [first, end) of a shard
_Pool = tuple[tuple[np.ndarray, ...], np.ndarray]  # columns of RowBatch, and the order to hand rows out in


@dataclass
class _Place:
    """How much has been handed out: whole epochs, whole pools of this epoch, rows of the current pool."""

    epoch: int = 0
    pool: int = 0
    row: int = 0


class ShuffledBatches:
    """Iterates over one epoch of batches; iterating again goes on where the last iteration stopped.

    Args:
        store: the store to read; what is committed later is not seen.
        layer: which layer's rows.
        batch_size: rows in a batch; the last batch of an epoch may be smaller.
        seed: decides the order together with the epoch, `reader` and `readers`.
        sequences: the sequences to read, by default all.
        rows: which of their rows to read, by default all.
        reader, readers: this is reader 0 to readers - 1, which gets its own part of the rows; parts are equal
            to within a few blocks of 128 to 255 rows.
        framework: "numpy", "jax" or "torch", the type of a batch's arrays.

    Raises:
        StoreError: the layer is not stored, or an argument is out of range.

    >>> batches = ShuffledBatches(store, layer=12, batch_size=4096, rows=RowFilter(prompt=False))
    >>> for batch in batches:
    ...     loss = train_step(batch.rows)
    >>> saved = batches.state_dict()  # plain values; after load_state_dict(saved) the next batch comes next
    """

    def __init__(  # noqa: PLR0913 - what decides the batches; all but the first three have defaults
        self,
        store: ActivationStore,
        layer: int,
        batch_size: int,
        *,
        seed: int = 0,
        sequences: Iterable[SequenceRecord] | None = None,
        rows: RowFilter | None = None,
        reader: int = 0,
        readers: int = 1,
        framework: str = "numpy",
    ) -> None:
        if framework not in FRAMEWORKS:
            raise StoreError(f"framework {framework!r} is none of {', '.join(FRAMEWORKS)}")
        if batch_size < 1 or not 0 <= reader < readers:
            raise StoreError(f"there are no batches of {batch_size} rows for reader {reader} of {readers}")
        store.require_layer(layer)
        self.store = store
        self.layer = layer
        self.batch_size = batch_size
        self.keys: list[str] = []
        self._seed, self._reader, self._readers, self._framework = seed, reader, readers, framework
        self._place = _Place()
        self._shards: list[tuple[str, int]] = []  # (path, bytes)
        self._prompt_lengths = array("i")
        chosen = rows or RowFilter()
        self._max_norm = chosen.max_norm
        self._runs, self._blocks = self._cut(store.sequences() if sequences is None else sequences, chosen)
        content = f"{chosen.max_norm} {self._shards}".encode() + self._runs.tobytes() + self._blocks.tobytes()
        self._content = hashlib.sha256(content).hexdigest()

    def _cut(self, sequences: Iterable[SequenceRecord], chosen: RowFilter) -> tuple[np.ndarray, np.ndarray]:
        """Cuts the chosen rows into runs and blocks.

        Returns:
            The runs, int64 [runs, 4]: sequence, shard, first and end row in the shard. And the first run of
            each block, int64 [blocks + 1]. A block is the next runs of a shard until they have BLOCK_ROWS
            rows, so that short sequences cost no more than long ones.
        """
        runs, blocks = array("q"), array("q")
        shard_numbers: dict[str, int] = {}
        block_rows, block_shard = 0, -1
        for record in sequences:
            start, stop = chosen.row_range(record)
            if start == stop:
                continue
            shard = shard_numbers.setdefault(record.path, len(shard_numbers))
            if shard == len(self._shards):
                self._shards.append((record.path, record.shard_bytes))
            for first in range(record.row_start + start, record.row_start + stop, BLOCK_ROWS):
                end = min(first + BLOCK_ROWS, record.row_start + stop)
                if block_rows >= BLOCK_ROWS or block_shard != shard:
                    blocks.append(len(runs) // 4)
                    block_rows, block_shard = 0, shard
                runs.extend((len(self.keys), shard, first, end))
                block_rows += end - first
            self.keys.append(record.key)
            self._prompt_lengths.append(record.prompt_length)
        blocks.append(len(runs) // 4)
        return np.array(runs, np.int64).reshape(-1, 4), np.array(blocks, np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Returns how far the iteration has come, as plain values, which fit any batch size."""
        return {**self._identity(), **asdict(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`; raises StoreError for a state of other rows, seed or reader."""
        for name, value in self._identity().items():
            if state[name] != value:
                raise StoreError(f"the saved state is of other batches: {name} was {state[name]}, is {value}")
        self._place = _Place(state["epoch"], state["pool"], state["row"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "reader": self._reader,
            "readers": self._readers,
            "content": self._content,
        }

    def set_epoch(self, epoch: int) -> None:
        """Starts at the beginning of an epoch."""
        self._place = _Place(epoch)

    def split(self, part: int, parts: int) -> Self:
        """Returns one of `parts` workers' share of this reader's rows, from the current epoch's beginning."""
        mine = copy.copy(self)
        mine._reader, mine._readers = self._reader * parts + part, self._readers * parts
        mine._place = _Place(self._place.epoch)
        return mine

    def torch_dataset(self) -> Any:
        """Returns a torch `IterableDataset` of these batches, for `DataLoader(dataset, batch_size=None)`.

        Each worker of the loader reads its own share.
        """
        return importlib.import_module("activation_store.torch_dataset").TorchBatches(self)

    def __iter__(self) -> Iterator[RowBatch]:
        place = self._place
        pools = self._pools(place.epoch)
        parts: list[tuple[np.ndarray, ...]] = []  # of the batch being filled
        missing = self.batch_size
        with ThreadPoolExecutor(1) as loader:
            # Two buffers: one is handed out while the other is filled. Fresh memory for every pool would cost
            # as much as reading it.
            largest = max((_row_count(pool) for pool in pools), default=0)
            shape = (min(2, len(pools)), largest, self.store.settings.hidden_size)
            buffers = _aligned(shape, self.store.dtype)

            def load(number: int) -> Future[_Pool]:
                return loader.submit(self._load, pools[number], place.epoch, number, buffers[number % 2])

            loading = load(place.pool) if place.pool < len(pools) else None
            while loading is not None:
                columns, order = loading.result()
                loading = load(place.pool + 1) if place.pool + 1 < len(pools) else None
                while place.row < len(order):
                    chosen = order[place.row : place.row + missing]
                    parts.append(tuple(_take(column, chosen) for column in columns))
                    place.row += len(chosen)
                    missing -= len(chosen)
                    if not missing:
                        batch, parts, missing = self._batch(parts), [], self.batch_size
                        yield batch
                place.pool, place.row = place.pool + 1, 0
        place.epoch, place.pool, place.row = place.epoch + 1, 0, 0
        if parts:
            yield self._batch(parts)

    def _pools(self, epoch: int) -> list[np.ndarray]:
        """Returns this reader's runs in the epoch's order of blocks, as groups of about POOL_ROWS rows."""
        order = _permutation(len(self._blocks) - 1, self._seed, epoch)[self._reader :: self._readers]
        if not len(order):
            return []
        first, counts = self._blocks[order], np.diff(self._blocks)[order]
        runs = self._runs[np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]
        lengths = runs[:, 3] - runs[:, 2]
        pool_of = (np.cumsum(lengths) - lengths) // POOL_ROWS
        return np.split(runs, np.flatnonzero(np.diff(pool_of)) + 1)

    def _load(self, runs: np.ndarray, epoch: int, number: int, buffer: np.ndarray) -> _Pool:
        """Reads a pool; returns the columns of RowBatch and the order in which to hand rows out."""
        runs = runs[np.lexsort((runs[:, 2], runs[:, 1]))]  # in stored order: kind to the disk
        lengths = runs[:, 3] - runs[:, 2]
        count = int(lengths.sum())
        rows = buffer[:count]
        token_ids, positions = np.empty(count, np.int32), np.empty(count, np.int32)
        norms = np.empty(count, np.float32)
        layer_place = self.store.require_layer(self.layer)
        filled = 0
        for shard, pieces in self._shards_ahead(runs):
            shard.read_rows(hook_name(self.layer), pieces, rows[filled:])
            for first, end in pieces:
                into = slice(filled, filled + end - first)
                token_ids[into] = shard.column("token_ids")[first:end]
                positions[into] = shard.column("positions")[first:end]
                if self._max_norm is not None:
                    norms[into] = shard.column("norms")[layer_place, first:end]
                filled = into.stop
        sequences = np.repeat(runs[:, 0], lengths).astype(np.int32)
        is_generated = positions >= np.asarray(self._prompt_lengths)[sequences]
        order = _permutation(count, self._seed, epoch, self._reader, self._readers, number)
        if self._max_norm is not None:
            order = order[norms[order] <= self._max_norm]
        return (rows, token_ids, positions, is_generated, sequences), order

    def _shards_ahead(self, runs: np.ndarray) -> Iterator[_Pieces]:
        """Yields runs in stored order by shard, while the rows of the next few are read from disk."""
        hook = hook_name(self.layer)
        columns = (
            ("token_ids", "positions") if self._max_norm is None else ("token_ids", "positions", "norms")
        )

        def opened(number: int) -> Shard:
            return self.store.open_shard(*self._shards[number])

        def prefetched(of_shard: _Pieces) -> _Pieces:
            shard, pieces = of_shard
            for name in columns:
                shard.prefetch(name)
            shard.prefetch(hook, pieces)
            return of_shard

        by_shard = ((opened(number), pieces) for number, pieces in _pieces(runs))
        return ahead(map(prefetched, ahead(by_shard, SHARDS_AHEAD)), SHARDS_AHEAD)

    def _batch(self, parts: list[tuple[np.ndarray, ...]]) -> RowBatch:
        columns = parts[0] if len(parts) == 1 else tuple(map(np.concatenate, zip(*parts, strict=True)))
        if self._framework == "jax":
            return RowBatch(*map(importlib.import_module("jax.numpy").asarray, columns))
        if self._framework == "torch":
            return RowBatch(*map(_to_torch, columns))
        return RowBatch(*columns)


def _pieces(runs: np.ndarray) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yields (shard, its rows [first, end), neighbouring runs as one piece) for runs in stored order."""
    shard, first, end = runs[:, 1], runs[:, 2], runs[:, 3]
    starts = np.r_[True, (shard[1:] != shard[:-1]) | (first[1:] != end[:-1])]
    stops = np.r_[starts[1:], True]
    pieces = zip(shard[starts].tolist(), first[starts].tolist(), end[stops].tolist(), strict=True)
    for number, of_shard in itertools.groupby(pieces, key=operator.itemgetter(0)):
        yield number, [piece[1:] for piece in of_shard]


def _row_count(runs: np.ndarray) -> int:
    return int((runs[:, 3] - runs[:, 2]).sum())


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array at a multiple of ALIGNMENT; reading a file to an odd address takes twice as long."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _take(column: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Returns `column[chosen]` for indices that are known to exist, a third quicker for wide rows."""
    return column.take(
        chosen, axis=0, out=np.empty((len(chosen), *column.shape[1:]), column.dtype), mode="clip"
    )


def _permutation(count: int, *seed: int) -> np.ndarray:
    """Returns a permutation of range(count) from raw numbers, which numpy promises never to change."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _to_torch(column: np.ndarray) -> Any:
    torch = importlib.import_module("torch")
    if column.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(column.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(column)
