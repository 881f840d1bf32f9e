"""Reading a store: the rows of its sequences, of one layer or several, with their tokens and text."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, overload

import numpy as np
from jaxtyping import Float, Float32, Int32

from activation_store.catalogue import SequenceCatalogue
from activation_store.format import SequenceRecord, StoreError, StoreUsageError
from activation_store.hook_labels import hook_label
from activation_store.open_shards import SHARDS_AHEAD, ahead
from activation_store.rows import (
    STORED,
    Label,
    LayerChoice,
    Layers,
    OneLayer,
    RowColumns,
    RowFilter,
    check_row_dtype,
    choose_layers,
    in_dtype,
    part,
    row_filter,
)
from activation_store.shard import GROUPS, Shard
from activation_store.statistics import LayerStatistics, measure_pieces
from activation_store.tables import token_table

_DIGESTED = ("token_ids", "positions", "logprobs", "is_generated")
_COLUMNS = ("token_ids", "positions", "logprobs")
Rows = Float[np.ndarray, "n_rows hidden"]


class ActivationStore(SequenceCatalogue):
    """A store opened for reading, while it may still be written to; `directory` is a path or an fsspec URL.

    It is a sequence of the records of all sequences, failed ones included, in stored order: `len(store)`,
    `store[0]`, `store["0f3c..."]` by key, `for record in store`, `record in store`.

    >>> store = ActivationStore("activations")
    >>> for record in store.sequences(task_ids={"007bbfb7"}):
    ...     rows = store.rows(record, layer=12)  # float32 [record.n_rows, hidden]
    ...     text = store.answer(record, tokenizer)
    """

    def choose_layers(self, layer: Layers | None) -> LayerChoice:
        """Returns the choice of one layer, of several, or with None of all stored; StoreError for others."""
        hooks = self.settings.hook_names
        if layer is None:
            return LayerChoice(tuple(map(hook_label, hooks)), tuple(range(len(hooks))), alone=False)
        return choose_layers(layer, hooks, self.files.location)

    def require_layer(self, layer: OneLayer) -> int:
        """Returns a layer's index among the stored ones; raises StoreError when it is not stored."""
        choice = self.choose_layers(layer)
        if not choice.alone:
            raise StoreError(f"one layer is wanted here, not {layer!r}")
        return choice.places[0]

    @overload
    def rows(self, record: SequenceRecord, layer: OneLayer, *, dtype: str = "float32") -> Rows: ...

    @overload
    def rows(
        self, record: SequenceRecord, layer: Iterable[OneLayer], *, dtype: str = "float32"
    ) -> dict[Label, Rows]: ...

    def rows(
        self, record: SequenceRecord, layer: Layers, *, dtype: str = "float32"
    ) -> Rows | dict[Label, Rows]:
        """Returns the output of decoder block `layer`, or the rows of any hook, for a sequence.

        They are [n_rows, hidden], or as wide as the hook's point. Row r was computed from the token that
        `columns` names for it.

        Args:
            record: a sequence of this store.
            layer: its number or hook name; several of them give `{layer: rows}`, aligned row by row, where
                a block's output is labelled with its number and any other hook with its name.
            dtype: "float32", a copy of your own, or "stored", the bytes as they lie: in a local store a
                read-only view into the file's memory map, of which nothing is read before it is used. Do
                not compute with bfloat16 in numpy, whose sums are wrong.

        Raises:
            StoreError: the layer is not stored, the record is of another store, or the sequence failed.
        """
        choice = choose_layers(layer, self.settings.hook_names, self.files.location)
        check_row_dtype(dtype)
        shard, start, stop = self._place(record)
        return choice.label(
            [in_dtype(part(shard.layer(hook), start, stop, shard.where), dtype) for hook in choice.hooks]
        )

    def columns(self, record: SequenceRecord, layer: Layers | None = None) -> RowColumns:
        """Returns token, position and so on of each row that `rows` returns.

        `norms` are those of the layer named; without one, or with several, they are `{layer: norms}`.
        """
        choice = self.choose_layers(layer)
        shard, start, stop = self._place(record)
        return _columns(_known(shard, choice), slice(start, stop), record.prompt_length, choice).copied()

    @overload
    def iterate(
        self,
        layer: OneLayer,
        *,
        sequences: Iterable[SequenceRecord] | None = None,
        rows: RowFilter | None = None,
        dtype: str = "float32",
    ) -> Iterator[tuple[np.ndarray, RowColumns, SequenceRecord]]: ...

    @overload
    def iterate(
        self,
        layer: Iterable[OneLayer],
        *,
        sequences: Iterable[SequenceRecord] | None = None,
        rows: RowFilter | None = None,
        dtype: str = "float32",
    ) -> Iterator[tuple[dict[Label, np.ndarray], RowColumns, SequenceRecord]]: ...

    def iterate(
        self,
        layer: Layers,
        *,
        sequences: Iterable[SequenceRecord] | None = None,
        rows: RowFilter | None = None,
        dtype: str = "float32",
    ) -> Iterator[tuple[Any, RowColumns, SequenceRecord]]:
        """Yields (rows, columns, record) of each sequence in order; sequences without any row are left out.

        `layer` and `dtype` are those of `ActivationStore.rows`. With dtype="stored" rows and columns are
        views; only filtering by norm copies.
        """
        choice = choose_layers(layer, self.settings.hook_names, self.files.location)
        check_row_dtype(dtype)
        return self._iterate(choice, choice.hooks, sequences, row_filter(rows), dtype)

    def to_dataframe(
        self,
        layer: Layers | None = None,
        *,
        sequences: Iterable[SequenceRecord] | None = None,
        rows: RowFilter | None = None,
    ) -> Any:
        """Returns a pandas DataFrame with one line for each row, in the order of `iterate`, without the rows.

        Its columns: task_id, test_index, sample_index, augmentation and key of the sequence, position,
        token_id, is_generated, logprob, and `norm_12` for each layer named, by default for all stored ones;
        `norm_blocks.12.attn.hook_z` for another hook.
        `pandas.DataFrame(store)` has one line for each sequence.

        Raises:
            StoreError: pandas is not installed.
        """
        choice = self.choose_layers(layer)
        found = self._iterate(choice, [], sequences, row_filter(rows), STORED)
        return token_table(((columns, record) for _, columns, record in found), choice)

    def _iterate(
        self,
        choice: LayerChoice,
        hooks: list[str],
        sequences: Iterable[SequenceRecord] | None,
        chosen: RowFilter,
        dtype: str,
    ) -> Iterator[tuple[Any, RowColumns, SequenceRecord]]:
        """Yields as `iterate`; the rows are those of `hooks`, the norms those of `choice`."""
        records = map(self.own, self.sequences() if sequences is None else sequences)
        for shard, of_shard in self._shards_ahead(hooks, records):
            layers, known = [shard.layer(hook) for hook in hooks], _known(shard, choice)
            for record in of_shard:
                shard.require(record)
                start, stop = (record.row_start + row for row in chosen.row_range(record))
                data = [part(of_layer, start, stop, shard.where) for of_layer in layers]
                columns = _columns(known, slice(start, stop), record.prompt_length, choice)
                if chosen.max_norm is not None and not (keep := choice.within(columns, chosen)).all():
                    data, columns = [of_layer[keep] for of_layer in data], columns.take(keep)
                if len(columns.positions):
                    data = [in_dtype(of_layer, dtype) for of_layer in data]
                    if dtype != STORED:
                        columns = columns.copied()
                    yield choice.label(data) if data else None, columns, record

    def _shards_ahead(
        self, hooks: list[str], sequences: Iterable[SequenceRecord]
    ) -> Iterator[tuple[Shard, list[SequenceRecord]]]:
        """Yields the sequences by shard, while the rows of the next few are read from disk."""

        def opened(group: tuple[Any, Iterator[SequenceRecord]]) -> tuple[Shard, list[SequenceRecord]]:
            records = list(group[1])
            return self.open_shard(records[0].path, records[0].shard_bytes), records  # waits for nothing

        def prefetched(of_shard: tuple[Shard, list[SequenceRecord]]) -> tuple[Shard, list[SequenceRecord]]:
            shard, records = of_shard
            for name in (*_COLUMNS, "norms") if self.settings.hook_names else _COLUMNS:
                shard.prefetch(name)
            for hook in hooks:
                shard.prefetch(hook, [(min(r.row_start for r in records), max(_end(r) for r in records))])
            return of_shard

        kept = (record for record in sequences if not record.failed)
        groups = itertools.groupby(kept, key=lambda record: (record.host, record.shard))
        return ahead(map(prefetched, ahead(map(opened, groups), SHARDS_AHEAD)), SHARDS_AHEAD)

    def answer(self, record: SequenceRecord, tokenizer: Any) -> str:
        """Returns the text that a sequence generated, without special tokens.

        Args:
            record: a sequence of this store.
            tokenizer: the model's, such as `transformers.AutoTokenizer.from_pretrained(...)`.

        Raises:
            StoreError: the sequence failed, or it was imported without its tokens.
        """
        tokens = self.generated_tokens(record).tolist()
        if record.finish_reason == "imported":
            raise StoreError(f"{record.label} was imported without its tokens, so it has no text")
        if not callable(getattr(tokenizer, "decode", None)):
            raise StoreError(f"{tokenizer!r} is no tokenizer; AutoTokenizer.from_pretrained(...) makes one")
        return tokenizer.decode(tokens, skip_special_tokens=True)

    def tokens(self, record: SequenceRecord) -> Int32[np.ndarray, " tokens"]:
        """Returns all tokens of a sequence, those of the prompt and then the generated ones."""
        return np.concatenate([self.prompt_token_ids(record), self.generated_tokens(record)])

    def prompt_token_ids(self, record: SequenceRecord) -> Int32[np.ndarray, " prompt_length"]:
        """Returns the prompt, which is kept whether or not its rows are."""
        shard, *_ = self._place(record)
        start = record.prompt_start
        found = shard.column("prompt_token_ids")
        return part(found, start, start + record.prompt_length, shard.where).copy()

    def generated_tokens(self, record: SequenceRecord) -> Int32[np.ndarray, " generated_length"]:
        """Returns the generated tokens, EOS included; -1 where rows were imported without their tokens."""
        return self._generated(record, "token_ids")

    def generated_logprobs(self, record: SequenceRecord) -> Float32[np.ndarray, " generated_length"]:
        """Returns the log-probability of each generated token, in nats."""
        return self._generated(record, "logprobs")

    def sequence_digest(self, record: SequenceRecord) -> str:
        """Returns the sha256 of a sequence: its rows of all layers, tokens, positions and log-probabilities.

        Its key and its end count too. Two runs agree byte for byte when their digests do, wherever their
        shards put the sequence.
        """
        self.own(record)
        digest = hashlib.sha256(f"{record.key} {record.finish_reason} {record.failure}".encode())
        if record.n_rows:
            rows = slice(record.row_start, _end(record))
            shard = self._shard(record)
            columns = [shard.column(name)[rows] for name in _DIGESTED]
            layers = (shard.layer(name)[rows] for name in self.settings.hook_names)
            for tensor in itertools.chain(columns, [self.prompt_token_ids(record)], layers):
                digest.update(tensor.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def statistics(self, layer: OneLayer, group: str = "generated") -> LayerStatistics:
        """Returns statistics of a layer over all stored "generated" or "prompt" rows.

        The first token of a prompt is an attention sink that outweighs the others in the "prompt" group.

        Raises:
            StoreUsageError: the layer is not stored, or there are no such rows.
        """
        if group not in GROUPS:
            raise StoreError(f"there are statistics of {' and '.join(GROUPS)} rows, not of {group!r}")
        place = self.require_layer(layer)
        hook = self.settings.hook_names[place]
        merged = LayerStatistics.empty(self.settings.hook_widths[hook])
        by_shard: dict[str, list[SequenceRecord]] = {}
        for record in self.sequences():
            by_shard.setdefault(record.path, []).append(record)
        for records in by_shard.values():
            shard = self._shard(records[0])
            if f"statistics.{group}.mean" not in shard:
                continue
            if len(records) != shard.sequences:  # some were dropped; the stored figures are of all
                merged = merged.merge(_measured(shard, hook, group, records))
                continue
            generated = int(np.count_nonzero(shard.column("is_generated")))
            count = generated if group == "generated" else shard.place("is_generated").shape[0] - generated
            mean, variance, norm = shard.statistics(group, place)
            squared = variance.astype(np.float64) * count
            merged = merged.merge(LayerStatistics(count, mean.astype(np.float64), squared, norm * count))
        if not merged.count:
            raise StoreUsageError(f"{self.files.location} has no {group} rows to take statistics of")
        return merged

    def _place(self, record: SequenceRecord) -> tuple[Shard, int, int]:
        """Returns the shard of a sequence, and its rows [start, stop) there."""
        self.own(record)
        if record.failed:
            raise StoreError(
                f"sequence {record.key} failed and has nothing stored: {record.failure}; store.sequences() "
                "leaves such ones out"
            )
        return self._shard(record), record.row_start, _end(record)

    def _shard(self, record: SequenceRecord) -> Shard:
        shard = self.open_shard(record.path, record.shard_bytes)
        shard.require(record)
        return shard

    def _generated(self, record: SequenceRecord, name: str) -> np.ndarray:
        shard, _, stop = self._place(record)
        return part(shard.column(name), stop - record.generated_length, stop, shard.where).copy()


def _measured(shard: Shard, hook: str, group: str, records: Iterable[SequenceRecord]) -> LayerStatistics:
    """Measures the "generated" or "prompt" rows of some of a shard's sequences."""
    rows = shard.layer(hook)
    pieces = []
    for record in records:
        of_record = rows[record.row_start : _end(record)]
        prompt, generated = of_record[: record.prompt_rows], of_record[record.prompt_rows :]
        pieces.append(generated if group == "generated" else prompt)
    return measure_pieces(pieces, rows.shape[1])[0]


def _known(shard: Shard, choice: LayerChoice) -> tuple[np.ndarray, ...]:
    """Returns tokens, positions, log-probabilities and the chosen layers' norms of all rows of a shard."""
    norms = shard.column("norms") if choice.places else ()
    return *(shard.column(name) for name in _COLUMNS), *(norms[place] for place in choice.places)


def _columns(known: tuple[np.ndarray, ...], at: slice, prompt_length: int, choice: LayerChoice) -> RowColumns:
    """Returns the columns of the rows `at` of a shard, which are those of one sequence."""
    token_ids, positions, logprobs, *norms = (column[at] for column in known)
    # Not the stored is_generated, which lies at the file's other end.
    return RowColumns(token_ids, positions, positions >= prompt_length, logprobs, choice.label(norms))


def _end(record: SequenceRecord) -> int:
    return record.row_start + record.n_rows
