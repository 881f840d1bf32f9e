"""Which rows of which layers are read, and as what: arguments and results of reader and shuffle."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int32

from activation_store.format import SequenceRecord, StoreError, StoreUsageError, hook_name
from activation_store.hook_labels import hook_label, hooks_text, labelled_hook

Value = TypeVar("Value")
OneLayer: TypeAlias = SupportsIndex | str  # the number of a block, for its output, or any hook's name
Label: TypeAlias = int | str  # what results are labelled with: as `hook_labels.hook_label`
Layers: TypeAlias = OneLayer | Iterable[OneLayer]
STORED = "stored"
_ROW_DTYPES = ("float32", STORED)


class RowColumns(NamedTuple):
    """Token, position and so on of each row; all arrays have one entry per row."""

    token_ids: Int32[np.ndarray, " rows"]  # the token that was read; -1 where rows were imported without it
    positions: Int32[np.ndarray, " rows"]  # its place in the sequence, prompt included
    is_generated: Bool[np.ndarray, " rows"]
    logprobs: Float32[np.ndarray, " rows"]  # NaN on prompt rows
    # float32 [rows]: Euclidean norms of the rows in the layer that was named. Where several, or none, were
    # named it is a dict of them by layer.
    norms: Any

    def __repr__(self) -> str:
        """Says in a line what there is, without the values."""
        return shapes_text(self)

    def copied(self) -> "RowColumns":
        """Returns copies, which may be written to."""
        return self._each(np.copy)

    def take(self, keep: Bool[np.ndarray, " rows"]) -> "RowColumns":
        """Returns the columns of the rows to keep."""
        return self._each(lambda column: column[keep])

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> "RowColumns":
        if isinstance(self.norms, dict):
            norms = {layer: change(one) for layer, one in self.norms.items()}
        else:
            norms = change(self.norms)
        return RowColumns(
            change(self.token_ids),
            change(self.positions),
            change(self.is_generated),
            change(self.logprobs),
            norms,
        )


@dataclass(frozen=True)
class RowFilter:
    """Chooses which rows of a sequence to read.

    Nothing is deleted from a store: attention sinks are left out here, the first token of a prompt with
    `first_position=1`, others by their norm with `max_norm` (compare `ActivationStore.statistics`). Where
    several layers are read, a row is kept when its norm is within `max_norm` in each of them.

    Raises:
        StoreError: a position or norm below 0, or no number.
    """

    generated: bool = True
    prompt: bool = True
    first_position: int = 0
    stop_position: int | None = None  # positions from here on are left out
    max_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("first_position", "stop_position"):
            value = getattr(self, name)
            if value is not None and not (_is_whole(value) and value >= 0):
                raise StoreError(f"{name} counts from 0, the first token of the prompt; it is {value!r}")
        if self.max_norm is not None and not _is_norm(self.max_norm):
            raise StoreError(f"max_norm must be a number of at least 0, not {self.max_norm!r}")

    def row_range(self, record: SequenceRecord) -> tuple[int, int]:
        """Returns the rows [start, stop) that pass by kind and position, from 0 for the sequence's first."""
        first_stored = record.prompt_length - record.prompt_rows
        stop_position = record.prompt_length + record.generated_length
        if self.stop_position is not None:
            stop_position = min(stop_position, self.stop_position)
        start = max(self.first_position - first_stored, 0 if self.prompt else record.prompt_rows)
        start = min(start, record.n_rows)
        stop = min(stop_position - first_stored, record.n_rows if self.generated else record.prompt_rows)
        return start, max(start, stop)


@dataclass(frozen=True)
class LayerChoice:
    """The layers that one call reads: the outputs of blocks, or other hooks."""

    layers: tuple[Label, ...]  # in the order asked for
    places: tuple[int, ...]  # their indices among the stored hooks
    alone: bool  # one layer, named by itself: what is read of it is not put into a dict

    @property
    def hooks(self) -> list[str]:
        """The layers' hook names."""
        return list(map(labelled_hook, self.layers))

    def label(self, values: Sequence[Value]) -> Value | dict[Label, Value]:
        """Returns one value a layer as `{layer: value}`, or the only one as it is."""
        return values[0] if self.alone else dict(zip(self.layers, values, strict=True))

    def within(self, columns: RowColumns, chosen: RowFilter) -> Bool[np.ndarray, " rows"]:
        """Returns which rows have a norm of at most `chosen.max_norm` in every layer."""
        norms = columns.norms.values() if isinstance(columns.norms, dict) else [columns.norms]
        keep = np.ones(len(columns.positions), bool)
        for of_layer in norms:
            keep &= of_layer <= chosen.max_norm
        return keep


def choose_layers(layer: Layers, stored: tuple[str, ...], where: str) -> LayerChoice:
    """Returns the choice of a layer's number or hook name, or of several, among the hooks stored.

    Raises:
        StoreError: a layer that is not stored or named twice, none at all, or what does not name a layer.
    """
    alone, labels = _labels(layer)
    places = {hook: place for place, hook in enumerate(stored)}
    for label in labels:
        if labelled_hook(label) not in places:
            raise StoreUsageError(f"{_called(label)} is not in {where}; {_there(stored)}")
    if not labels or len(set(labels)) < len(labels):
        raise StoreUsageError(f"layers are named once each, at least one of them, not {list(labels)}")
    return LayerChoice(labels, tuple(places[labelled_hook(label)] for label in labels), alone)


def _called(label: Label) -> str:
    return f"layer {label}" if isinstance(label, int) else label


def _there(stored: tuple[str, ...]) -> str:
    """Returns which hooks there are, as an answer to one that is not there."""
    layers = [str(label) for label in map(hook_label, stored) if isinstance(label, int)]
    if len(layers) == len(stored):
        return f"its layers: {', '.join(layers)}" if stored else "it was made without activations"
    return f"it has {hooks_text(stored)}"


def _labels(layer: Any) -> tuple[bool, tuple[Label, ...]]:
    """Returns whether one layer is named by itself, and the labels of all that are named."""
    if isinstance(layer, str | bytes) or not isinstance(layer, Iterable) or getattr(layer, "ndim", None) == 0:
        return True, (_label(layer),)
    return False, tuple(map(_label, layer))


def _label(layer: Any) -> Label:
    if _is_whole(layer):
        return operator.index(layer)
    try:
        return hook_label(layer)
    except (ValueError, TypeError):
        raise StoreUsageError(
            f"{layer!r} names no layer: give its number, such as 12, or its hook name, such as "
            f"{hook_name(12)!r}, or a list of them"
        ) from None


def whole(value: Any, name: str) -> int:
    """Returns a whole number of at least 0 as an int; raises StoreError for anything else."""
    if not _is_whole(value) or operator.index(value) < 0:
        raise StoreError(f"{name} must be a whole number of at least 0, not {value!r}")
    return operator.index(value)


def _is_whole(value: Any) -> bool:
    """Returns whether a value is a whole number; True and False, of any library, are not."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_norm(value: Any) -> bool:
    try:
        return not isinstance(value, str | bytes | bool) and bool(float(value) >= 0)
    except (TypeError, ValueError):
        return False


def row_filter(rows: Any) -> RowFilter:
    """Returns the filter given, or that of all rows for None; raises StoreError for anything else."""
    if rows is not None and not isinstance(rows, RowFilter):
        raise StoreError(f"rows must be a RowFilter, such as RowFilter(prompt=False), not {rows!r:.100}")
    return rows or RowFilter()


def check_row_dtype(dtype: str) -> None:
    """Raises StoreError unless `dtype` is one that rows can be asked for in."""
    if not isinstance(dtype, str) or dtype not in _ROW_DTYPES:
        raise StoreError(f'dtype must be "float32" or "{STORED}" (as the rows lie on disk), not {dtype!r}')


def in_dtype(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Returns rows as they are stored, or a float32 copy that the caller may write to."""
    return rows if dtype == STORED else rows.astype(np.float32)


def part(tensor: np.ndarray, start: int, stop: int, where: str) -> np.ndarray:
    """Returns `tensor[start:stop]`; raises StoreError where a slice would silently be shorter."""
    if not 0 <= start <= stop <= len(tensor):
        raise StoreError(f"{where} has {len(tensor)} rows, not those from {start} to {stop}")
    return tensor[start:stop]


def shapes_text(values: Any) -> str:
    """Returns a named tuple of arrays in a line: `RowColumns(token_ids=int32[9], positions=int32[9])`."""
    fields = (f"{name}={_shape_text(value)}" for name, value in zip(values._fields, values, strict=True))
    return f"{type(values).__name__}({', '.join(fields)})"


def _shape_text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_shape_text(one)}' for key, one in value.items())}}}"
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
