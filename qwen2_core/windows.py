"""Says which layers attend to a sliding window, and how far each of them sees.

A window of w positions is a token's own and the w - 1 before it. Other layers see all positions up to the
token's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen2_core.errors import CheckpointError
from qwen2_core.messages import shown

FULL, SLIDING = "full_attention", "sliding_attention"
_WHOLE = 2**30  # positions: a window that no text is longer than

Windows = tuple[int | None, ...]  # of each layer; None sees everything


def window_of(windows: Windows, layer: int | Array) -> int | Array | None:
    """Returns a layer's window in positions, None for one that sees everything.

    A layer that runs in a scan has a traced number. All layers have a window then, if any has: of those that
    see everything it is longer than any text.
    """
    if isinstance(layer, int):
        return windows[layer]
    if len(set(windows)) == 1:
        return windows[0]
    sizes = np.array([_WHOLE if window is None else window for window in windows], np.int32)
    return jnp.asarray(sizes)[layer]


def read_layer_types(hf: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns the kinds of layers as Transformers' Qwen2 reads them from a config; None if all are full.

    Args:
        hf: the config, with Transformers' defaults where it says nothing.

    Raises:
        CheckpointError: values of the wrong type, or layers with a window whose width is not given.
    """
    use, window, first = (hf.get(k) for k in ("use_sliding_window", "sliding_window", "max_window_layers"))
    depth = hf["num_hidden_layers"]
    if not isinstance(use, bool | None):
        raise CheckpointError(f"use_sliding_window must be true or false, not {shown(use)}.")
    layers = hf.get("layer_types")
    if layers is None:
        if type(first) is not int:
            raise CheckpointError(f"max_window_layers must be an integer, not {shown(first)}.")
        if not use or window is None or first >= depth:
            return None
        return tuple(SLIDING if layer >= first else FULL for layer in range(depth))
    check_layer_types(layers, depth)
    if SLIDING not in layers:
        return None
    if not use:
        raise CheckpointError(
            f"layer_types has {SLIDING}, but use_sliding_window is not true; Transformers refuses that too."
        )
    return tuple(layers)


def check_layer_types(layers: Any, depth: int) -> None:
    """Raises CheckpointError where these are not the kinds of ``depth`` layers."""
    if not isinstance(layers, list | tuple) or len(layers) != depth:
        raise CheckpointError(f"layer_types must be a list of {shown(depth)} names.")
    other = [name for name in layers if name not in (FULL, SLIDING)]
    if other:
        raise CheckpointError(f"layer_types {shown(other[0])} is not one of {FULL!r} and {SLIDING!r}.")


def windows_of(layer_types: tuple[str, ...] | None, window: int | None, depth: int) -> Windows:
    """Returns each layer's window.

    Raises:
        CheckpointError: layers with a window, and no width.
    """
    if layer_types is None or SLIDING not in layer_types:
        return (None,) * depth
    if type(window) is not int or not 1 <= window < _WHOLE:
        raise CheckpointError(f"sliding_window must be a positive integer, not {shown(window)}.")
    return tuple(window if kind == SLIDING else None for kind in layer_types)
