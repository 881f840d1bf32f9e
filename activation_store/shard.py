"""A shard: the rows of one batch as one safetensors file. What it holds, and reading it.

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
`prompt_token_ids` and `is_generated` are there. `packing.py` writes shards.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Concatenate, NamedTuple, ParamSpec, TypeVar

import ml_dtypes
import msgspec
import numpy as np

from activation_store import schema
from activation_store.format import DTYPES, SequenceRecord, StoreError, StoreSettings
from activation_store.schema import Count
from activation_store.store_files import FileView

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_HEAD_BYTES = 1 << 15  # holds the header and the first columns of a shard of a thousand rows
_HEADER_BYTES = 1 << 20  # no header is longer
# Bytes, of the first layer in the file: the kernel copies from and to odd addresses at half the speed.
ALIGNMENT = 64
GROUPS = ("generated", "prompt")
FORMAT = {"format": "activations-1"}
TYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
}
_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
_SIZES = {name: dtype.itemsize for name, dtype in _TYPES.items()}


class _Entry(msgspec.Struct):
    """The form of a header's entry for one tensor; `__metadata__`, which has none of these fields, passes."""

    dtype: str = ""
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=2)] = ()
    data_offsets: tuple[Count, Count] = (0, 0)


_HEADER = msgspec.json.Decoder(dict[str, _Entry])


class TensorPlace(NamedTuple):
    """Where a tensor lies in its file, in bytes from the file's start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _naming_the_shard(
    method: Callable[Concatenate["Shard", Parameters], Result],
) -> Callable[Concatenate["Shard", Parameters], Result]:
    """Wraps a method so that its errors become StoreErrors that name the shard."""

    @functools.wraps(method)
    def wrapped(self: "Shard", *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"cannot read {self.where}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{self.where} is not a whole shard: {schema.reason(error)}") from error

    return wrapped


class Shard:
    """An open shard: its layers are views of the mapped file.

    In an object store, where nothing can be mapped, a layer is fetched whole, and the last one is kept. The
    file's first part, which has the header and the small tensors, is read in one go when one of them is
    wanted; opening only asks the system for it and does not wait. Every method raises StoreError where the
    file cannot be read or is damaged.

    Args:
        file: its bytes.
        size: how many they are.
        where: its name for messages.
        settings: those of its store, which decide what tensors there are.
    """

    def __init__(self, file: FileView, size: int, where: str, settings: StoreSettings) -> None:
        if file.size not in (None, size):
            raise StoreError(f"{where} has {file.size} bytes, {size} were written")
        self._file = file
        self._size = size
        self.where = where
        self._settings = settings
        self._head = np.empty(0, np.uint8)
        self._all_places: dict[str, TensorPlace] = {}  # once the header was read
        self._columns: dict[str, np.ndarray] = {}
        self._layer: tuple[str, np.ndarray] | None = None
        file.prefetch(0, min(size, _HEAD_BYTES))

    @_naming_the_shard
    def places(self) -> Mapping[str, TensorPlace]:
        """Returns where each tensor lies, in file order.

        They fill the file without a gap, and are those that the settings promise.
        """
        if not self._all_places:
            self._head = np.empty(min(self._size, _HEAD_BYTES), np.uint8)
            self._file.read_into(0, self._head)
            length = int.from_bytes(self._head[:8].tobytes(), "little")
            if length > min(self._size - 8, _HEADER_BYTES):
                raise ValueError(f"its header does not fit {self._size} bytes")
            places = _read_header(self._bytes(8, 8 + length).tobytes(), 8 + length)
            end = max((place.stop for place in places.values()), default=8 + length)
            if end != self._size:
                raise ValueError(f"its tensors end at byte {end}, the file at {self._size}")
            for problem in _problems(places, self._settings):
                raise ValueError(problem)
            self._all_places = places
        return self._all_places

    def __contains__(self, name: str) -> bool:
        return name in self.places()

    def place(self, name: str) -> TensorPlace:
        """Returns where a tensor lies; StoreError when it is missing."""
        places = self.places()
        if name not in places:
            raise StoreError(f"{self.where} is not a whole shard: it has no tensor {name!r}")
        return places[name]

    def require(self, record: SequenceRecord) -> None:
        """Raises StoreError unless the rows and the prompt of an index line lie within the shard."""
        rows, prompts = self.place("token_ids").shape[0], self.place("prompt_token_ids").shape[0]
        if record.row_start + record.n_rows > rows or record.prompt_start + record.prompt_length > prompts:
            raise StoreError(f"{record.label}: its rows or prompt tokens end outside {self.where}")

    def column(self, name: str) -> np.ndarray:
        """Returns any tensor but a layer's, read-only."""
        if name not in self._columns:
            self._columns[name] = self._tensor(name, self._bytes)
        return self._columns[name]

    def layer(self, name: str) -> np.ndarray:
        """Returns the rows [rows, hidden] under a hook name in their stored dtype, as a read-only view."""
        if self._layer is None or self._layer[0] != name:
            self._layer = name, self._tensor(name, self._file.view)
        return self._layer[1]

    @_naming_the_shard
    def _tensor(self, name: str, read: Callable[[int, int], np.ndarray]) -> np.ndarray:
        dtype, shape, start, stop = self.place(name)
        return read(start, stop).view(dtype).reshape(shape)

    @_naming_the_shard
    def read_rows(self, name: str, runs: Iterable[tuple[int, int]], out: np.ndarray) -> None:
        """Reads rows [first, end) of a layer, run after run, into `out` [rows, hidden] of the stored dtype.

        Quicker than a view for rows that are read once.
        """
        place = self.place(name)
        start, row_bytes = place.start, out.shape[1] * out.dtype.itemsize
        filled = 0
        for first, end in runs:
            if end > place.shape[0]:
                raise ValueError(f"it has {place.shape[0]} rows, row {end - 1} is wanted")
            self._file.read_into(start + first * row_bytes, out[filled : filled + end - first])
            filled += end - first

    @_naming_the_shard
    def prefetch(self, name: str, runs: Iterable[tuple[int, int]] | None = None) -> None:
        """Starts reading a tensor from disk: rows [first, end) of each run, or all of it."""
        place = self.place(name)
        if place.stop <= _HEAD_BYTES:
            return
        row_bytes = (place.stop - place.start) // (place.shape[0] or 1)
        for first, end in [(0, place.shape[0])] if runs is None else runs:
            self._file.prefetch(place.start + first * row_bytes, place.start + end * row_bytes)

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        return self._head[start:stop] if stop <= len(self._head) else self._file.view(start, stop)


def _read_header(text: bytes, base: int) -> dict[str, TensorPlace]:
    """Returns the places of a header whose tensors follow each other from byte `base` on."""
    places = {}
    offset = 0
    entries = _HEADER.decode(text)
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if entry.dtype not in _TYPES:
            raise ValueError(f"the header's entry {name!r} is not that of a tensor")
        start, stop = entry.data_offsets
        if start != offset:
            raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
        if stop - start != math.prod(entry.shape, start=_SIZES[entry.dtype]):
            raise ValueError(f"tensor {name!r} does not fill its place")
        places[name] = TensorPlace(_TYPES[entry.dtype], entry.shape, base + start, base + stop)
        offset = stop
    return places


def _problems(places: Mapping[str, TensorPlace], settings: StoreSettings) -> Iterator[str]:
    """Yields tensors that are missing, too many, or not of the shape and dtype that the settings promise."""
    expected = _expected(places, settings)
    for name, (dtype, shape) in expected.items():
        place = places.get(name)
        if place is None:
            yield f"tensor {name} is missing"
        elif place.shape != shape or place.dtype is not dtype:
            yield f"tensor {name} is {place.dtype.name} {place.shape}, expected {dtype.name} {shape}"
    for name in places.keys() - expected.keys():
        yield f"tensor {name!r} does not belong there"


def _expected(
    places: Mapping[str, TensorPlace], settings: StoreSettings
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Returns dtype and shape of each tensor of a shard that has as many rows and prompt tokens."""
    rows, prompts = (
        places[name].shape[:1] if name in places else (0,) for name in ("token_ids", "prompt_token_ids")
    )
    layers, hidden = len(settings.hook_names), settings.hidden_size
    int32, float32 = np.dtype(np.int32), np.dtype(np.float32)
    expected = dict.fromkeys(("token_ids", "positions", "sequence_index"), (int32, rows))
    expected |= {"logprobs": (float32, rows), "prompt_token_ids": (int32, prompts)}
    if layers:
        expected["norms"] = float32, (layers, *rows)
        for group in GROUPS:
            names = [f"statistics.{group}.{name}" for name in ("mean", "variance", "norm")]
            if any(name in places for name in names):  # there are none where a group has no rows
                shapes = (layers, hidden), (layers, hidden), (layers,)
                expected |= {name: (float32, shape) for name, shape in zip(names, shapes, strict=True)}
        expected |= dict.fromkeys(settings.hook_names, (DTYPES[settings.dtype], (*rows, hidden)))
    return expected | {"is_generated": (np.dtype(np.uint8), rows)}
