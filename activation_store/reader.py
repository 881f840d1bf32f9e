"""Reading a store back: which sequences there are, and their rows as memory maps, one layer at a time."""

import hashlib
import itertools
import json
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from activation_store.format import (
    DTYPES,
    MANIFEST,
    SequenceRecord,
    StoreError,
    decode_manifest,
    hook_layer,
    hook_name,
)
from activation_store.index import SequenceIndex
from activation_store.remote_files import open_files
from activation_store.shard import Shard
from activation_store.statistics import LayerStatistics

Item = TypeVar("Item")
OUTCOMES = "outcomes.json"
SHARDS_AHEAD = 8  # on their way from disk while one is read
_OPEN_SHARDS = 128  # a file descriptor or two each
_DIGESTED = ("token_ids", "positions", "logprobs", "is_generated")


class RowColumns(NamedTuple):
    """What is known of each row beside its activations; all arrays have one entry per row."""

    token_ids: np.ndarray  # int32, the token that was read
    positions: np.ndarray  # int32, its place in the sequence, prompt included
    is_generated: np.ndarray  # bool
    logprobs: np.ndarray  # float32, NaN on prompt rows
    norms: np.ndarray  # float32, Euclidean norm of the row in the layer asked for


@dataclass(frozen=True)
class RowFilter:
    """Which rows of a sequence to read.

    Nothing is deleted from a store: attention sinks are left out here, the first token of a prompt with
    `first_position=1`, others by their norm with `max_norm` (compare `ActivationStore.statistics`).
    """

    generated: bool = True
    prompt: bool = True
    first_position: int = 0
    stop_position: int | None = None  # positions from here on are left out
    max_norm: float | None = None

    def row_range(self, record: SequenceRecord) -> tuple[int, int]:
        """The rows [start, stop) of a sequence that pass by kind and position, counted from its first row."""
        first_stored = record.prompt_length - record.prompt_rows
        stop_position = record.prompt_length + record.generated_length
        if self.stop_position is not None:
            stop_position = min(stop_position, self.stop_position)
        start = max(self.first_position - first_stored, 0 if self.prompt else record.prompt_rows)
        stop = min(stop_position - first_stored, record.n_rows if self.generated else record.prompt_rows)
        return start, max(start, stop)


class ActivationStore:
    """A store opened for reading; `directory` is a path or an fsspec URL. It may still be written to.

    >>> store = ActivationStore("activations")
    >>> for record in store.sequences(task_ids={"007bbfb7"}):
    ...     rows = store.rows(record, layer=12)  # [record.n_rows, hidden], mapped from disk
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)
        self.files = open_files(directory)
        try:
            manifest = self.files.read(MANIFEST)
        except FileNotFoundError as error:
            raise StoreError(f"{self.directory} is not an activation store: it has no {MANIFEST}") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.directory}: {error.strerror or error}") from error
        self.settings, self.provenance = decode_manifest(manifest, f"{self.directory}/{MANIFEST}")
        self.layers = tuple(hook_layer(name) for name in self.settings.hook_names)
        self.index = SequenceIndex(self.files)
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        self._shards_lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ActivationStore, (self.directory,)  # memory maps and locks do not travel to worker processes

    def __len__(self) -> int:
        """How many sequences there are, failed ones included."""
        return len(self.index)

    def __getitem__(self, key: str) -> SequenceRecord:
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
        """The sequences that pass every filter given, in stored order.

        `solved` keeps those known to be right (True) or wrong (False), from `write_outcomes`. Sequences that
        failed have no rows; they are listed, and only they, with `failed=True`.
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
        """The place of a layer among the stored ones; StoreError when it is not stored."""
        if layer not in self.layers:
            stored = ", ".join(map(str, self.layers)) or "none"
            raise StoreError(f"layer {layer} is not in {self.directory}; its layers: {stored}")
        return self.layers.index(layer)

    def rows(self, record: SequenceRecord, layer: int) -> np.ndarray:
        """The output of decoder block `layer` for a sequence: [n_rows, hidden], stored dtype, read-only.

        A view into the file's memory map for a local store: nothing is read before it is used, and other
        layers never are.
        """
        self.require_layer(layer)
        self._require_rows(record)
        return self._shard(record).layer(hook_name(layer))[record.row_start : _end(record)]

    def columns(self, record: SequenceRecord, layer: int) -> RowColumns:
        """Token, position and so on of each row that `rows` returns."""
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
        """(rows, columns, record) of each sequence, in stored order, sequences without any row left out.

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
                at = slice(record.row_start + start, record.row_start + stop)
                data, columns = of_layer[at], _columns(known, at, record.prompt_length)
                if chosen.max_norm is not None and not (keep := columns.norms <= chosen.max_norm).all():
                    data, columns = data[keep], RowColumns(*(column[keep] for column in columns))
                if len(data):
                    yield data, columns, record

    def _shards_ahead(
        self, hook: str, sequences: Iterable[SequenceRecord]
    ) -> Iterator[tuple[Shard, list[SequenceRecord]]]:
        """The sequences by shard; the rows of the next few are on their way from disk while one is used."""

        def opened(group: tuple[Any, Iterator[SequenceRecord]]) -> tuple[Shard, list[SequenceRecord]]:
            records = list(group[1])
            return self._shard(records[0]), records

        def prefetched(of_shard: tuple[Shard, list[SequenceRecord]]) -> tuple[Shard, list[SequenceRecord]]:
            shard, records = of_shard
            for name in ("token_ids", "positions", "logprobs", "norms"):
                shard.prefetch(name)
            shard.prefetch(hook, [(min(r.row_start for r in records), max(_end(r) for r in records))])
            return of_shard

        kept = (record for record in sequences if not record.failed)
        groups = itertools.groupby(kept, key=lambda record: (record.host, record.shard))
        return ahead(map(prefetched, ahead(map(opened, groups), SHARDS_AHEAD)), SHARDS_AHEAD)

    def prompt_token_ids(self, record: SequenceRecord) -> np.ndarray:
        """The prompt, int32 [prompt_length]; kept whether or not its rows are."""
        self._require_rows(record)
        start = record.prompt_start
        return self._shard(record).column("prompt_token_ids")[start : start + record.prompt_length]

    def generated_tokens(self, record: SequenceRecord) -> np.ndarray:
        """The generated tokens, int32 [generated_length], EOS included."""
        return self._generated(record, "token_ids")

    def generated_logprobs(self, record: SequenceRecord) -> np.ndarray:
        """Their log-probabilities, float32 [generated_length]."""
        return self._generated(record, "logprobs")

    def sequence_digest(self, record: SequenceRecord) -> str:
        """sha256 over a sequence: its rows of all layers, tokens, positions, log-probabilities and its end.

        Two runs agree byte for byte when their digests do, wherever their shards put the sequence.
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
        """Statistics of a layer over all stored "generated" or "prompt" rows, merged from the shards'.

        The first token of a prompt is an attention sink that outweighs the others in the "prompt" group.
        """
        hidden = self.settings.hidden_size
        place = self.require_layer(layer)
        merged = LayerStatistics.empty(hidden)
        seen: set[str] = set()
        for record in self.sequences():
            if record.path in seen:
                continue
            seen.add(record.path)
            shard = self._shard(record)
            if f"statistics.{group}.mean" not in shard:
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
        """Whether each sequence solved its puzzle, by key, as far as `write_outcomes` was told."""
        try:
            return json.loads(self.files.read(OUTCOMES))
        except FileNotFoundError:
            return {}

    def _require_rows(self, record: SequenceRecord) -> None:
        if record.failed:
            raise StoreError(f"sequence {record.key} failed and has nothing stored: {record.failure}")

    def open_shard(self, path: str, size: int) -> Shard:
        """The shard at `SequenceRecord.path`, of `shard_bytes` bytes; the last few stay open."""
        with self._shards_lock:
            if path in self._shards:
                self._shards.move_to_end(path)
                return self._shards[path]
        where = f"{self.directory}/{path}"
        try:
            file = self.files.open_file(path)
        except OSError as error:
            raise StoreError(f"cannot read {where}: {error.strerror or error}") from error
        shard = Shard(file, size, where)
        with self._shards_lock:
            self._shards[path] = shard
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

    def _shard(self, record: SequenceRecord) -> Shard:
        return self.open_shard(record.path, record.shard_bytes)

    def _generated(self, record: SequenceRecord, name: str) -> np.ndarray:
        self._require_rows(record)
        stop = _end(record)
        return self._shard(record).column(name)[stop - record.generated_length : stop]


def ahead(items: Iterable[Item], distance: int) -> Iterator[Item]:
    """The items in order, each drawn `distance` items before it is yielded."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > distance:
            yield waiting.popleft()
    yield from waiting


def _known(shard: Shard, place: int) -> tuple[np.ndarray, ...]:
    """Tokens, positions, log-probabilities and norms of all rows of a shard."""
    return *(shard.column(name) for name in ("token_ids", "positions", "logprobs")), shard.column("norms")[
        place
    ]


def _columns(known: tuple[np.ndarray, ...], at: slice, prompt_length: int) -> RowColumns:
    """What is known of the rows `at` of a shard, which are those of one sequence."""
    token_ids, positions, logprobs, norms = known
    of_rows = positions[at]
    # Not the stored is_generated, which lies at the file's other end.
    return RowColumns(token_ids[at], of_rows, of_rows >= prompt_length, logprobs[at], norms[at])


def _end(record: SequenceRecord) -> int:
    return record.row_start + record.n_rows


def write_outcomes(directory: str | os.PathLike[str], outcomes: Mapping[str, bool]) -> None:
    """Record which sequences, by key, solved their puzzle; earlier outcomes of other keys are kept.

    Call it from one process. `ActivationStore.sequences(solved=...)` filters by it.
    """
    files = open_files(directory)
    merged = ActivationStore(directory).outcomes() | dict(outcomes)
    files.replace(OUTCOMES, json.dumps(merged, indent=0, sort_keys=True).encode())
