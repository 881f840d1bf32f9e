"""Laying out a batch of sequences as the bytes of one shard; `shard.py` says what a shard holds.

The rows are not gathered first: they are measured, and later written, straight from the array that each
sequence came with. The file is written here and not by the safetensors library, which stores wrong bytes for
arrays that are not contiguous, wants the whole file in memory and makes it mode 0600. The library reads these
files.
"""

import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from activation_store.format import DTYPES, FinishedSequence, StoreError, StoreSettings
from activation_store.shard import ALIGNMENT, FORMAT, GROUPS, TYPE_NAMES, moments_shape
from activation_store.statistics import measure_pieces
from qwen2_core.hook_points import RESID_POST


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
    first_hook: str = ""  # the first tensor of rows

    def chunks(self) -> Iterator[memoryview]:
        """Yields the file's bytes, piece by piece; at most one piece is copied at a time."""
        yield memoryview(_encode_header(self.tensors, self.first_hook))
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
            tensors |= _hooks(settings, sequences) | {"is_generated": _whole(is_generated)}
            return PackedBatch(
                tensors,
                dict(zip(kept, placements, strict=True)),
                failures,
                next(iter(settings.hook_names), ""),
            )
        failures |= {kept[i]: reason for i, reason in broken.items()}
        kept = [i for i in kept if i not in failures]
    return PackedBatch({}, {}, failures)


def _encode_header(tensors: dict[str, Tensor], aligned: str) -> bytes:
    """Returns the file's first bytes: the header's length, and the header as JSON.

    Spaces at its end put the tensor `aligned` at a multiple of ALIGNMENT.
    """
    header: dict[str, object] = {"__metadata__": FORMAT}
    offset = aligned_offset = 0
    for name, tensor in tensors.items():
        if name == aligned:
            aligned_offset = offset
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + aligned_offset) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _check(settings: StoreSettings, sequence: FinishedSequence) -> None:
    name = f"sequence {sequence.id.task_id}/{sequence.id.test_index}/{sequence.id.sample_index}"
    generated = len(sequence.token_ids)
    if sequence.finish_reason not in ("stop", "length", "imported"):
        raise StoreError(f"{name}: finish_reason {sequence.finish_reason!r} is neither 'stop' nor 'length'")
    if not settings.least_tokens <= generated <= settings.max_output_tokens:
        expected = f"{settings.least_tokens} to {settings.max_output_tokens}"
        raise StoreError(f"{name}: {generated} generated tokens, expected {expected}")
    if sequence.logprobs.shape != (generated,):
        raise StoreError(f"{name}: {sequence.logprobs.shape} log-probabilities for {generated} tokens")
    if sequence.id.strengths and not settings.interventions:
        raise StoreError(f"{name} has strengths of interventions, but the store has no interventions")
    if not settings.hook_names and (sequence.rows is not None or sequence.points):
        raise StoreError(f"{name} has activation rows, but the store captures no layers")
    by_point = settings.hooks_by_point
    for point in dict.fromkeys((RESID_POST, *by_point, *sequence.points)):
        problem = _problem(settings, sequence, point, len(by_point.get(point, ())))
        if problem:
            raise StoreError(f"{name}{'' if point == RESID_POST else f', {point}'}: {problem}")
    counts = {point: found.shape[1] for point in by_point if (found := sequence.rows_of(point)) is not None}
    if len(set(counts.values())) > 1:
        raise StoreError(f"{name}: its points have different numbers of rows: {counts}")


def _problem(settings: StoreSettings, sequence: FinishedSequence, point: str, layers: int) -> str:
    """Returns what is wrong with the rows of a point that is stored of so many layers; "" for nothing."""
    rows = sequence.points.get(point) if point != RESID_POST else sequence.rows
    if point == RESID_POST and point in sequence.points:
        return "these are `rows`, not one of `points`"
    if rows is None:
        return f"no activation rows, but the store captures {layers} layers" if layers else ""
    if not layers:
        return "rows of a point that the store does not capture"
    generated, prompt = len(sequence.token_ids), len(sequence.id.prompt_token_ids)
    allowed = (generated, prompt + generated) if settings.capture_prompt else (generated,)
    if rows.ndim != 3:
        return f"rows of shape {list(rows.shape)}, not [layers, rows, width]"
    width = settings.widths.get(point, settings.hidden_size)
    if rows.shape[2] != width:
        promised = "the model's hidden size is" if point == RESID_POST else "the store's are"
        return f"rows are {rows.shape[2]} wide, {promised} {width}"
    if rows.shape[0] != layers:
        return f"rows of {rows.shape[0]} layers, expected {layers}"
    if rows.shape[1] not in allowed or not rows.shape[1]:
        return f"{rows.shape[1]} rows for {prompt} prompt and {generated} generated tokens"
    if rows.dtype != DTYPES[settings.dtype]:
        return f"rows are {rows.dtype}, the store holds {settings.dtype}"
    return ""


def _whole(array: np.ndarray) -> Tensor:
    return Tensor(array.dtype, array.shape, (array,))


def _hooks(settings: StoreSettings, batch: Sequence[FinishedSequence]) -> dict[str, Tensor]:
    """Returns the rows [rows, width] of each hook, one piece a sequence."""
    count, dtype = sum(map(_row_count, batch)), DTYPES[settings.dtype]
    pieces = _pieces(settings, batch)
    return {
        hook: Tensor(dtype, (count, settings.hook_widths[hook]), tuple(pieces[hook]))
        for hook in settings.hook_names
    }


def _pieces(settings: StoreSettings, batch: Sequence[FinishedSequence]) -> dict[str, list[np.ndarray]]:
    """Returns of each hook, in the settings' order, the rows [n, width] of each sequence, as views."""
    found: dict[str, list[np.ndarray]] = {hook: [] for hook in settings.hook_names}
    for point, hooks in settings.hooks_by_point.items():
        for sequence in batch:
            rows = sequence.rows_of(point)
            assert rows is not None  # as `_check` has seen
            for layer, hook in enumerate(hooks):
                found[hook].append(rows[layer])
    return found


def _row_count(sequence: FinishedSequence) -> int:
    rows = next((one for one in (sequence.rows, *sequence.points.values()) if one is not None), None)
    return len(sequence.token_ids) if rows is None else rows.shape[1]


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
    """Returns the rows' norms, float32 [hooks, rows], and the statistics tensors of each group by name."""
    generated = _is_generated(batch).astype(bool)
    pieces = _pieces(settings, batch)
    norms = np.empty((len(pieces), len(generated)), np.float32)
    tensors: dict[str, np.ndarray] = {}
    for group, mask in zip(GROUPS, (generated, ~generated), strict=True):
        if not mask.any() or not pieces:
            continue
        of_hooks = []
        for place, (hook, of_hook) in enumerate(pieces.items()):
            of_group = map(_rows_of_group, batch, of_hook, itertools.repeat(group))
            statistics, norms[place, mask] = measure_pieces(of_group, settings.hook_widths[hook])
            of_hooks.append(statistics)
        shape = moments_shape(settings)
        for name, moments in (
            ("mean", [s.mean for s in of_hooks]),
            ("variance", [s.variance for s in of_hooks]),
        ):
            of_all = np.concatenate(moments).astype(np.float32).reshape(shape)
            tensors[f"statistics.{group}.{name}"] = of_all
        tensors[f"statistics.{group}.norm"] = np.array([s.mean_norm for s in of_hooks], np.float32)
    return norms, tensors


def _rows_of_group(sequence: FinishedSequence, rows: np.ndarray, group: str) -> np.ndarray:
    """Returns those of a sequence's rows [n, width] that belong to "generated" or to "prompt" tokens."""
    prompt_rows = len(rows) - len(sequence.token_ids)
    return rows[prompt_rows:] if group == "generated" else rows[:prompt_rows]


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
