"""What a forward pass does at hook points: it makes interventions and keeps the values that are asked for."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int32

from kvcache_utils import update_slice
from qwen2_core.steering import Edit

PointLayers = tuple[tuple[str, tuple[int | None, ...]], ...]  # points, and the layers of each
Kept = dict[str, Array]  # by point: [layers, tokens, batch, width]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hooks:
    """What is done in one forward pass: in all layers, scanned or not."""

    points: PointLayers = dataclasses.field(metadata={"static": True})  # whose values are kept
    before: bool = dataclasses.field(metadata={"static": True})  # kept as they are before interventions
    depth: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})  # of values that are kept
    residual_dtype: Any = dataclasses.field(metadata={"static": True})  # of those the model goes on with
    edits: tuple[Edit, ...] = ()

    def at(self, layer: int | Array | None, kept: Kept) -> LayerHooks:
        """Returns what is done in one layer; None: at the model's own points."""
        return LayerHooks(self, layer, kept)

    def edits_at(self, point: str) -> list[Edit]:
        """Returns the interventions at a point, in their order."""
        return [edit for edit in self.edits if edit.placed.point == point]

    def at_tokens(self, tokens: Int32[Array, "batch chosen"]) -> Hooks:
        """Returns what is done at chosen tokens of a pass alone, where nothing is kept."""
        return dataclasses.replace(self, points=(), edits=tuple(edit.at(tokens) for edit in self.edits))


class LayerHooks:
    """What is done in one layer, whose values are kept beside those of earlier layers."""

    def __init__(self, hooks: Hooks, layer: int | Array | None, kept: Kept) -> None:
        self._hooks, self._layer, self._kept = hooks, layer, kept
        self._new: dict[tuple[int | None, ...], Kept] = {}  # by the layers that are asked for, then by point

    def kept(self) -> Kept:
        """Returns the values kept so far, those of this layer included."""
        kept = self._kept
        for layers, new in self._new.items():
            place = self._find(layers)
            assert place is not None
            kept = kept | _write({point: kept[point] for point in new}, new, place)
        return kept

    def __call__(self, point: str, x: Array) -> Array:
        """Returns the value that the model goes on with in place of x [batch, tokens, width] at a point."""
        return self.stream(point, x).astype(x.dtype)

    def stream(self, point: str, x: Array) -> Array:
        """Does the same at a point of the residual stream; returns float32 where interventions are made.

        A norm reads the stream in float32, and there XLA may leave out the rounding of the sum before. It
        must find the same sum here, or a row of strength 0 would not be the clean run to the last bit.
        """
        before = x
        places = [(edit, self._find(edit.placed.layers)) for edit in self._hooks.edits_at(point)]
        chosen = [(edit, place) for edit, place in places if place is not None]
        if chosen:
            wide = clean = x.astype(jnp.float32)
            for edit, place in chosen:
                wide = edit.apply(wide, *place)
            untouched = functools.reduce(jnp.logical_and, [edit.strength == 0 for edit, _ in chosen])
            rounded = wide.astype(self._hooks.residual_dtype).astype(jnp.float32)
            x = jnp.where(untouched[..., None], clean, rounded)
        layers = dict(self._hooks.points).get(point, ())
        if self._find(layers) is not None:
            value = (before if self._hooks.before else x).astype(self._hooks.dtype)
            self._new.setdefault(layers, {})[point] = value.swapaxes(0, 1)
        return x

    def _find(self, layers: tuple[int | None, ...]) -> _Place | None:
        return _find(layers, self._layer, self._hooks.depth) if layers else None


class _Place(NamedTuple):
    slot: int | Array  # of a layer among the chosen ones
    chosen: bool | Array  # whether it is one of them


def _find(layers: tuple[int | None, ...], layer: int | Array | None, depth: int) -> _Place | None:
    """Returns a layer's place among others; None where it is known not to be among them."""
    if layer is None or isinstance(layer, int):
        return _Place(layers.index(layer), True) if layer in layers else None
    slots = np.full(depth, -1, np.int32)
    slots[list(layers)] = np.arange(len(layers))  # pyright: ignore[reportCallIssue, reportArgumentType]
    slot = jnp.asarray(slots)[layer]
    return _Place(jnp.maximum(slot, 0), True if (slots >= 0).all() else slot >= 0)


def _write(kept: Kept, new: Kept, place: _Place) -> Kept:
    """Returns buffers of points with a layer's values, if it is one of those that are asked for."""

    def put(kept: Kept) -> Kept:
        return {point: update_slice(kept[point], new[point][None], (place.slot, 0, 0, 0)) for point in kept}

    if isinstance(place.chosen, bool):
        return put(kept)
    # One branch for all points: the other layers of a scan then write nothing.
    return lax.cond(place.chosen, put, lambda kept: kept, kept)
