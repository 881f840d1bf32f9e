"""One batch as one safetensors file: its tensors, their layout, and where each sequence lies in them.

| tensor                                | dtype   | shape                                              |
|---------------------------------------|---------|----------------------------------------------------|
| `token_ids`                           | int32   | [rows] the token that was read                     |
| `positions`                           | int32   | [rows] its place in the sequence, prompt included  |
| `sequence_index`                      | int32   | [rows] which sequence of the shard                 |
| `logprobs`                            | float32 | [rows] of a generated token; NaN on prompt rows    |
| `prompt_token_ids`                    | int32   | the prompts of the batch end to end                |
| `norms`                               | float32 | [layers, rows] Euclidean norm of each row          |
| `statistics.{generated,prompt}.{..}`  | float32 | mean and variance [layers, hidden], norm [layers]  |
| `blocks.10.hook_resid_post`, ...      | settings.dtype | [rows, hidden]                              |
| `is_generated`                        | uint8   | [rows]                                             |

The statistics live in the shard, so one rename commits both. Without capture only `token_ids` to
`prompt_token_ids` and `is_generated` are there. The bytes depend on the sequences alone.

The layout is written here and not by the safetensors library, which stores wrong bytes for arrays that are
not contiguous, wants the whole file in memory and makes it mode 0600. The library reads these files.
"""

import functools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import ml_dtypes
import numpy as np

from activation_store.format import DTYPES, FinishedSequence, StoreError, StoreSettings
from activation_store.statistics import LayerStatistics, measure
from activation_store.store_files import FileView

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_HEAD_BYTES = 1 << 15  # holds the header and the first columns of a shard of a thousand rows
ALIGNMENT = (
    64  # of the first layer in the file: the kernel copies from and to odd addresses at half the speed
)
GROUPS = ("generated", "prompt")
_FORMAT = {"format": "activations-1"}
_TYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
}
_TYPES = {name: dtype for dtype, name in _TYPE_NAMES.items()}
_DECODER = json.JSONDecoder()


class TensorPlace(NamedTuple):
    """Where a tensor lies in its file, in bytes from the file's start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _naming_the_shard(
    method: Callable[Concatenate["Shard", Parameters], Result],
) -> Callable[Concatenate["Shard", Parameters], Result]:
    """The method, its errors turned into StoreErrors that say which shard they are about."""

    @functools.wraps(method)
    def wrapped(self: "Shard", *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"cannot read {self.where}: {error.strerror or error}") from error
        except ValueError as error:
            raise StoreError(f"{self.where} is not a whole shard: {error}") from error

    return wrapped


class Shard:
    """An open shard: its layers are views of the mapped file.

    Of an object, where nothing can be mapped, a layer is fetched whole, and the last one is kept. The file's
    first part, where header and small tensors are, is read at once when one of them is wanted. Opening only
    asks for it; nothing waits for it yet.
    """

    def __init__(self, file: FileView, size: int, where: str) -> None:
        self._file = file
        self._size = size
        self.where = where
        self._head = np.empty(0, np.uint8)
        self._header = ""
        self._base = 0  # where the tensors begin, once the header was read
        self._places: dict[str, TensorPlace] = {}
        self._columns: dict[str, np.ndarray] = {}
        self._layer: tuple[str, np.ndarray] | None = None
        file.prefetch(0, min(size, _HEAD_BYTES))

    @_naming_the_shard
    def names(self) -> list[str]:
        """The tensors' names, in file order."""
        header = json.loads(self._read_header())
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        return [name for name in header if name != "__metadata__"]

    @_naming_the_shard
    def check_layout(self) -> None:
        """StoreError unless the tensors fill the file from the header to the end without a gap."""
        end = 0
        for name in self.names():
            place = self.place(name)
            if place.start != (end or self._base):
                raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
            end = place.stop
        if end != self._size:
            raise ValueError(f"its tensors end at byte {end}, the file at {self._size}")

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    @_naming_the_shard
    def place(self, name: str) -> TensorPlace:
        """Where a tensor lies; StoreError when it is missing or not within the file."""
        if name not in self._places:
            # One entry is looked up in the text: parsing all of it would take longer than reading the rows.
            _, found, rest = self._read_header().partition(f'"{name}":')
            if not found:
                raise ValueError(f"it has no tensor {name!r}")
            try:
                entry, _ = _DECODER.raw_decode(rest)
                dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
                start, stop = entry["data_offsets"]
                start, stop = self._base + start, self._base + stop
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"the header's entry {name!r} is not that of a tensor") from error
            if (
                stop - start != math.prod(shape) * dtype.itemsize
                or not self._base <= start <= stop <= self._size
            ):
                raise ValueError(f"tensor {name!r} does not fill its place")
            self._places[name] = TensorPlace(dtype, shape, start, stop)
        return self._places[name]

    def column(self, name: str) -> np.ndarray:
        """Any tensor but a layer's."""
        if name not in self._columns:
            self._columns[name] = self._tensor(name, self._bytes)
        return self._columns[name]

    def layer(self, name: str) -> np.ndarray:
        """The rows [rows, hidden] under a hook name, as a read-only view."""
        if self._layer is None or self._layer[0] != name:
            self._layer = name, self._tensor(name, self._file.view)
        return self._layer[1]

    @_naming_the_shard
    def _tensor(self, name: str, read: Callable[[int, int], np.ndarray]) -> np.ndarray:
        dtype, shape, start, stop = self.place(name)
        return read(start, stop).view(dtype).reshape(shape)

    @_naming_the_shard
    def read_rows(self, name: str, runs: Iterable[tuple[int, int]], out: np.ndarray) -> None:
        """Read rows [first, end) of a layer, run after run, into `out`; quicker than a view, once."""
        start = self.place(name).start
        row_bytes = out.shape[1] * out.dtype.itemsize
        filled = 0
        for first, end in runs:
            self._file.read_into(start + first * row_bytes, out[filled : filled + end - first])
            filled += end - first

    @_naming_the_shard
    def prefetch(self, name: str, runs: Iterable[tuple[int, int]] | None = None) -> None:
        """Start reading a tensor from disk: rows [first, end) of each run, or all of it."""
        place = self.place(name)
        if place.stop <= _HEAD_BYTES:
            return
        row_bytes = (place.stop - place.start) // (place.shape[0] or 1)
        for first, end in [(0, place.shape[0])] if runs is None else runs:
            self._file.prefetch(place.start + first * row_bytes, place.start + end * row_bytes)

    def _read_header(self) -> str:
        if not self._base:
            self._head = np.empty(min(self._size, _HEAD_BYTES), np.uint8)
            self._file.read_into(0, self._head)
            length = int.from_bytes(self._head[:8].tobytes(), "little")
            if 8 + length > self._size:
                raise ValueError(f"its header does not fit {self._size} bytes")
            self._header, self._base = self._bytes(8, 8 + length).tobytes().decode(), 8 + length
        return self._header

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        return self._head[start:stop] if stop <= len(self._head) else self._file.view(start, stop)


class Placement(NamedTuple):
    """Where one sequence lies in a shard's tensors."""

    row_start: int
    n_rows: int
    prompt_start: int


@dataclass(frozen=True)
class PackedBatch:
    """A batch ready to be written; sequences with non-finite values are only in `failures`."""

    tensors: dict[str, np.ndarray]  # contiguous, in file order; {} when every sequence failed
    placements: dict[int, Placement]  # by position in the batch
    failures: dict[int, str]  # by position in the batch: what is wrong, where

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes, piece by piece."""
        yield memoryview(_encode_header(self.tensors))
        for tensor in self.tensors.values():
            # Row-major bytes of any strides; a view to bytes, as bfloat16 has no buffer protocol.
            yield np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def _encode_header(tensors: dict[str, np.ndarray]) -> bytes:
    header: dict[str, object] = {"__metadata__": _FORMAT}
    offset = first_layer = 0
    for name, tensor in tensors.items():
        if not first_layer and name.startswith("blocks."):
            first_layer = offset
        header[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + first_layer) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def pack_batch(settings: StoreSettings, batch: Sequence[FinishedSequence]) -> PackedBatch:
    """Lay a batch out row by row, measure it, and set apart the sequences that are not finite.

    Raises StoreError when a sequence does not have the shape or dtype that the settings promise.
    """
    for sequence in batch:
        _check(settings, sequence)
    kept = list(range(len(batch)))
    failures: dict[int, str] = {}
    while kept:
        layers, norms, statistics = _gather(settings, [batch[i] for i in kept])
        broken = _failures(settings, [batch[i] for i in kept], norms)
        if not broken:
            tensors, placements = _columns(settings, [batch[i] for i in kept])
            if settings.hook_names:
                tensors["norms"] = norms
                tensors |= statistics | layers
            tensors["is_generated"] = tensors.pop("is_generated")
            return PackedBatch(tensors, dict(zip(kept, placements, strict=True)), failures)
        failures |= {kept[i]: reason for i, reason in broken.items()}
        kept = [i for i in kept if i not in failures]
    return PackedBatch({}, {}, failures)


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


def _row_count(sequence: FinishedSequence) -> int:
    return len(sequence.token_ids) if sequence.rows is None else sequence.rows.shape[1]


def _is_generated(batch: Sequence[FinishedSequence]) -> np.ndarray:
    parts = []
    for sequence in batch:
        part = np.ones(_row_count(sequence), np.uint8)
        part[: len(part) - len(sequence.token_ids)] = 0
        parts.append(part)
    return np.concatenate(parts)


def _gather(
    settings: StoreSettings, batch: Sequence[FinishedSequence]
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """(rows per hook name, norms [layers, rows], statistics tensors) of the batch."""
    generated = _is_generated(batch).astype(bool)
    masks = {"generated": generated, "prompt": ~generated}
    masks = {group: mask for group, mask in masks.items() if mask.any()}
    norms = np.empty((len(settings.hook_names), len(generated)), np.float32)
    layers: dict[str, np.ndarray] = {}
    measured: dict[str, list[LayerStatistics]] = {group: [] for group in masks}
    for layer, hook in enumerate(settings.hook_names):
        layers[hook] = np.concatenate(
            [sequence.rows[layer] for sequence in batch if sequence.rows is not None]
        )
        for group, mask in masks.items():
            statistics, norms[layer, mask] = measure(layers[hook] if mask.all() else layers[hook][mask])
            measured[group].append(statistics)
    tensors = {}
    for group in masks if settings.hook_names else ():
        of_layers = measured[group]
        tensors[f"statistics.{group}.mean"] = np.stack([s.mean for s in of_layers]).astype(np.float32)
        tensors[f"statistics.{group}.variance"] = np.stack([s.variance for s in of_layers]).astype(np.float32)
        tensors[f"statistics.{group}.norm"] = np.array([s.mean_norm for s in of_layers], np.float32)
    return layers, norms, tensors


def _failures(
    settings: StoreSettings, batch: Sequence[FinishedSequence], norms: np.ndarray
) -> dict[int, str]:
    """The first non-finite value of each sequence that has one, by place in `batch`."""
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
        elif len(bad_tokens) and sequence.finish_reason != "imported":
            failures[place] = f"the log-probability is not finite at position {prompt_length + bad_tokens[0]}"
    return failures


def _columns(
    settings: StoreSettings, batch: Sequence[FinishedSequence]
) -> tuple[dict[str, np.ndarray], list[Placement]]:
    """The tensors beside the layers, and where each sequence lies in them."""
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
