"""Says where arrays are: on one device, or on a mesh of one process's devices, ``data`` times ``model``.

    config, params = load_qwen2("Qwen/Qwen2.5-7B-Instruct", mesh_shape=(1, 4))    # over four devices
    out = generate_single_task_jitted(create_model_with_hooks(config), params, ...)   # as on one

``data``: each group of ``model`` devices generates its own rows with all the weights. Programs run once for
each group (``shard_map``), with its own loops, so that no group ever waits for, or hears of, another.

``model``: the devices of a group split the weights by attention heads, MLP columns and vocabulary
(Megatron-LM, Shoeybi et al. 2019), and the KV cache by heads. XLA puts the sums between devices where they
belong. What does not divide is whole on each device, and ``Layout.describe`` says so. The residual stream,
and so every captured row, is whole on every device.

Everything runs where the weights are: ``layout_of`` reads it off them. The axes of a loop's
state are named in its dataclass fields (``kvcache_utils.axes``).

A TPU keeps two axes of an array in tiles of 8 x 128, padded. XLA chooses which two by the sizes alone. Where
the loop wants others, XLA copies the whole cache or all activations on the way in and out (17 MB a task at
batch 128, 28 MB at 100, beside 45 MB of buffers). So ``axes_of`` gives the order of a loop's state.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import layout as xla_layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from qwen2_core.compilation import check_settings
from qwen2_core.config import QwenConfig
from qwen2_core.inputs import as_int
from qwen2_core.kernels.platforms import tracing_for

DATA, MODEL = "data", "model"
_LANES = 128  # of a TPU: what its minor axis is padded to


@dataclasses.dataclass(frozen=True)
class Axes:
    """Logical names of an array's axes, and their order in a TPU's memory.

    The names are "rows" (sequences or prompts), "heads", "mlp" and "vocab"; None for any other axis. The
    order is from major to minor; None leaves it to XLA.
    """

    names: PartitionSpec
    tpu_order: tuple[int, ...] | None = None


WHOLE = Axes(PartitionSpec())
ROWS = Axes(PartitionSpec("rows"))
ACTIVATIONS = Axes(PartitionSpec(None, None, "rows"))  # [layers, tokens, rows, hidden]

# Axes of a weight by its module and its own name. All other weights are whole on each device.
_WEIGHTS: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embed_tokens", "embedding"): ("vocab", None),
    ("lm_head", "kernel"): (None, "vocab"),
    **{(name, "kernel"): (None, "heads") for name in ("q_proj", "k_proj", "v_proj")},
    **{(name, "bias"): ("heads",) for name in ("q_proj", "k_proj", "v_proj")},
    ("o_proj", "kernel"): ("heads", None),
    ("gate_proj", "kernel"): (None, "mlp"),
    ("up_proj", "kernel"): (None, "mlp"),
    ("down_proj", "kernel"): ("mlp", None),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Placement on one device (no mesh), or on a mesh, with the parts of the model that its devices split."""

    mesh: Mesh | None = None
    split: frozenset[str] = frozenset()  # of "heads", "mlp", "vocab"
    chip: SingleDeviceSharding | None = None  # the one device, if it is a TPU or not the first

    @property
    def data_parallel(self) -> int:
        """Number of groups of ``model`` devices; each group generates its own rows."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    @property
    def platform(self) -> str:
        """The devices' platform: "cpu", "gpu" or "tpu"."""
        if self.mesh is not None:
            return self.mesh.devices.flat[0].platform
        return jax.default_backend() if self.chip is None else next(iter(self.chip.device_set)).platform

    @property
    def devices(self) -> int:
        """Number of devices of all groups."""
        return 1 if self.mesh is None else self.mesh.size

    def kv_heads(self, config: QwenConfig) -> int:
        """Returns the number of KV heads whose keys and values each device holds."""
        shares = self.devices // self.data_parallel if "heads" in self.split else 1
        return config.num_key_value_heads // shares

    def place_weight(self, path: tuple[str, ...], array: np.ndarray) -> Array:
        """Puts a weight from the host straight to where it belongs, each part to its device."""
        return jax.device_put(array, self.weight_sharding(path, array.ndim))

    def weight_sharding(self, path: tuple[str, ...], ndim: int) -> NamedSharding | None:
        """Returns where the weight at ``path`` of the parameter tree belongs; None: on the default device."""
        if self.mesh is None:
            return None
        axes = _WEIGHTS.get(path[-2:], ())
        return self._sharding(PartitionSpec(*[None] * (ndim - len(axes)), *axes))

    def jit(
        self, function: Callable[..., Any], in_axes: Any, out_axes: Any, donate_argnums: Sequence[int] = ()
    ) -> Any:
        """Returns ``jax.jit(function)``, run by each group on its own rows.

        Args:
            function: traced with the sizes of one group.
            in_axes: ``Axes`` or a pytree of them for each argument; WHOLE for weights.
            out_axes: the same for each result.
            donate_argnums: as of ``jax.jit``.

        Raises:
            ValueError: as ``compilation.check_settings``.
        """
        check_settings(mesh=self.mesh is not None)
        places = _map_axes(self._place, out_axes)

        def traced(*args: Any) -> Any:
            with tracing_for(self.platform):
                return function(*args)

        traced.__name__ = getattr(function, "func", function).__name__  # what profiles and caches call it
        if self.mesh is None:
            return jax.jit(traced, donate_argnums=donate_argnums, out_shardings=places)
        by_group = jax.shard_map(
            traced,
            mesh=self.mesh,
            axis_names={DATA},
            in_specs=_map_axes(lambda axes: self._spec(axes.names, (DATA,)), in_axes),
            out_specs=_map_axes(lambda axes: self._spec(axes.names, (DATA,)), out_axes),
            check_vma=False,
        )
        return jax.jit(by_group, donate_argnums=donate_argnums, out_shardings=places)

    def struct(self, shape: tuple[int, ...], dtype: Any, axes: Axes = WHOLE) -> jax.ShapeDtypeStruct:
        """Returns an abstract argument of ``jit``'s function; ``shape`` is that of one group."""
        sizes = list(shape)
        if "rows" in axes.names:
            sizes[axes.names.index("rows")] *= self.data_parallel
        return jax.ShapeDtypeStruct(tuple(sizes), dtype, sharding=self._place(axes))

    def structs(self, state: Any) -> Any:
        """Returns ``struct`` of every array of a loop's state."""
        return jax.tree.map(
            lambda leaf, axes: self.struct(leaf.shape, leaf.dtype, axes), state, axes_of(state)
        )

    def describe(self, config: QwenConfig) -> str:
        """Describes the mesh in a line, and names the parts of the model that it cannot split."""
        assert self.mesh is not None
        data, model = self.mesh.shape[DATA], self.mesh.shape[MODEL]
        text = f"{data * model} devices: {data} groups of {model}"
        if model == 1:
            return f"{text}, each with all the weights"
        whole = [
            f"the {what} ({size} {unit})"
            for name, (what, size, unit) in _parts(config).items()
            if name not in self.split
        ]
        if not whole:
            return f"{text}, which split the weights"
        return f"{text}, which split the weights but for {' and '.join(whole)}, no multiple of {model}"

    def _spec(self, axes: PartitionSpec, mesh_axes: tuple[str, ...] = (DATA, MODEL)) -> PartitionSpec:
        """Maps named axes to those of the mesh, of which only ``mesh_axes`` are used."""
        mapped = {"rows": DATA} | dict.fromkeys(self.split, MODEL)
        found = [mapped.get(name) for name in axes]  # pyright: ignore[reportArgumentType]
        return PartitionSpec(*(name if name in mesh_axes else None for name in found))

    def _sharding(self, axes: PartitionSpec) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, self._spec(axes))

    def _place(self, axes: Axes) -> Any:
        """Returns the devices and, on TPUs, the order in memory; None: the default device."""
        sharding = self.chip if self.mesh is None else self._sharding(axes.names)
        if axes.tpu_order is None or not _is_tpu(sharding):
            return sharding
        return xla_layout.Format(xla_layout.Layout(axes.tpu_order), sharding)


def make_layout(config: QwenConfig, mesh_shape: Any, devices: Sequence[Any] | None = None) -> Layout:
    """Makes the layout of ``mesh_shape`` (data, model) devices of this process, the first ones by default.

    Raises:
        ValueError: no two numbers, fewer devices than that, or nothing in the model that could be split so.
    """
    given = [as_int(size) for size in mesh_shape] if isinstance(mesh_shape, tuple | list) else []
    data, model = given if len(given) == 2 else (None, None)
    if data is None or model is None:
        raise ValueError(
            f"mesh_shape must be two whole numbers (data, model), such as (1, 1), not {mesh_shape!r}."
        )
    devices = jax.local_devices() if devices is None else devices
    if min(data, model) < 1 or data * model > len(devices):
        raise ValueError(
            f"a mesh of {data} x {model} devices cannot be: this process has {len(devices)} "
            f"({devices[0].device_kind})"
        )
    if data * model == 1:
        return Layout()
    array = np.array(devices[: data * model]).reshape(data, model)
    layout = _layout(config, Mesh(array, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto)))
    if not layout.split:
        sizes = ", ".join(f"{size} {unit}" for _, size, unit in _parts(config).values())
        raise ValueError(f"nothing in this model can be split over {model} devices: it has {sizes}")
    return layout


def layout_of(config: QwenConfig, params: Any) -> Layout:
    """Reads the layout off weights, loaded by ``load_qwen2`` or abstract arrays."""
    sharding = next((getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)), None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == (DATA, MODEL):
        return _layout(config, sharding.mesh)  # pyright: ignore[reportArgumentType]
    if isinstance(sharding, SingleDeviceSharding):
        here = sharding.device_set == {jax.local_devices()[0]}
        if _is_tpu(sharding) or not here:
            return Layout(chip=sharding)
    return Layout()


def axes_of(state: Any) -> Any:
    """Returns the axes of a loop's state, a dataclass whose fields name them, as ``Layout.jit`` takes them.

    Args:
        state: arrays or abstract arrays with the shapes of one group.
    """
    axes = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if dataclasses.is_dataclass(value):
            axes[field.name] = axes_of(value)
        elif "axes" in field.metadata:
            axes[field.name] = jax.tree.map(functools.partial(_axes, field.metadata["axes"]), value)
    return dataclasses.replace(state, **axes)


def _axes(names: tuple[str | None, ...], leaf: Any) -> Axes:
    sharded: dict[str | None, str] = {"rows": "rows", "kv_heads": "heads"}
    in_front = (None,) * (len(leaf.shape) - len(names))
    if in_front and "kv_heads" not in names:  # a stacked cache has its layers in front, nothing else has
        raise TypeError(f"an array of {len(leaf.shape)} axes is declared with the axes {names}")
    return Axes(PartitionSpec(*in_front, *map(sharded.get, names)), _tpu_order(names, leaf.shape))


def _tpu_order(names: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the order that a loop wants: its last two axes lie in the chip's tiles."""
    if names[-2:] == ("positions", "head_dim"):
        *major, positions, head_dim = range(len(shape))
        minor = (positions, head_dim) if shape[-1] % _LANES == 0 else (head_dim, positions)
        return (*major, *minor)
    if names == ("layers", "tokens", "rows", "hidden"):
        # A single row would be padded to two; its tokens are not.
        return (0, 1, 2, 3) if shape[2] > 1 else (0, 2, 1, 3)
    return None


def _is_tpu(sharding: Sharding | None) -> bool:
    return sharding is not None and next(iter(sharding.device_set)).platform == "tpu"


def bytes_on_device(leaf: Any) -> int:
    """Returns a weight's bytes on each device that has a part of it."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _layout(config: QwenConfig, mesh: Mesh) -> Layout:
    parts = _parts(config)
    return Layout(mesh, frozenset(name for name in parts if parts[name][1] % mesh.shape[MODEL] == 0))


def _parts(config: QwenConfig) -> dict[str, tuple[str, int, str]]:
    """Returns what can be split: its name for a reader, its size, and the unit of that."""
    return {
        "heads": ("attention", config.num_key_value_heads, "KV heads"),
        "mlp": ("MLP", config.intermediate_size, "columns"),
        "vocab": ("vocabulary", config.vocab_size, "tokens"),
    }


def _map_axes(function: Callable[[Axes], Any], axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, Axes))
