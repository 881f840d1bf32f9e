"""Training batches: the rows of one layer, or of several, in a seeded shuffle over the whole store.

Reading row by row at random would be bound by the disk's seeks. Instead the stored rows are cut into small
blocks, the blocks of the whole store are put in random order, and the rows of a pool of blocks are shuffled
in memory: each batch mixes rows from hundreds of places, every row comes exactly once an epoch, and the order
depends on (seed, epoch, reader, readers) only. So a place in it is three numbers, and resuming is exact.
"""

import copy
import importlib
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np

from activation_store.format import SequenceRecord, StoreError
from activation_store.hook_labels import layers_text
from activation_store.reader import ActivationStore
from activation_store.row_pools import Pool, RowPools
from activation_store.rows import (
    Layers,
    RowFilter,
    check_row_dtype,
    choose_layers,
    in_dtype,
    row_filter,
    shapes_text,
    whole,
)
from activation_store.worker_epochs import WorkerEpochs

BLOCK_ROWS = 128
POOL_ROWS = 1 << 15
FRAMEWORKS = ("numpy", "jax", "torch")


class RowBatch(NamedTuple):
    """Rows and what each of them is, as arrays of the framework asked for."""

    # [n, hidden], or as wide as the hook; float32 unless asked for as stored. `{layer: rows}` where several
    # were named.
    rows: Any
    token_ids: Any  # int32 [n]
    positions: Any  # int32 [n]
    is_generated: Any  # bool [n]
    sequences: Any  # int32 [n]: `ShuffledBatches.keys[i]` is the key of sequence i

    def __repr__(self) -> str:
        """Says in a line what there is, without the values."""
        return shapes_text(self)


@dataclass
class _Place:
    """How much has been handed out: whole epochs, whole pools of this epoch, rows of the current pool."""

    epoch: int = 0
    pool: int = 0
    row: int = 0
    stop: int | None = None  # the row of the epoch at which a share of it ends; None: the epoch's end


class ShuffledBatches:
    """Iterates over one epoch of batches; iterating again goes on where the last iteration stopped.

    A torch DataLoader takes it as it is: `DataLoader(batches, batch_size=None, num_workers=2)`. Its workers
    share the batches out, the same ones as without workers. Each iteration over workers is a new epoch, also
    after a `break`, because they have read ahead.

    Args:
        store: the store to read; what is committed later is not seen.
        layer: a layer's number or hook name; of several, `batch.rows` is `{layer: rows}`, aligned.
        batch_size: rows in a batch; the last batch of an epoch may be smaller.
        seed: decides the order together with the epoch, `reader` and `readers`; the layer does not.
        sequences: the sequences to read, by default all.
        rows: which of their rows to read, by default all.
        reader, readers: this is reader 0 to readers - 1, which gets its own part of the rows; parts are equal
            to within a few blocks of 128 to 255 rows.
        framework: "numpy", "jax" or "torch", the type of a batch's arrays.
        dtype: of the rows: "float32", or "stored" for what the store holds, such as bfloat16.

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
        layer: Layers,
        batch_size: int,
        *,
        seed: int = 0,
        sequences: Iterable[SequenceRecord] | None = None,
        rows: RowFilter | None = None,
        reader: int = 0,
        readers: int = 1,
        framework: str = "numpy",
        dtype: str = "float32",
    ) -> None:
        if framework not in FRAMEWORKS:
            raise StoreError(f"framework {framework!r} is none of {', '.join(FRAMEWORKS)}")
        check_row_dtype(dtype)
        self._choice = choose_layers(layer, store.settings.hook_names, store.directory)
        self.batch_size = whole(batch_size, "batch_size")
        self._seed, self._reader = whole(seed, "seed"), whole(reader, "reader")
        self._readers = whole(readers, "readers")
        if batch_size < 1 or not reader < readers:
            raise StoreError(f"there are no batches of {batch_size} rows for reader {reader} of {readers}")
        self.store = store
        self.layer = self._choice.layers[0] if self._choice.alone else self._choice.layers
        self._framework, self._dtype = framework, dtype
        found = store.sequences() if sequences is None else sequences
        self._rows = RowPools(store, self._choice, found, row_filter(rows), BLOCK_ROWS)
        self._place = _Place()
        self._shares: tuple[tuple[int, int], ...] = ()  # (part, parts) of each `split` that led here
        torch = _torch(framework == "torch")
        # What is made in a worker with several readers, or split there, is that worker's share already.
        self._is_workers = torch is not None and torch.this_worker() is not None and readers > 1
        self._epochs = WorkerEpochs() if torch is not None else None
        self._iterations = 0  # of a worker's copy
        if torch is not None:
            torch.register(ShuffledBatches, RowBatch)

    def __repr__(self) -> str:
        """Says in a line what there is."""
        return (
            f"ShuffledBatches({self.store.directory!r}: layer {layers_text(self._choice.layers)}, "
            f"{self._rows.row_count} rows of {len(self.keys)} sequences, {self.batch_size} a batch, reader "
            f"{self._reader} of {self._readers}, epoch {self._place.epoch})"
        )

    @property
    def keys(self) -> list[str]:
        """The keys of the sequences that are read, in the numbering of `RowBatch.sequences`."""
        return self._rows.keys

    def __len__(self) -> int:
        """Returns how many batches the current epoch has from its beginning.

        It differs a little between epochs where there are several readers. Where rows are filtered by norm,
        the norms of all of them are read once.
        """
        whole_epoch = copy.copy(self)
        whole_epoch._place = _Place(self._place.epoch)
        whole_epoch._cut_shares()
        return whole_epoch._left(self._rows.ends(whole_epoch._pools()))

    def __getitem__(self, number: int) -> NoReturn:
        # What a DataLoader asks for that was not told that these batches are iterated over.
        raise TypeError(
            "batches come in their own order, none by number: iterate over them, and give a DataLoader "
            "batches.torch_dataset()"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns how far the iteration has come, as plain values, which fit any batch size.

        What the workers of a DataLoader have done is not in it; they tell nobody.
        """
        return {**self._identity(), **asdict(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`.

        Raises:
            StoreError: the state is of other rows, seed or reader, or its place is none of its epoch.
        """
        if not isinstance(state, dict):
            raise StoreError(f"{state!r} is no saved state, which state_dict() gives")
        known = {"shares": [], "stop": None} | state  # as they are where an earlier version wrote none
        for name, value in self._identity().items():
            if known.get(name) != value:
                raise StoreError(
                    f"the saved state is of other batches: {name} was {known.get(name)}, is {value}"
                )
        epoch, pool, row = (whole(known.get(name), name) for name in ("epoch", "pool", "row"))
        place = _Place(epoch, pool, row, None if known["stop"] is None else whole(known["stop"], "stop"))
        if place != _Place(epoch):
            self._check_place(place)
        self._go_to(place)

    def _check_place(self, place: _Place) -> None:
        """Raises StoreError for a place that its epoch does not have."""
        there = copy.copy(self)
        there._place = place
        ends = there._rows.ends(there._pools()).tolist()
        last = ends[-1] if ends else 0
        pool_end = ends[place.pool] if place.pool < len(ends) else last
        position = there._position(np.array(ends))
        stop = last if place.stop is None else place.stop
        if place.pool > len(ends) or position > pool_end or not position <= stop <= last:
            raise StoreError(
                f"the saved state is damaged: epoch {place.epoch}, of {last} rows, has no place at pool "
                f"{place.pool}, row {place.row}, stop {place.stop}"
            )

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "reader": self._reader,
            "readers": self._readers,
            "content": self._rows.content,
            "shares": [list(share) for share in self._shares],
        }

    def set_epoch(self, epoch: int) -> None:
        """Starts at the beginning of an epoch."""
        self._go_to(_Place(whole(epoch, "epoch")))

    def _go_to(self, place: _Place) -> None:
        self._place = place
        if self._epochs is not None:
            self._epochs.begin(asdict(place))

    def split(self, part: int, parts: int) -> Self:
        """Returns one of `parts` shares of the batches that are left of this epoch, and of later epochs.

        The shares together have the batches that these have; no batch is cut.
        """
        if not 0 <= whole(part, "part") < whole(parts, "parts"):
            raise StoreError(f"there is no part {part} of {parts}")
        mine = copy.copy(self)
        mine._place = copy.copy(self._place)
        if mine._shares and mine._place == _Place(mine._place.epoch):
            mine._cut_shares()
        mine._shares = (*self._shares, (part, parts))
        mine._cut(part, parts)
        torch = _torch(load=False)
        mine._is_workers = self._is_workers or (torch is not None and torch.this_worker() is not None)
        mine._epochs = None if torch is None or mine._is_workers else WorkerEpochs()
        return mine

    def _cut_shares(self) -> None:
        for part, parts in self._shares:
            self._cut(part, parts)

    def _cut(self, part: int, parts: int) -> None:
        """Narrows the place and its end to one of `parts` shares of the batches that are left."""
        place, ends = self._place, self._rows.ends(self._pools())
        begin, left = self._position(ends), self._left(ends)
        last = self._stop(ends)
        start = min(last, begin + left * part // parts * self.batch_size)
        place.stop = min(last, begin + left * (part + 1) // parts * self.batch_size)
        place.pool = int(np.searchsorted(ends, start, side="right"))
        place.row = start - (int(ends[place.pool - 1]) if place.pool else 0)

    def _position(self, ends: np.ndarray) -> int:
        """Returns how many rows of the epoch lie before the place; `ends` are those of its pools."""
        pool = min(self._place.pool, len(ends))
        return (int(ends[pool - 1]) if pool else 0) + self._place.row

    def _stop(self, ends: np.ndarray) -> int:
        if self._place.stop is not None:
            return self._place.stop
        return int(ends[-1]) if len(ends) else 0

    def _left(self, ends: np.ndarray) -> int:
        """Returns how many batches come from the place to its end."""
        return -(-max(self._stop(ends) - self._position(ends), 0) // self.batch_size)

    def torch_dataset(self) -> Any:
        """Returns a torch `IterableDataset` of these batches, whatever their framework, as tensors."""
        torch = _torch(load=True)
        torch.register(ShuffledBatches, RowBatch)
        self._epochs = self._epochs or WorkerEpochs()
        return torch.TorchBatches(self)

    def __iter__(self) -> Iterator[RowBatch]:
        torch = _torch(load=False)
        if torch is None:
            return self._read()
        torch.register(ShuffledBatches, RowBatch)
        worker = torch.this_worker()
        mine = self if worker is None or self._is_workers else self._of_worker(worker)
        # A DataLoader makes tensors of numpy's arrays, but for those in bfloat16.
        caller = sys._getframe(1).f_globals.get("__name__")
        for_loader = self._framework == "numpy" and caller == torch.LOADER
        return torch.as_tensors(mine._read()) if for_loader else mine._read()

    def _of_worker(self, worker: Any) -> Self:
        """Returns a DataLoader worker's share of the epoch that all workers of the iteration read."""
        number = self._iterations
        if self._epochs is not None:
            iteration = f"{worker.loader}-{self._iterations}"
            moved, number = self._epochs.claim(iteration, follow=self._iterations > 0)
            if moved is not None:
                self._place = _Place(**moved)
        self._iterations += 1
        current = copy.copy(self)
        if number:
            current._place = _Place(self._place.epoch + number)
        return current.split(worker.number, worker.workers)

    def _pools(self) -> list[np.ndarray]:
        return self._rows.pools((self._seed, self._place.epoch), self._reader, self._readers, POOL_ROWS)

    def _read(self) -> Iterator[RowBatch]:
        """Yields the batches from the place on, and moves it along."""
        place = self._place = copy.copy(self._place)  # an iteration that still runs will notice
        if place == _Place(place.epoch):
            self._cut_shares()
        pools = self._pools()
        left = None if place.stop is None else place.stop - self._position(self._rows.ends(pools))
        parts: list[tuple[np.ndarray, ...]] = []  # of the batch being filled
        missing = self.batch_size
        try:
            for pool in self._loaded(pools, place, left):
                while place.row < len(pool.order) and left != 0:
                    chosen = pool.order[place.row :][: missing if left is None else min(missing, left)]
                    parts.append(_taken(pool, chosen))
                    place.row += len(chosen)
                    missing -= len(chosen)
                    left = None if left is None else left - len(chosen)
                    if not missing:
                        batch, parts, missing = self._batch(parts), [], self.batch_size
                        yield batch
                        if place is not self._place:
                            raise StoreError(
                                "these batches were set to another place while they were iterated over; two "
                                "iterations at a time need two ShuffledBatches"
                            )
            self._place = _Place(place.epoch + 1)
            if parts:
                yield self._batch(parts)
        finally:
            self._go_to(self._place)

    def _loaded(self, pools: list[np.ndarray], place: _Place, left: int | None) -> Iterator[Pool]:
        """Yields the pools from the place on, while the next one is read; moves the place past each.

        `left` is how many rows are wanted, by default all.
        """
        if place.pool >= len(pools) or left == 0:
            return
        with ThreadPoolExecutor(1) as loader:
            buffers = self._rows.buffers(pools[place.pool :])

            def load(number: int) -> Future[Pool]:
                seed = (self._seed, place.epoch, self._reader, self._readers, number)
                return loader.submit(self._rows.load, pools[number], buffers[number % len(buffers)], seed)

            loading = load(place.pool)
            while True:
                pool = loading.result()
                left = None if left is None else left - (len(pool.order) - place.row)
                last = place.pool + 1 == len(pools) or (left is not None and left <= 0)
                if not last:
                    loading = load(place.pool + 1)
                yield pool
                place.pool, place.row = place.pool + 1, 0
                if last:
                    return

    def _batch(self, parts: list[tuple[np.ndarray, ...]]) -> RowBatch:
        arrays = parts[0] if len(parts) == 1 else tuple(map(np.concatenate, zip(*parts, strict=True)))
        count = len(self._choice.layers)
        rows = [self._converted(in_dtype(of_layer, self._dtype)) for of_layer in arrays[:count]]
        return RowBatch(self._choice.label(rows), *map(self._converted, arrays[count:]))

    def _converted(self, array: np.ndarray) -> Any:
        """Returns an array as one of the framework asked for."""
        if self._framework == "jax":
            return importlib.import_module("jax.numpy").asarray(array)
        return _torch(load=True).as_tensor(array) if self._framework == "torch" else array


def _taken(pool: Pool, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns of the rows `chosen` those of each layer, [n, hidden], and the columns of a batch, [n]."""
    columns = (pool.token_ids, pool.positions, pool.is_generated, pool.sequences)
    return tuple(_take(array, chosen) for array in (*pool.rows, *columns))


def _take(column: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Returns `column[chosen]` for indices that are known to exist, a third quicker for wide rows."""
    return column.take(
        chosen, axis=0, out=np.empty((len(chosen), *column.shape[1:]), column.dtype), mode="clip"
    )


def _torch(load: bool) -> Any:
    """Returns the store's module for torch, if torch is there already or is to be loaded, else None."""
    if not (load or "torch.utils.data" in sys.modules):
        return None
    try:
        return importlib.import_module("activation_store.torch_dataset")
    except ImportError as error:
        raise StoreError("batches for torch need torch: pip install torch") from error
