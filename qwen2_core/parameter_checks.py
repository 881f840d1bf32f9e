"""The parameter tree of a model: checks that one belongs to it, and its shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

from qwen2_core.config import QwenConfig
from qwen2_core.sharding import Layout
from qwen2_core.weights import tensor_specs

_LISTED = 4  # leaves that an error names; a tree of another model differs in hundreds


def check_params(config: QwenConfig, params: Any) -> None:
    """Checks names, shapes, dtypes and places of a parameter tree's leaves against the model's config.

    Raises:
        ValueError: one sentence that says what does not fit, and what to do.
    """
    if not isinstance(params, Mapping):
        raise ValueError(f"params must be the parameter tree of load_qwen2, not a {type(params).__name__}.")
    if set(params) == {"params"}:
        raise ValueError('params must be the tree itself: pass variables["params"].')
    if config.scan_layers != ("layers" in params):
        remedy = (
            "qwen2_jax.stack_layers(params)" if config.scan_layers else "config.replace(scan_layers=True)"
        )
        raise ValueError(
            f"The layers of params are {'not ' if config.scan_layers else ''}stacked, and the config says "
            f"scan_layers={config.scan_layers}: use the config that load_qwen2 returned with them, or "
            f"{remedy}."
        )
    leaves = {
        tuple(str(getattr(key, "key", key)) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for path, leaf in leaves.items():
        if hasattr(leaf, "detach"):
            raise ValueError(
                f"params hold tensors of torch ({'/'.join(path)}): the tree is made by "
                "convert_hf_to_jax_weights(state_dict, config)."
            )
    expected = _expected_shapes(config)
    wrong = [f"{'/'.join(path)} is missing" for path in expected if path not in leaves]
    wrong += [f"{'/'.join(path)} is not of this model" for path in leaves if path not in expected]
    for path, leaf in leaves.items():
        shape = getattr(leaf, "shape", None)
        if path in expected and shape != expected[path]:
            wrong.append(f"{'/'.join(path)} has the shape {shape} instead of {expected[path]}")
    if wrong:
        more = f", and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise ValueError(
            f"params do not belong to this model ({config.num_hidden_layers} layers, hidden size "
            f"{config.hidden_size}): {', '.join(wrong[:_LISTED])}{more}; use the config and params that "
            "load_qwen2 returned together."
        )
    found = {np.dtype(leaf.dtype).name for leaf in leaves.values()} - {config.dtype.name}
    if found:
        raise ValueError(
            f"params hold {' and '.join(sorted(found))}, and the config says {config.dtype.name}: use "
            "load_qwen2(..., dtype=) or config.replace(dtype=)."
        )
    check_places(leaves.values())


def check_places(leaves: Iterable[Any]) -> None:
    """Checks that arrays lie on one device, or all on one mesh without explicit axes.

    Raises:
        ValueError: one sentence that says where they lie.
    """
    shardings = [leaf.sharding for leaf in leaves if getattr(leaf, "sharding", None) is not None]
    for sharding in shardings:
        if isinstance(sharding, NamedSharding) and AxisType.Auto not in set(sharding.mesh.axis_types):
            raise ValueError(
                f"params lie on a mesh with explicit axes {sharding.mesh.axis_names}: load them with "
                "load_qwen2(..., mesh_shape=(data, model)), or put them on one device with jax.device_put."
            )
    places = {frozenset(sharding.device_set) for sharding in shardings}
    if len(places) > 1:
        names = sorted({str(device) for place in places for device in place})
        raise ValueError(
            f"params lie apart, on {', '.join(names[:_LISTED])}: put them all on one device with "
            "jax.device_put, or load them with load_qwen2(..., mesh_shape=(data, model))."
        )


def abstract_params(config: QwenConfig, layout: Layout) -> Any:
    """Returns the parameter tree with ``jax.ShapeDtypeStruct`` leaves: what a plan needs of weights."""
    tree: dict[str, Any] = {}
    for path, shape in _expected_shapes(config).items():
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        sharding = layout.weight_sharding(path, len(shape))
        inner[path[-1]] = jax.ShapeDtypeStruct(shape, config.dtype, sharding=sharding)
    return tree


def _expected_shapes(config: QwenConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for spec in tensor_specs(config).values():
        path, shape = spec.path, spec.tree_shape
        if config.scan_layers and path[0].startswith("layers_"):
            path, shape = ("layers", *path[1:]), (config.num_hidden_layers, *shape)
        shapes[path] = shape
    return shapes
