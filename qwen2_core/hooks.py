"""What a forward pass does at hook points: it makes interventions and keeps the values that are asked for."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

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
    edits: tuple[Edit, ...] = ()

    def at(self, layer: int | Array | None, kept: Kept) -> LayerHooks:
        """Returns what is done in one layer; None: at the model's own points."""
        return LayerHooks(self, layer, dict(kept))

    def touches(self, point: str) -> bool:
        """Returns whether a point's values are kept or changed."""
        return any(edit.placed.point == point for edit in self.edits) or point in dict(self.points)


class LayerHooks:
    """What is done in one layer. ``kept`` holds the values kept so far, those of earlier layers included."""

    def __init__(self, hooks: Hooks, layer: int | Array | None, kept: Kept) -> None:
        self._hooks, self._layer, self.kept = hooks, layer, kept

    def __call__(self, point: str, x: Array) -> Array:
        """Returns the value that the model goes on with in place of x [batch, tokens, width] at a point."""
        before, edits = x, [edit for edit in self._hooks.edits if edit.placed.point == point]
        places = [_find(edit.placed.layers, self._layer, self._hooks.depth) for edit in edits]
        chosen = [(edit, place) for edit, place in zip(edits, places, strict=True) if place is not None]
        if chosen:
            wide = x.astype(jnp.float32)
            for edit, place in chosen:
                wide = edit.apply(wide, *place)
            x = wide.astype(x.dtype)
        for kept, layers in self._hooks.points:
            place = _find(layers, self._layer, self._hooks.depth) if kept == point else None
            if place is not None:
                value = before if self._hooks.before else x
                self.kept[point] = _write(self.kept[point], value.swapaxes(0, 1), place)
        return x


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
    return _Place(jnp.maximum(slot, 0), slot >= 0)


def _write(buffer: Array, value: Array, place: _Place) -> Array:
    start = (place.slot, 0, 0, 0)
    if not isinstance(place.chosen, bool):
        value = jnp.where(place.chosen, value, lax.dynamic_slice(buffer, start, (1, *value.shape))[0])
    return update_slice(buffer, value[None], start)
