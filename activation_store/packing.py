"""Laying out a batch of sequences as the bytes of one shard; `shard.py` says what a shard holds.

The rows are not gathered first: they are measured, and later written, straight from the array that each
sequence came with. The file is written here and not by the safetensors library, which stores wrong bytes for
arrays that are not contiguous, wants the whole file in memory and makes it mode 0600. The library reads these
files.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from activation_store.format import DTYPES, FinishedSequence, StoreError, StoreSettings
from activation_store.shard import ALIGNMENT, FORMAT, GROUPS, TYPE_NAMES
from activation_store.statistics import measure_pieces


class Tensor(NamedTuple):
    """A tensor of the file: its pieces lie end to end along the first axis."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: tuple[np.ndarray, ...]  # of any strides

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in the file."""
        return sum(piece.nbytes for piece in self.pieces)


class Placement(NamedTuple):
    """Where one sequence lies in a shard's tensors."""

    row_start: int
    n_rows: int
    prompt_start: int


@dataclass(frozen=True)
class PackedBatch:
    """A batch ready to be written; sequences with non-finite values are only in `failures`.

    It holds the sequences' own arrays, which must not change before they are written.
    """

    tensors: dict[str, Tensor]  # in file order; {} when every sequence failed
    placements: dict[int, Placement]  # by position in the batch
    failures: dict[int, str]  # by position in the batch: what is wrong, where

    def chunks(self) -> Iterator[memoryview]:
        """Yields the file's bytes, piece by piece; at most one piece is copied at a time."""
        yield memoryview(_encode_header(self.tensors))
        for tensor in self.tensors.values():
            for piece in tensor.pieces:
                # Row-major bytes of any strides; a view to bytes, as bfloat16 has no buffer protocol.
                yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data


def pack_batch(settings: StoreSettings, batch: Sequence[FinishedSequence]) -> PackedBatch:
    """Lays a batch out row by row, measures it, and sets apart the sequences that are not finite.

    The bytes follow from the settings and the sequences' values alone, not from where these lie in memory.

    Raises:
        StoreError: a sequence does not have the shape or dtype that the settings promise.
    """
    for sequence in batch:
        _check(settings, sequence)
    kept = list(range(len(batch)))
    failures: dict[int, str] = {}
    while kept:
        sequences = [batch[i] for i in kept]
        norms, statistics = _measure(settings, sequences)
        broken = _failures(settings, sequences, norms)
        if not broken:
            columns, placements = _columns(sequences)
            is_generated = columns.pop("is_generated")
            if settings.hook_names:
                columns |= {"norms": norms} | statistics
            tensors = {name: _whole(column) for name, column in columns.items()}
            tensors |= _layers(settings, sequences) | {"is_generated": _whole(is_generated)}
            return PackedBatch(tensors, dict(zip(kept, placements, strict=True)), failures)
        failures |= {kept[i]: reason for i, reason in broken.items()}
        kept = [i for i in kept if i not in failures]
    return PackedBatch({}, {}, failures)


def _encode_header(tensors: dict[str, Tensor]) -> bytes:
    """Returns the file's first bytes: the header's length, and the header as JSON.

    Spaces at its end put the first layer at a multiple of ALIGNMENT.
    """
    header: dict[str, object] = {"__metadata__": FORMAT}
    offset = first_layer = 0
    for name, tensor in tensors.items():
        if not first_layer and name.startswith("blocks."):
            first_layer = offset
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + first_layer) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _check(settings: StoreSettings, sequence: FinishedSequence) -> None:
    name = f"sequence {sequence.id.task_id}/{sequence.id.test_index}/{sequence.id.sample_index}"
    generated, prompt = len(sequence.token_ids), len(sequence.id.prompt_token_ids)
    if sequence.finish_reason not in ("stop", "length", "imported"):
        raise StoreError(f"{name}: finish_reason {sequence.finish_reason!r} is neither 'stop' nor 'length'")
    if not 1 <= generated <= settings.max_output_tokens:
        raise StoreError(f"{name}: {generated} generated tokens, expected 1 to {settings.max_output_tokens}")
    if sequence.logprobs.shape != (generated,):
        raise StoreError(f"{name}: {sequence.logprobs.shape} log-probabilities for {generated} tokens")
    if not settings.hook_names:
        if sequence.rows is not None:
            raise StoreError(f"{name} has activation rows, but the store captures no layers")
        return
    if sequence.rows is None:
        raise StoreError(
            f"{name} has no activation rows, but the store captures {len(settings.hook_names)} layers"
        )
    allowed = (generated, prompt + generated) if settings.capture_prompt else (generated,)
    layers, rows, hidden = sequence.rows.shape
    if hidden != settings.hidden_size:
        raise StoreError(f"{name}: rows are {hidden} wide, the model's hidden size is {settings.hidden_size}")
    if layers != len(settings.hook_names):
        raise StoreError(f"{name}: rows of {layers} layers, expected {len(settings.hook_names)}")
    if rows not in allowed:
        raise StoreError(f"{name}: {rows} rows for {prompt} prompt and {generated} generated tokens")
    if sequence.rows.dtype != DTYPES[settings.dtype]:
        raise StoreError(f"{name}: rows are {sequence.rows.dtype}, the store holds {settings.dtype}")


def _whole(array: np.ndarray) -> Tensor:
    return Tensor(array.dtype, array.shape, (array,))


def _layers(settings: StoreSettings, batch: Sequence[FinishedSequence]) -> dict[str, Tensor]:
    """Returns the rows [rows, hidden] of each hook name, one piece a sequence."""
    count = sum(map(_row_count, batch))
    return {
        hook: Tensor(
            DTYPES[settings.dtype],
            (count, settings.hidden_size),
            tuple(sequence.rows[layer] for sequence in batch if sequence.rows is not None),
        )
        for layer, hook in enumerate(settings.hook_names)
    }


def _row_count(sequence: FinishedSequence) -> int:
    return len(sequence.token_ids) if sequence.rows is None else sequence.rows.shape[1]


def _is_generated(batch: Sequence[FinishedSequence]) -> np.ndarray:
    """Returns 1 for each row of a generated token and 0 for each of a prompt token, uint8 [rows]."""
    parts = []
    for sequence in batch:
        part = np.ones(_row_count(sequence), np.uint8)
        part[: len(part) - len(sequence.token_ids)] = 0
        parts.append(part)
    return np.concatenate(parts)


def _measure(
    settings: StoreSettings, batch: Sequence[FinishedSequence]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the rows' norms, float32 [layers, rows], and the statistics tensors of each group by name."""
    generated = _is_generated(batch).astype(bool)
    norms = np.empty((len(settings.hook_names), len(generated)), np.float32)
    tensors: dict[str, np.ndarray] = {}
    for group, mask in zip(GROUPS, (generated, ~generated), strict=True):
        if not mask.any() or not settings.hook_names:
            continue
        of_layers = []
        for layer in range(len(settings.hook_names)):
            pieces = (_rows_of_group(sequence, layer, group) for sequence in batch)
            statistics, norms[layer, mask] = measure_pieces(pieces, settings.hidden_size)
            of_layers.append(statistics)
        tensors[f"statistics.{group}.mean"] = np.stack([s.mean for s in of_layers]).astype(np.float32)
        tensors[f"statistics.{group}.variance"] = np.stack([s.variance for s in of_layers]).astype(np.float32)
        tensors[f"statistics.{group}.norm"] = np.array([s.mean_norm for s in of_layers], np.float32)
    return norms, tensors


def _rows_of_group(sequence: FinishedSequence, layer: int, group: str) -> np.ndarray:
    """Returns the rows [n, hidden] of a layer that belong to "generated" or to "prompt" tokens."""
    assert sequence.rows is not None  # as `_check` has seen
    of_layer = sequence.rows[layer]
    prompt_rows = len(of_layer) - len(sequence.token_ids)
    return of_layer[prompt_rows:] if group == "generated" else of_layer[:prompt_rows]


def _failures(
    settings: StoreSettings, batch: Sequence[FinishedSequence], norms: np.ndarray
) -> dict[int, str]:
    """Returns where the first non-finite value of each sequence that has one is, by position in `batch`.

    Of imported rows also where the first is that is all zero.
    """
    failures = {}
    end = 0
    for place, sequence in enumerate(batch):
        start, end = end, end + _row_count(sequence)
        prompt_length = len(sequence.id.prompt_token_ids)
        first_position = prompt_length + len(sequence.token_ids) - (end - start)
        bad_rows = np.argwhere(~np.isfinite(norms[:, start:end].T))
        bad_tokens = np.flatnonzero(~np.isfinite(sequence.logprobs))
        if len(bad_rows):
            row, layer = bad_rows[0]
            failures[place] = f"{settings.hook_names[layer]} is not finite at position {first_position + row}"
        elif sequence.finish_reason == "imported":  # a model's rows are never all zero, unlike old files'
            if len(zero_rows := np.argwhere(norms[:, start:end].T == 0)):
                row, layer = zero_rows[0]
                hook = settings.hook_names[layer]
                failures[place] = f"{hook} is all zero at position {first_position + row}"
        elif len(bad_tokens):
            failures[place] = f"the log-probability is not finite at position {prompt_length + bad_tokens[0]}"
    return failures


def _columns(batch: Sequence[FinishedSequence]) -> tuple[dict[str, np.ndarray], list[Placement]]:
    """Returns the tensors that say what each row is, and where each sequence lies in them."""
    token_ids, positions, logprobs, placements = [], [], [], []
    row_start = prompt_start = 0
    for sequence in batch:
        prompt = np.asarray(sequence.id.prompt_token_ids, np.int32)
        n_rows, generated = _row_count(sequence), len(sequence.token_ids)
        prompt_rows = n_rows - generated
        token_ids += [prompt[:prompt_rows], np.asarray(sequence.token_ids, np.int32)]
        positions.append(np.arange(len(prompt) - prompt_rows, len(prompt) + generated, dtype=np.int32))
        logprobs += [np.full(prompt_rows, np.nan, np.float32), np.asarray(sequence.logprobs, np.float32)]
        placements.append(Placement(row_start, n_rows, prompt_start))
        row_start += n_rows
        prompt_start += len(prompt)
    counts = [placement.n_rows for placement in placements]
    tensors = {
        "token_ids": np.concatenate(token_ids),
        "positions": np.concatenate(positions),
        "sequence_index": np.repeat(np.arange(len(batch), dtype=np.int32), counts),
        "logprobs": np.concatenate(logprobs),
        "prompt_token_ids": np.concatenate(
            [np.asarray(sequence.id.prompt_token_ids, np.int32) for sequence in batch]
        ),
        "is_generated": _is_generated(batch),
    }
    return tensors, placements
