"""Reading a store: which sequences there are, and their rows as memory maps, one layer at a time."""

import hashlib
import itertools
import json
import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from activation_store.format import (
    DTYPES,
    MANIFEST,
    ROW_BYTES,
    SequenceRecord,
    StoreError,
    StoreUsageError,
    hook_layer,
    hook_name,
)
from activation_store.index import SequenceIndex
from activation_store.manifest import MANIFEST_BYTES, decode_manifest, manifest_problem
from activation_store.remote_files import open_files
from activation_store.shard import Shard
from activation_store.statistics import LayerStatistics, measure_pieces
from activation_store.store_files import FileStatus

Item = TypeVar("Item")
OUTCOMES = "outcomes.json"
SHARDS_AHEAD = 8  # on their way from disk while one is read
_OPEN_SHARDS = 128  # a file descriptor or two each
_logger = logging.getLogger(__name__)
_DIGESTED = ("token_ids", "positions", "logprobs", "is_generated")


class RowColumns(NamedTuple):
    """Token, position and so on of each row; all arrays have one entry per row."""

    token_ids: Int32[np.ndarray, " rows"]  # the token that was read
    positions: Int32[np.ndarray, " rows"]  # its place in the sequence, prompt included
    is_generated: Bool[np.ndarray, " rows"]
    logprobs: Float32[np.ndarray, " rows"]  # NaN on prompt rows
    norms: Float32[np.ndarray, " rows"]  # Euclidean norm of the row in the layer asked for


@dataclass(frozen=True)
class RowFilter:
    """Chooses which rows of a sequence to read.

    Nothing is deleted from a store: attention sinks are left out here, the first token of a prompt with
    `first_position=1`, others by their norm with `max_norm` (compare `ActivationStore.statistics`).
    """

    generated: bool = True
    prompt: bool = True
    first_position: int = 0
    stop_position: int | None = None  # positions from here on are left out
    max_norm: float | None = None

    def row_range(self, record: SequenceRecord) -> tuple[int, int]:
        """Returns the rows [start, stop) that pass by kind and position, from 0 for the sequence's first."""
        first_stored = record.prompt_length - record.prompt_rows
        stop_position = record.prompt_length + record.generated_length
        if self.stop_position is not None:
            stop_position = min(stop_position, self.stop_position)
        start = max(self.first_position - first_stored, 0 if self.prompt else record.prompt_rows)
        stop = min(stop_position - first_stored, record.n_rows if self.generated else record.prompt_rows)
        return start, max(start, stop)


class ActivationStore:
    """A store opened for reading, while it may still be written to; `directory` is a path or an fsspec URL.

    >>> store = ActivationStore("activations")
    >>> for record in store.sequences(task_ids={"007bbfb7"}):
    ...     rows = store.rows(record, layer=12)  # [record.n_rows, hidden], mapped from disk
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)
        self.files = open_files(directory)
        try:
            manifest = self.files.read(MANIFEST, 0, MANIFEST_BYTES + 1)
        except FileNotFoundError as error:
            raise StoreError(f"{self.directory} is not an activation store: it has no {MANIFEST}") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.directory}: {error.strerror or error}") from error
        self.settings, self.provenance = decode_manifest(manifest, f"{self.directory}/{MANIFEST}")
        if problem := manifest_problem(manifest):  # what is stored can still be read, and verified
            _logger.warning("%s/%s cannot be relied on: %s", self.directory, MANIFEST, problem)
        self.layers = tuple(hook_layer(name) for name in self.settings.hook_names)
        self.index = SequenceIndex(self.files)
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        self._shards_lock = threading.Lock()
        self._listed: dict[int, dict[str, FileStatus]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ActivationStore, (self.directory,)  # memory maps and locks do not travel to worker processes

    def __len__(self) -> int:
        """Returns how many sequences there are, failed ones included."""
        return len(self.index)

    def __getitem__(self, key: str) -> SequenceRecord:
        """Returns the record of a sequence key; raises KeyError where it is not stored."""
        return self.index[key]

    def sequences(
        self,
        *,
        task_ids: Collection[str] | None = None,
        augmentations: Collection[str] | None = None,
        solved: bool | None = None,
        where: Callable[[SequenceRecord], bool] | None = None,
        failed: bool = False,
    ) -> Iterator[SequenceRecord]:
        """Yields the sequences that pass every filter given, in stored order.

        Args:
            task_ids: keeps these tasks.
            augmentations: keeps these augmentations.
            solved: keeps those known, from `write_outcomes`, to be right (True) or wrong (False).
            where: keeps those for which it returns True.
            failed: yields only the sequences that failed, which have no rows, instead of the others.
        """
        outcomes = self.outcomes() if solved is not None else {}
        for record in self.index.records():
            if (
                record.failed == failed
                and (task_ids is None or record.task_id in task_ids)
                and (augmentations is None or record.augmentation in augmentations)
                and (solved is None or outcomes.get(record.key) is solved)
                and (where is None or where(record))
            ):
                yield record

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the stored rows."""
        return DTYPES[self.settings.dtype]

    def require_layer(self, layer: int) -> int:
        """Returns a layer's index among the stored ones; raises StoreError when it is not stored."""
        if layer not in self.layers:
            stored = ", ".join(map(str, self.layers)) or "none"
            raise StoreUsageError(f"layer {layer} is not in {self.directory}; its layers: {stored}")
        return self.layers.index(layer)

    def rows(self, record: SequenceRecord, layer: int) -> Float[np.ndarray, "n_rows hidden"]:
        """Returns the output of decoder block `layer` for a sequence, in the stored dtype, read-only.

        Row r was computed from the token that `columns` names for it. In a local store it is a view into the
        file's memory map: nothing is read before it is used, and other layers never are.

        Raises:
            StoreError: the layer is not stored, or the sequence failed.
        """
        self.require_layer(layer)
        self._require_rows(record)
        return self._shard(record).layer(hook_name(layer))[record.row_start : _end(record)]

    def columns(self, record: SequenceRecord, layer: int) -> RowColumns:
        """Returns token, position and so on of each row that `rows` returns."""
        place = self.require_layer(layer)
        self._require_rows(record)
        at = slice(record.row_start, _end(record))
        return _columns(_known(self._shard(record), place), at, record.prompt_length)

    def iterate(
        self,
        layer: int,
        *,
        sequences: Iterable[SequenceRecord] | None = None,
        rows: RowFilter | None = None,
    ) -> Iterator[tuple[np.ndarray, RowColumns, SequenceRecord]]:
        """Yields (rows, columns, record) of each sequence in order; sequences without any row are left out.

        `rows` are views as in `ActivationStore.rows`; only filtering by norm copies.
        """
        chosen = rows or RowFilter()
        place, hook = self.require_layer(layer), hook_name(layer)
        for shard, records in self._shards_ahead(hook, self.sequences() if sequences is None else sequences):
            of_layer, known = shard.layer(hook), _known(shard, place)
            for record in records:
                start, stop = chosen.row_range(record)
                if start == stop:
                    continue
                shard.require(record)
                at = slice(record.row_start + start, record.row_start + stop)
                data, columns = of_layer[at], _columns(known, at, record.prompt_length)
                if chosen.max_norm is not None and not (keep := columns.norms <= chosen.max_norm).all():
                    data, columns = data[keep], RowColumns(*(column[keep] for column in columns))
                if len(data):
                    yield data, columns, record

    def _shards_ahead(
        self, hook: str, sequences: Iterable[SequenceRecord]
    ) -> Iterator[tuple[Shard, list[SequenceRecord]]]:
        """Yields the sequences by shard, while the rows of the next few are read from disk."""

        def opened(group: tuple[Any, Iterator[SequenceRecord]]) -> tuple[Shard, list[SequenceRecord]]:
            records = list(group[1])
            return self.open_shard(records[0].path, records[0].shard_bytes), records  # waits for nothing

        def prefetched(of_shard: tuple[Shard, list[SequenceRecord]]) -> tuple[Shard, list[SequenceRecord]]:
            shard, records = of_shard
            for name in ("token_ids", "positions", "logprobs", "norms"):
                shard.prefetch(name)
            shard.prefetch(hook, [(min(r.row_start for r in records), max(_end(r) for r in records))])
            return of_shard

        kept = (record for record in sequences if not record.failed)
        groups = itertools.groupby(kept, key=lambda record: (record.host, record.shard))
        return ahead(map(prefetched, ahead(map(opened, groups), SHARDS_AHEAD)), SHARDS_AHEAD)

    def prompt_token_ids(self, record: SequenceRecord) -> Int32[np.ndarray, " prompt_length"]:
        """Returns the prompt, which is kept whether or not its rows are."""
        self._require_rows(record)
        start = record.prompt_start
        return self._shard(record).column("prompt_token_ids")[start : start + record.prompt_length]

    def generated_tokens(self, record: SequenceRecord) -> Int32[np.ndarray, " generated_length"]:
        """Returns the generated tokens, EOS included."""
        return self._generated(record, "token_ids")

    def generated_logprobs(self, record: SequenceRecord) -> Float32[np.ndarray, " generated_length"]:
        """Returns the log-probability of each generated token, in nats."""
        return self._generated(record, "logprobs")

    def sequence_digest(self, record: SequenceRecord) -> str:
        """Returns the sha256 of a sequence: its rows of all layers, tokens, positions and log-probabilities.

        Its key and its end count too. Two runs agree byte for byte when their digests do, wherever their
        shards put the sequence.
        """
        digest = hashlib.sha256(f"{record.key} {record.finish_reason} {record.failure}".encode())
        if record.n_rows:
            rows = slice(record.row_start, _end(record))
            shard = self._shard(record)
            columns = [shard.column(name)[rows] for name in _DIGESTED]
            layers = (shard.layer(name)[rows] for name in self.settings.hook_names)
            for tensor in itertools.chain(columns, [self.prompt_token_ids(record)], layers):
                digest.update(tensor.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def statistics(self, layer: int, group: str = "generated") -> LayerStatistics:
        """Returns statistics of a layer over all stored "generated" or "prompt" rows.

        The first token of a prompt is an attention sink that outweighs the others in the "prompt" group.
        """
        hidden = self.settings.hidden_size
        place = self.require_layer(layer)
        merged = LayerStatistics.empty(hidden)
        by_shard: dict[str, list[SequenceRecord]] = {}
        for record in self.sequences():
            by_shard.setdefault(record.path, []).append(record)
        for records in by_shard.values():
            shard = self._shard(records[0])
            if f"statistics.{group}.mean" not in shard:
                continue
            if len(records) != shard.sequences:  # some were dropped; the stored figures are of all
                merged = merged.merge(_measured(shard, layer, group, records))
                continue
            generated = int(np.count_nonzero(shard.column("is_generated")))
            count = generated if group == "generated" else shard.place("is_generated").shape[0] - generated
            mean, variance, norm = (
                shard.column(f"statistics.{group}.{name}")[place].astype(np.float64)
                for name in ("mean", "variance", "norm")
            )
            merged = merged.merge(LayerStatistics(count, mean, variance * count, float(norm) * count))
        return merged

    def outcomes(self) -> dict[str, bool]:
        """Returns whether each sequence solved its puzzle, by key, as far as `write_outcomes` was told."""
        try:
            return json.loads(self.files.read(OUTCOMES))
        except FileNotFoundError:
            return {}

    def _require_rows(self, record: SequenceRecord) -> None:
        if record.failed:
            raise StoreError(f"sequence {record.key} failed and has nothing stored: {record.failure}")

    def open_shard(self, path: str, size: int) -> Shard:
        """Opens the shard at `SequenceRecord.path`, of `shard_bytes` bytes; the last few stay open."""
        with self._shards_lock:
            if path in self._shards:
                self._shards.move_to_end(path)
                return self._shards[path]
        where = f"{self.directory}/{path}"
        try:
            file = self.files.open_file(path)
        except OSError as error:
            raise StoreError(f"cannot read {where}: {error.strerror or error}") from error
        shard = Shard(file, size, where, self.settings)
        with self._shards_lock:
            self._shards[path] = shard
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

    def require_shard(self, record: SequenceRecord) -> None:
        """Raises StoreError unless a record's shard is there, as long as written, with room for its rows.

        The shards of a host are listed once, and none is opened.
        """
        listed = self._listed.get(record.host, {})
        if record.shard not in listed:
            listed = self._listed[record.host] = self.files.shards(record.host)
        where = f"{self.directory}/{record.path}"
        if record.shard not in listed:
            raise StoreError(f"{where} is missing")
        size, oddity = listed[record.shard].size, listed[record.shard].oddity
        if oddity or size != record.shard_bytes:
            raise StoreError(
                f"{where} is {oddity or f'{size} bytes long'}, {record.shard_bytes} were written"
            )
        row_bytes = ROW_BYTES + len(self.layers) * self.settings.hidden_size * self.dtype.itemsize
        if _end(record) * row_bytes > size:
            raise StoreError(f"{record.label}: its rows end outside {where}")

    def _shard(self, record: SequenceRecord) -> Shard:
        shard = self.open_shard(record.path, record.shard_bytes)
        shard.require(record)
        return shard

    def _generated(self, record: SequenceRecord, name: str) -> np.ndarray:
        self._require_rows(record)
        stop = _end(record)
        return self._shard(record).column(name)[stop - record.generated_length : stop]


def _measured(shard: Shard, layer: int, group: str, records: Iterable[SequenceRecord]) -> LayerStatistics:
    """Measures the "generated" or "prompt" rows of some of a shard's sequences."""
    rows = shard.layer(hook_name(layer))
    pieces = []
    for record in records:
        of_record = rows[record.row_start : _end(record)]
        prompt, generated = of_record[: record.prompt_rows], of_record[record.prompt_rows :]
        pieces.append(generated if group == "generated" else prompt)
    return measure_pieces(pieces, rows.shape[1])[0]


def ahead(items: Iterable[Item], distance: int) -> Iterator[Item]:
    """Yields the items in order, each drawn `distance` items before it is yielded."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > distance:
            yield waiting.popleft()
    yield from waiting


def _known(shard: Shard, place: int) -> tuple[np.ndarray, ...]:
    """Returns tokens, positions, log-probabilities and one layer's norms of all rows of a shard."""
    return *(shard.column(name) for name in ("token_ids", "positions", "logprobs")), shard.column("norms")[
        place
    ]


def _columns(known: tuple[np.ndarray, ...], at: slice, prompt_length: int) -> RowColumns:
    """Returns the columns of the rows `at` of a shard, which are those of one sequence."""
    token_ids, positions, logprobs, norms = known
    of_rows = positions[at]
    # Not the stored is_generated, which lies at the file's other end.
    return RowColumns(token_ids[at], of_rows, of_rows >= prompt_length, logprobs[at], norms[at])


def _end(record: SequenceRecord) -> int:
    return record.row_start + record.n_rows


def write_outcomes(directory: str | os.PathLike[str], outcomes: Mapping[str, bool]) -> None:
    """Records which sequences, by key, solved their puzzle; earlier outcomes of other keys are kept.

    Call it from one process. `ActivationStore.sequences(solved=...)` filters by it.
    """
    files = open_files(directory)
    merged = ActivationStore(directory).outcomes() | dict(outcomes)
    files.replace(OUTCOMES, json.dumps(merged, indent=0, sort_keys=True).encode())
