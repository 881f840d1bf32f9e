"""A shard: the rows of one batch as one safetensors file. What it holds, and reading it.

| tensor                                | dtype   | shape                                              |
|---------------------------------------|---------|----------------------------------------------------|
| `token_ids`                           | int32   | [rows] the token that was read                     |
| `positions`                           | int32   | [rows] its place in the sequence, prompt included  |
| `sequence_index`                      | int32   | [rows] which sequence of the shard                 |
| `logprobs`                            | float32 | [rows] of a generated token; NaN on prompt rows    |
| `prompt_token_ids`                    | int32   | the prompts of the batch end to end                |
| `norms`                               | float32 | [hooks, rows] Euclidean norm of each row           |
| `statistics.{generated,prompt}.{..}`  | float32 | mean and variance [hooks, hidden], norm [hooks]    |
| `blocks.10.hook_resid_post`, ...      | settings.dtype | [rows, hidden]                              |
| `is_generated`                        | uint8   | [rows]                                             |

Hooks are in the order of the settings. Where they have several widths (`StoreSettings.widths`), each has rows
of its own width, and means and variances are [sum of widths], end to end. The statistics live in the shard,
so one rename commits both. Without capture only `token_ids` to `prompt_token_ids` and `is_generated` are
there. `packing.py` writes shards.
"""

import functools
import math
from collections.abc import Callable, Iterable
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
# Bytes, of the first hook's rows in the file: the kernel copies from and to odd addresses at half the speed.
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
_COLUMNS = {
    "token_ids": np.dtype(np.int32),
    "positions": np.dtype(np.int32),
    "sequence_index": np.dtype(np.int32),
    "logprobs": np.dtype(np.float32),
    "prompt_token_ids": np.dtype(np.int32),
    "is_generated": np.dtype(np.uint8),
}
_STATISTICS = [f"statistics.{group}.{name}" for group in GROUPS for name in ("mean", "variance", "norm")]


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
        self._entries: dict[str, _Entry] = {}  # once the header was read
        self._base = 0  # where the tensors begin
        self._places: dict[str, TensorPlace] = {}
        self._columns: dict[str, np.ndarray] = {}
        self._layer: tuple[str, np.ndarray] | None = None
        file.prefetch(0, min(size, _HEAD_BYTES))

    @_naming_the_shard
    def check_layout(self) -> None:
        """Raises StoreError unless the shard has exactly the tensors that the settings promise."""
        entries = self._read_header()
        for name in [*entries, *_required(self._settings)]:
            self.place(name)

    @_naming_the_shard
    def __contains__(self, name: str) -> bool:
        return name in self._read_header()

    @_naming_the_shard
    def place(self, name: str) -> TensorPlace:
        """Returns where a tensor lies; StoreError where it is missing or not what the settings promise."""
        if name not in self._places:
            entries = self._read_header()
            if name not in entries:
                raise ValueError(f"tensor {name} is missing")
            entry = entries[name]
            dtype, shape = self._promised(name)
            if (entry.dtype, entry.shape) != (TYPE_NAMES[dtype], shape):
                raise ValueError(
                    f"tensor {name} is {entry.dtype} {entry.shape}, expected {TYPE_NAMES[dtype]} {shape}"
                )
            start, stop = entry.data_offsets
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} does not fill its place")
            self._places[name] = TensorPlace(dtype, shape, self._base + start, self._base + stop)
        return self._places[name]

    def _promised(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Returns dtype and shape of a tensor in a shard of as many rows and prompt tokens."""
        rows, prompts = (
            self._entries[one].shape[:1] if one in self._entries else (0,)
            for one in ("token_ids", "prompt_token_ids")
        )
        hooks = len(self._settings.hook_names)
        if name in self._settings.hook_names:
            return DTYPES[self._settings.dtype], (*rows, self._settings.hook_widths[name])
        if name in _COLUMNS:
            return _COLUMNS[name], prompts if name == "prompt_token_ids" else rows
        if hooks and name == "norms":
            return np.dtype(np.float32), (hooks, *rows)
        if hooks and name in _STATISTICS:
            return np.dtype(np.float32), (hooks,) if name.endswith(".norm") else moments_shape(self._settings)
        raise ValueError(f"tensor {name!r} does not belong there")

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

    @property
    def sequences(self) -> int:
        """How many sequences were written to it; index lines may name fewer, where some were dropped."""
        of_rows = self.column("sequence_index")
        return int(of_rows[-1]) + 1 if len(of_rows) else 0

    def statistics(self, group: str, place: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns mean [width], variance [width] and mean norm of the `place`-th hook's rows of a group."""
        mean, variance, norm = (
            self.column(f"statistics.{group}.{name}").reshape(-1) for name in ("mean", "variance", "norm")
        )
        widths = list(self._settings.hook_widths.values())
        start = sum(widths[:place])
        stop = start + widths[place]
        return mean[start:stop], variance[start:stop], float(norm[place])

    def layer(self, name: str) -> np.ndarray:
        """Returns the rows [rows, width] under a hook name in their stored dtype, as a read-only view."""
        if self._layer is None or self._layer[0] != name:
            self._layer = name, self._tensor(name, self._file.view)
        return self._layer[1]

    @_naming_the_shard
    def _tensor(self, name: str, read: Callable[[int, int], np.ndarray]) -> np.ndarray:
        dtype, shape, start, stop = self.place(name)
        return read(start, stop).view(dtype).reshape(shape)

    @_naming_the_shard
    def read_rows(self, name: str, runs: Iterable[tuple[int, int]], out: np.ndarray) -> None:
        """Reads rows [first, end) of a hook, run after run, into `out` [rows, width] of the stored dtype.

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

    def _read_header(self) -> dict[str, _Entry]:
        """Returns the header's entries, whose tensors fill the file from the header to its end."""
        if not self._base:
            self._head = np.empty(min(self._size, _HEAD_BYTES), np.uint8)
            self._file.read_into(0, self._head)
            self._head.setflags(write=False)  # columns are views of it
            length = int.from_bytes(self._head[:8].tobytes(), "little")
            if length > min(self._size - 8, _HEADER_BYTES):
                raise ValueError(f"its header does not fit {self._size} bytes")
            entries = _HEADER.decode(self._bytes(8, 8 + length).tobytes())
            entries.pop("__metadata__", None)
            end = 0
            for name, entry in entries.items():
                start, stop = entry.data_offsets
                if start != end:
                    raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
                end = stop
            if 8 + length + end != self._size:
                raise ValueError(f"its tensors end at byte {8 + length + end}, the file at {self._size}")
            self._entries, self._base = entries, 8 + length
        return self._entries

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        return self._head[start:stop] if stop <= len(self._head) else self._file.view(start, stop)


def moments_shape(settings: StoreSettings) -> tuple[int, ...]:
    """Returns the shape of the stored means, and of the variances: of all hooks, in their order."""
    widths = list(settings.hook_widths.values())
    return (len(widths), widths[0]) if len(set(widths)) == 1 else (sum(widths),)


def _required(settings: StoreSettings) -> list[str]:
    """Returns the tensors that every shard has; statistics are of the groups that have rows."""
    return [*_COLUMNS, *(("norms", *settings.hook_names) if settings.hook_names else ())]
