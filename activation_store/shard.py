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
import json
import math
from collections.abc import Callable, Iterable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import ml_dtypes
import numpy as np

from activation_store.format import StoreError
from activation_store.store_files import FileView

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_HEAD_BYTES = 1 << 15  # holds the header and the first columns of a shard of a thousand rows
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
    """Wraps a method so that its errors become StoreErrors that name the shard."""

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

    In an object store, where nothing can be mapped, a layer is fetched whole, and the last one is kept. The
    file's first part, which has the header and the small tensors, is read in one go when one of them is
    wanted; opening only asks the system for it and does not wait. Every method raises StoreError where the
    file cannot be read or is damaged.

    Args:
        file: its bytes.
        size: how many they are.
        where: its name for messages.
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
        """Returns the tensors' names, in file order."""
        header = json.loads(self._read_header())
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        return [name for name in header if name != "__metadata__"]

    @_naming_the_shard
    def check_layout(self) -> None:
        """Raises StoreError unless the tensors fill the file from the header to its end without a gap."""
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
        """Returns where a tensor lies; StoreError when it is missing or not within the file."""
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
        start = self.place(name).start
        row_bytes = out.shape[1] * out.dtype.itemsize
        filled = 0
        for first, end in runs:
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

    def _read_header(self) -> str:
        if not self._base:
            self._head = np.empty(min(self._size, _HEAD_BYTES), np.uint8)
            self._file.read_into(0, self._head)
            self._head.setflags(write=False)  # columns are views of it
            length = int.from_bytes(self._head[:8].tobytes(), "little")
            if 8 + length > self._size:
                raise ValueError(f"its header does not fit {self._size} bytes")
            self._header, self._base = self._bytes(8, 8 + length).tobytes().decode(), 8 + length
        return self._header

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        return self._head[start:stop] if stop <= len(self._head) else self._file.view(start, stop)
