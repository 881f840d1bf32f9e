"""Checks the numbers of interventions against a model, and gives them the shapes that programs take.

Tracers pass: an intervention may be an argument of the caller's own ``jit``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qwen2_core.config import QwenConfig
from qwen2_core.hook_points import LN_FINAL
from qwen2_core.inputs import as_int, layer_numbers, one_by_one, plain


def point_layers(name: str, point: str, given: Any, depth: int) -> tuple[int | None, ...]:
    """Returns the layers that are asked for of a point; (None,) for a point of the model.

    Args:
        name: what asks, for errors.
        point: one of ``hook_points.point_names()``.
        given: layer numbers, or True for all of them; True or None for a point of the model.
        depth: how many layers the model has.

    Raises:
        ValueError: other than that.
    """
    if point == LN_FINAL:
        if given is not None and given is not True:
            raise ValueError(f"{name}: {LN_FINAL} has no layers: give True, not {given!r}.")
        return (None,)
    return tuple(range(depth)) if given is True else layer_numbers(given, depth, name)


def position_numbers(name: str, given: Any) -> list[int]:
    """Returns a list of positions in a sequence.

    Raises:
        ValueError: it is none, is empty, or names a position twice.
    """
    refusal = f'{name} must be "all", "prompt", "generated" or a list of positions from 0, not {given!r}.'
    found = [as_int(position) for position in one_by_one(given, refusal)]
    if not found or any(position is None or position < 0 for position in found):
        raise ValueError(refusal)
    if len(set(found)) != len(found):
        raise ValueError(f"{name} names a position twice.")
    return found  # pyright: ignore[reportReturnType]


def finite_numbers(name: str, given: Any) -> Any:
    """Returns an argument as float32, a tracer as it is.

    Raises:
        ValueError: it holds anything but finite numbers.
    """
    if isinstance(given, Tracer):
        return given.astype(jnp.float32)
    given = plain(given)
    try:
        array = np.asarray([plain(one) for one in given] if isinstance(given, list | tuple) else given)
        array = array.astype(np.float32) if array.dtype.kind in "iuf" else None
    except (ValueError, TypeError):
        array = None
    if array is None or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers, and is not.")
    return array


@dataclasses.dataclass(frozen=True)
class ValueChecks:
    """What an intervention's values must fit."""

    name: str  # the intervention's
    config: QwenConfig
    layers: int
    width: int

    def numbers(self, field: str, given: Any) -> Any:
        """Returns [layers, 1] of one number, or of one for each layer."""
        array = self._of_shapes(field, given, ((), (self.layers,)))
        return broadcast(array, (self.layers,))[:, None]

    def by_layer(self, field: str, given: Any) -> Any:
        """Returns [layers, width] of [width] or [layers, width]."""
        shape = (self.layers, self.width)
        return broadcast(self._of_shapes(field, given, (shape[1:], shape)), shape)

    def by_position(self, field: str, given: Any, positions: Any) -> Any:
        """Returns [layers, 1 or more, width]; there are more rows than positions, up to a power of two."""
        if isinstance(positions, str) or np.ndim(given) == 1:
            return self.by_layer(field, given)[:, None]
        rows = len(positions) if isinstance(positions, Sequence) else 1
        shape = (self.layers, rows, self.width)
        one_row = (self.layers, 1, self.width)
        array = self._of_shapes(field, given, (shape[1:], shape, one_row, shape[2:]))
        if array.shape == one_row or rows == 1:
            return broadcast(array, one_row)
        padded = 1 << (rows - 1).bit_length()
        pad = jnp.pad if isinstance(array, Tracer) else np.pad
        return pad(broadcast(array, shape), ((0, 0), (0, padded - rows), (0, 0)))

    def _of_shapes(self, field: str, given: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
        array = finite_numbers(f"{self.name}.{field}", given)
        if array.shape not in shapes:
            names = (str(list(shape)) if shape else "one number" for shape in dict.fromkeys(shapes))
            wanted = " or ".join(names)
            raise ValueError(f"{self.name}.{field} must be {wanted}, not of shape {list(array.shape)}.")
        return array


def broadcast(array: Any, shape: tuple[int, ...]) -> Any:
    """Returns an array, or a tracer, in another shape."""
    return (jnp if isinstance(array, Tracer) else np).broadcast_to(array, shape)
