"""The rows of a shuffle: cut into blocks, put in random order, and read into memory a pool at a time."""

import functools
import hashlib
import itertools
import math
import operator
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from activation_store.format import SequenceRecord
from activation_store.open_shards import SHARDS_AHEAD, ahead
from activation_store.reader import ActivationStore
from activation_store.rows import LayerChoice, RowFilter
from activation_store.shard import ALIGNMENT, Shard

_Pieces = tuple[Shard, list[tuple[int, int]]]  # rows [first, end) of a shard


class Pool(NamedTuple):
    """Rows in memory, in stored order, and the order in which to hand them out."""

    rows: tuple[np.ndarray, ...]  # of each layer [n, width] in the stored dtype
    token_ids: np.ndarray
    positions: np.ndarray
    is_generated: np.ndarray
    sequences: np.ndarray  # int32 [n]: the place of each row's sequence in `RowPools.keys`
    order: np.ndarray  # of the rows that pass the filter


class RowPools:
    """The chosen rows of a store, to be read in random order.

    Args:
        store: the store to read; what is committed later is not seen.
        choice: which layers.
        sequences: the sequences to read.
        chosen: which of their rows.
        block_rows: a block is the next runs of a shard until they have so many rows, so that short sequences
            cost no more than long ones.
    """

    def __init__(
        self,
        store: ActivationStore,
        choice: LayerChoice,
        sequences: Iterable[SequenceRecord],
        chosen: RowFilter,
        block_rows: int,
    ) -> None:
        self.store = store
        self.keys: list[str] = []
        self._choice = choice
        self._shards: list[tuple[str, int]] = []  # (path, bytes)
        self._prompt_lengths = array("i")
        self._max_norm = chosen.max_norm
        self._runs, self._blocks = self._cut(sequences, chosen, block_rows)
        content = f"{chosen.max_norm} {self._shards}".encode() + self._runs.tobytes() + self._blocks.tobytes()
        self.content = hashlib.sha256(content).hexdigest()

    @property
    def row_count(self) -> int:
        """How many rows there are, before any is left out by its norm."""
        return _row_count(self._runs)

    def _cut(
        self, sequences: Iterable[SequenceRecord], chosen: RowFilter, block_rows: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cuts the chosen rows into runs and blocks.

        Returns:
            The runs, int64 [runs, 4]: sequence, shard, first and end row in the shard. And the first run of
            each block, int64 [blocks + 1].
        """
        runs, blocks = array("q"), array("q")
        shard_numbers: dict[str, int] = {}
        in_block, block_shard = 0, -1
        for record in map(self.store.own, sequences):
            start, stop = chosen.row_range(record)
            if start == stop:
                continue
            self.store.require_shard(record)
            shard = shard_numbers.setdefault(record.path, len(shard_numbers))
            if shard == len(self._shards):
                self._shards.append((record.path, record.shard_bytes))
            for first in range(record.row_start + start, record.row_start + stop, block_rows):
                end = min(first + block_rows, record.row_start + stop)
                if in_block >= block_rows or block_shard != shard:
                    blocks.append(len(runs) // 4)
                    in_block, block_shard = 0, shard
                runs.extend((len(self.keys), shard, first, end))
                in_block += end - first
            self.keys.append(record.key)
            self._prompt_lengths.append(record.prompt_length)
        blocks.append(len(runs) // 4)
        return np.array(runs, np.int64).reshape(-1, 4), np.array(blocks, np.int64)

    def pools(self, seed: tuple[int, int], reader: int, readers: int, pool_rows: int) -> list[np.ndarray]:
        """Returns one reader's runs in random order of their blocks, as groups of about `pool_rows` rows.

        `seed` is (seed, epoch). A group is the numbers of its runs.
        """
        order = permutation(len(self._blocks) - 1, *seed)[reader::readers]
        if not len(order):
            return []
        first, counts = self._blocks[order], np.diff(self._blocks)[order]
        numbers = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        runs = self._runs[numbers]
        lengths = runs[:, 3] - runs[:, 2]
        pool_of = (np.cumsum(lengths) - lengths) // pool_rows
        return np.split(numbers, np.flatnonzero(np.diff(pool_of)) + 1)

    def ends(self, pools: list[np.ndarray]) -> np.ndarray:
        """Returns how many rows that pass the filter come before the end of each pool, int64 [pools]."""
        return np.cumsum([self._kept[pool].sum() for pool in pools], dtype=np.int64)

    @functools.cached_property
    def _kept(self) -> np.ndarray:
        """How many rows of each run pass the filter; for one by norm the stored norms are read."""
        lengths = self._runs[:, 3] - self._runs[:, 2]
        if self._max_norm is None:
            return lengths
        kept = np.empty_like(lengths)
        for number, shard in enumerate(self._shards):
            of_shard = np.flatnonzero(self._runs[:, 1] == number)
            norms = self.store.open_shard(*shard).column("norms")[list(self._choice.places)]
            before = np.concatenate([[0], np.cumsum((norms <= self._max_norm).all(axis=0))])
            kept[of_shard] = before[self._runs[of_shard, 3]] - before[self._runs[of_shard, 2]]
        return kept

    def buffers(self, pools: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Returns memory for two pools, [rows, width] a layer: one is handed out while one is filled.

        Fresh memory for every pool would cost as much as reading it.
        """
        largest = max((_row_count(self._runs[pool]) for pool in pools), default=0)
        widths = [self.store.settings.hook_widths[hook] for hook in self._choice.hooks]
        return [
            [_aligned((largest, width), self.store.dtype) for width in widths]
            for _ in range(min(2, len(pools)))
        ]

    def load(self, pool: np.ndarray, buffer: list[np.ndarray], seed: tuple[int, ...]) -> Pool:
        """Reads a pool into `buffer`, one of `buffers`; `seed` decides the order of its rows."""
        runs = self._runs[pool]
        runs = runs[np.lexsort((runs[:, 2], runs[:, 1]))]  # in stored order: kind to the disk
        lengths = runs[:, 3] - runs[:, 2]
        count = int(lengths.sum())
        rows = tuple(of_layer[:count] for of_layer in buffer)
        token_ids, positions = np.empty(count, np.int32), np.empty(count, np.int32)
        keep = np.ones(count, bool)
        filled = 0
        for shard, pieces in self._shards_ahead(runs):
            for hook, of_layer in zip(self._choice.hooks, rows, strict=True):
                shard.read_rows(hook, pieces, of_layer[filled:])
            for first, end in pieces:
                into = slice(filled, filled + end - first)
                token_ids[into] = shard.column("token_ids")[first:end]
                positions[into] = shard.column("positions")[first:end]
                if self._max_norm is not None:
                    norms = shard.column("norms")[list(self._choice.places), first:end]
                    keep[into] = (norms <= self._max_norm).all(axis=0)
                filled = into.stop
        sequences = np.repeat(runs[:, 0], lengths).astype(np.int32)
        is_generated = positions >= np.asarray(self._prompt_lengths)[sequences]
        order = permutation(count, *seed)
        if self._max_norm is not None:
            order = order[keep[order]]
        return Pool(rows, token_ids, positions, is_generated, sequences, order)

    def _shards_ahead(self, runs: np.ndarray) -> Iterator[_Pieces]:
        """Yields runs in stored order by shard, while the rows of the next few are read from disk."""
        columns = (
            ("token_ids", "positions") if self._max_norm is None else ("token_ids", "positions", "norms")
        )

        def opened(number: int) -> Shard:
            return self.store.open_shard(*self._shards[number])

        def prefetched(of_shard: _Pieces) -> _Pieces:
            shard, pieces = of_shard
            for name in columns:
                shard.prefetch(name)
            for hook in self._choice.hooks:
                shard.prefetch(hook, pieces)
            return of_shard

        by_shard = ((opened(number), pieces) for number, pieces in _pieces(runs))
        return ahead(map(prefetched, ahead(by_shard, SHARDS_AHEAD)), SHARDS_AHEAD)


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


def permutation(count: int, *seed: int) -> np.ndarray:
    """Returns a permutation of range(count) from raw numbers, which numpy promises never to change."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
