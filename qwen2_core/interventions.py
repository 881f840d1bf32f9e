"""Interventions: values that change what a forward pass computes at a hook point, row by row.

    steer = Add("hook_resid_post", 12, vector, strength=[0.0, 4.0, 8.0], positions="generated")
    out = generate_single_task_jitted(model, params, input_ids, 64, interventions=[steer])

All have one form: in float32, ``y = x + strength * (target(x) - x)`` at the chosen positions of a row, and
exactly x everywhere else. So a row of strength 0 is the clean run, to the last bit. Several at one point are
done in the order in which they are given.

Point and layers are static. All numbers and positions are traced: changing them never recompiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float32, Int32

from qwen2_core.config import QwenConfig
from qwen2_core.custom_code import Code
from qwen2_core.hook_points import HEAD_OUTPUTS, LN_FINAL, check_point, width_of
from qwen2_core.inputs import as_int, layer_numbers, one_by_one, plain

PHASES = ("prompt", "generated")
Values = tuple[Any, ...]  # arrays whose first axis are the layers


def _static(**kwargs: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **kwargs)


def _intervention(cls: Any) -> Any:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls))


class Intervention:
    """What all interventions share.

    Attributes:
        point: name of a hook point without its layer.
        layers: a number or several; True for all; None for a point of the model.
        strength: one number, or one for each row of the batch. 0 leaves a row as it is.
        positions: "all", "prompt", "generated", or a list of positions in the sequence, the first token's 0.
    """

    point: Any
    layers: Any
    strength: Any
    positions: Any
    edit: ClassVar[Callable[..., Array]]

    def __post_init__(self) -> None:
        for name in ("layers", "positions"):  # hashable
            given = plain(getattr(self, name))
            if isinstance(given, Iterable) and not isinstance(given, str):
                given = tuple(as_int(one) if as_int(one) is not None else one for one in given)
            object.__setattr__(self, name, given)

    def __repr__(self) -> str:
        """Says where it is, without the values."""
        return f"{type(self).__name__}({self.point}, layers {self.layers}, positions {self.positions})"

    def values(self, size: _Size) -> Values:
        """Returns its checked values."""
        raise NotImplementedError

    def code(self, size: _Size) -> Code | None:
        """Returns the user's code, if it has any."""
        return None


@_intervention
class Add(Intervention):
    """Adds ``strength * vector`` (steering). ``vector`` is [width], or [layers, width]."""

    point: Any = _static()
    layers: Any = _static()
    vector: Any
    strength: Any = 1.0
    positions: Any = _static(default="all")

    def values(self, size: _Size) -> Values:
        """Returns the vector."""
        return (size.by_layer("vector", self.vector),)

    @staticmethod
    def edit(x: Array, s: Array, edit: Edit) -> Array:
        """Returns ``x + s * vector``."""
        return x + s * edit.values[0]


@_intervention
class ProjectOut(Intervention):
    """Takes away the part along ``direction`` (directional ablation): [width], or [layers, width].

    Strength 1 takes all of it away, 2 mirrors it. The direction's length does not matter.
    """

    point: Any = _static()
    layers: Any = _static()
    direction: Any
    strength: Any = 1.0
    positions: Any = _static(default="all")

    def values(self, size: _Size) -> Values:
        """Returns the direction, of length 1."""
        direction = size.by_layer("direction", self.direction)
        norm = (direction**2).sum(-1, keepdims=True) ** 0.5
        if not isinstance(norm, Tracer) and not norm.all():
            raise ValueError("ProjectOut.direction is zero: it must point somewhere.")
        return (direction / norm,)

    @staticmethod
    def edit(x: Array, s: Array, edit: Edit) -> Array:
        """Returns ``x - s * (x . direction) * direction``."""
        direction = edit.values[0]
        return x - s * (x * direction).sum(-1, keepdims=True) * direction


@_intervention
class Replace(Intervention):
    """Replaces by given values, such as another run's rows (activation patching).

    ``values`` is [width] or [layers, width]. Where ``positions`` is a list of n, it may be [n, width] or
    [layers, n, width] instead: one row for each position. Then two axes always mean [n, width].
    """

    point: Any = _static()
    layers: Any = _static()
    value: Any
    strength: Any = 1.0
    positions: Any = _static(default="all")

    def values(self, size: _Size) -> Values:
        """Returns the rows [layers, rows, width] and what of them counts [layers, 1]."""
        rows = size.by_position("value", self.value, self.positions)
        return rows, np.ones((size.layers, 1), np.float32)

    @staticmethod
    def edit(x: Array, s: Array, edit: Edit) -> Array:
        """Returns ``(1 - s) * x + s * value`` where the mask is 1: exactly the value at strength 1."""
        rows, mask = edit.values
        value = rows[0] if len(rows) == 1 else rows[jnp.maximum(edit.index, 0)]
        s = s * mask
        return (1 - s) * x + s * value


@_intervention
class AblateHeads(Intervention):
    """Replaces the output of attention heads (``attn.hook_z``) by zeros or by a mean.

    ``heads`` are numbers. ``value`` is one number, or all heads' [heads * head_dim], or
    [layers, heads * head_dim].
    """

    layers: Any = _static()
    heads: Any = _static()
    value: Any = 0.0
    strength: Any = 1.0
    positions: Any = _static(default="all")
    point: ClassVar[str] = HEAD_OUTPUTS
    edit = Replace.edit

    def __post_init__(self) -> None:
        super().__post_init__()
        refusal = f"AblateHeads.heads must be head numbers such as [0, 3], not {self.heads!r}."
        heads = tuple(as_int(one) for one in one_by_one(self.heads, refusal))
        if not heads or None in heads:
            raise ValueError(refusal)
        object.__setattr__(self, "heads", heads)

    def values(self, size: _Size) -> Values:
        """Returns the rows [layers, 1, width] and a mask [layers, width]."""
        heads, dim = size.config.num_attention_heads, size.config.head_dim
        outside = [head for head in self.heads if not 0 <= head < heads]
        if outside:
            raise ValueError(
                f"AblateHeads.heads {outside} are out of range: the model has {heads} heads, 0 to {heads - 1}."
            )
        mask = np.zeros((size.layers, heads, dim), np.float32)
        mask[:, list(self.heads)] = 1
        value = self.value
        if not isinstance(value, Tracer) and np.ndim(plain(value)) == 0:
            value = np.full(heads * dim, plain(value))
        return size.by_layer("value", value)[:, None], mask.reshape(size.layers, -1)


class _OfFeature(Intervention):
    """A feature of a sparse autoencoder: ``a = relu((x - decoder_bias) . encoder + encoder_bias)``."""

    encoder: Any
    decoder: Any
    encoder_bias: Any
    decoder_bias: Any

    def _values(self, size: _Size, scale: Any, value: Any) -> Values:
        width_or_number = self.decoder_bias
        if not isinstance(width_or_number, Tracer) and np.ndim(plain(width_or_number)) == 0:
            width_or_number = np.full(size.width, plain(width_or_number))
        return (
            size.by_layer("encoder", self.encoder),
            size.by_layer("decoder", self.decoder),
            size.numbers("encoder_bias", self.encoder_bias),
            size.by_layer("decoder_bias", width_or_number),
            size.numbers("scale", scale),
            size.numbers("value", value),
        )

    @staticmethod
    def edit(x: Array, s: Array, edit: Edit) -> Array:
        """Returns ``x + s * (scale * a + value - a) * decoder``."""
        encoder, decoder, encoder_bias, decoder_bias, scale, value = edit.values
        a = jax.nn.relu(((x - decoder_bias) * encoder).sum(-1, keepdims=True) + encoder_bias)
        return x + s * (scale * a + value - a) * decoder


@_intervention
class ScaleFeature(_OfFeature):
    """Multiplies a feature of a sparse autoencoder by ``scale``; what the autoencoder misses stays.

    ``encoder`` and ``decoder`` are the feature's column and row, [width] or [layers, width]. The feature is
    ``relu((x - decoder_bias) . encoder + encoder_bias)``. ``decoder_bias`` is [width] or a number.
    """

    point: Any = _static()
    layers: Any = _static()
    encoder: Any
    decoder: Any
    scale: Any
    encoder_bias: Any = 0.0
    decoder_bias: Any = 0.0
    strength: Any = 1.0
    positions: Any = _static(default="all")

    def values(self, size: _Size) -> Values:
        """Returns the feature's vectors and biases, scale and 0."""
        return self._values(size, self.scale, 0.0)


@_intervention
class ClampFeature(_OfFeature):
    """Sets a feature of a sparse autoencoder to ``value``; all else as ``ScaleFeature``."""

    point: Any = _static()
    layers: Any = _static()
    encoder: Any
    decoder: Any
    value: Any
    encoder_bias: Any = 0.0
    decoder_bias: Any = 0.0
    strength: Any = 1.0
    positions: Any = _static(default="all")

    def values(self, size: _Size) -> Values:
        """Returns the feature's vectors and biases, 0 and the value."""
        return self._values(size, 0.0, self.value)


@_intervention
class Custom(Intervention):
    """Replaces by ``fn(x)``, a function in pure JAX of one token's values: [width] float32 to the same.

    It is part of the program: what it computes, constants included, decides what is compiled.
    """

    point: Any = _static()
    layers: Any = _static()
    fn: Callable[[Array], Array] = _static()
    strength: Any = 1.0
    positions: Any = _static(default="all")

    def values(self, size: _Size) -> Values:
        """Returns nothing: all is in the code."""
        return ()

    def code(self, size: _Size) -> Code | None:
        """Returns the traced function."""
        return Code.of(self.fn, size.width)

    @staticmethod
    def edit(x: Array, s: Array, edit: Edit) -> Array:
        """Returns ``(1 - s) * x + s * fn(x)``."""
        assert edit.placed.code is not None
        return (1 - s) * x + s * edit.placed.code(x)


INTERVENTIONS = (Add, ProjectOut, Replace, ScaleFeature, ClampFeature, AblateHeads, Custom)


# --- As programs take them ----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placed:
    """An intervention as programs take it: what is compiled, and arrays."""

    kind: type[Intervention] = _static()
    point: str = _static()
    layers: tuple[int | None, ...] = _static()
    code: Code | None = _static()
    values: Values  # [layers, ...] each
    phases: Bool[Any, 2]  # whether all positions of the prompt, and all generated ones, are chosen
    listed: Int32[Any, " positions"]  # where a position is in the list of those chosen; -1: it is not


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steering:
    """All interventions of a batch."""

    placed: tuple[Placed, ...]
    strengths: Float32[Any, "rows interventions"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """An intervention in one forward pass."""

    placed: Placed
    strength: Float32[Array, "rows tokens"]  # 0 at positions that are not chosen
    index: Int32[Array, "rows tokens"]  # of the position in the list of those chosen, or -1

    @property
    def values(self) -> Values:
        """The values of all layers, or of one (``of_layer``)."""
        return self.placed.values

    def of_layer(self, slot: int | Array, chosen: bool | Array) -> Edit:
        """Returns it with the values of one layer, which ``slot`` counts; of strength 0 if not ``chosen``."""
        if isinstance(slot, int):
            values = tuple(value[slot] for value in self.values)
            return dataclasses.replace(self, placed=dataclasses.replace(self.placed, values=values))
        values = tuple(
            jax.lax.dynamic_index_in_dim(jnp.asarray(value), slot, keepdims=False) for value in self.values
        )
        return dataclasses.replace(
            self,
            placed=dataclasses.replace(self.placed, values=values),
            strength=jnp.where(chosen, self.strength, 0),
        )

    def apply(self, x: Float32[Array, "rows tokens width"]) -> Float32[Array, "rows tokens width"]:
        """Returns x with the intervention done, exactly x where the strength is 0."""
        s = self.strength[..., None]
        return jnp.where(s == 0, x, self.placed.kind.edit(x, s, self))


def edits(
    steering: Steering, positions: Int32[Array, "rows tokens"], generated: Bool[Array, "rows tokens"]
) -> tuple[Edit, ...]:
    """Returns the interventions of a forward pass over tokens at these positions.

    Args:
        steering: what is to be done.
        positions: of each token in its sequence.
        generated: whether the token was generated, and is not the prompt's.
    """
    found = []
    for placed, strengths in zip(steering.placed, jnp.asarray(steering.strengths).T, strict=True):
        index = jnp.asarray(placed.listed).at[positions].get(mode="fill", fill_value=-1)
        phases = jnp.asarray(placed.phases)
        chosen = (index >= 0) | jnp.where(generated, phases[1], phases[0])
        found.append(Edit(placed, jnp.where(chosen, strengths[:, None], 0), index))
    return tuple(found)


def steer(
    interventions: Any, config: QwenConfig, rows: int, capacity: int | None = None
) -> Steering | None:
    """Checks interventions against a model, and turns them into arrays.

    Args:
        interventions: one or several, or None.
        config: the model's.
        rows: sequences of the batch.
        capacity: positions of the longest possible sequence; by default as many as are listed.

    Raises:
        ValueError: one sentence that names the intervention, what is wrong with it and what it must be.
    """
    if isinstance(interventions, Steering):
        return interventions
    found = as_list(interventions)
    if not found:
        return None
    placed = tuple(_place(one, config, capacity) for one in found)
    strengths = [_strength(one, rows) for one in found]
    stack = jnp.stack if any(isinstance(one, Tracer) for one in strengths) else np.stack
    return Steering(placed, stack(strengths, axis=1))


def steer_prompts(steering: Steering | None, prompts: int) -> Steering | None:
    """Returns interventions of P prompts, in place of those of their samples."""
    if steering is None:
        return None
    strengths = np.asarray(steering.strengths)
    return dataclasses.replace(steering, strengths=strengths.reshape(prompts, -1, strengths.shape[1])[:, 0])


def reaches_prompt(placed: Placed, lengths: Any) -> Bool[np.ndarray, " prompts"]:
    """Returns which prompts of these lengths an intervention changes."""
    listed = np.flatnonzero(np.asarray(placed.listed) >= 0)
    return np.asarray(placed.phases)[0] | (np.asarray(lengths) > listed.min(initial=np.iinfo(np.int32).max))


def check_prompt_strengths(steering: Steering | None, lengths: Any) -> None:
    """Checks that the samples of a prompt agree on what is done to it: they share one prefill.

    Raises:
        ValueError: they do not.
    """
    if steering is None:
        return
    strengths = np.asarray(steering.strengths)
    by_prompt = strengths.reshape(len(lengths), -1, strengths.shape[1])
    differ = (by_prompt != by_prompt[:, :1]).any(1)
    for number, placed in enumerate(steering.placed):
        if (differ[:, number] & reaches_prompt(placed, lengths)).any():
            name = placed.kind.__name__
            raise ValueError(
                f"{name}.strength differs among the samples of a prompt, which read it together: give "
                f'{name} positions="generated", or each strength a prompt of its own (samples_per_prompt=1).'
            )


def as_list(interventions: Any) -> list[Any]:
    """Returns interventions as a list.

    Raises:
        ValueError: something among them is none.
    """
    if interventions is None:
        return []
    alone = isinstance(interventions, INTERVENTIONS) or not isinstance(interventions, Iterable)
    found = [interventions] if alone else list(interventions)
    for one in found:
        if not isinstance(one, INTERVENTIONS):
            names = ", ".join(kind.__name__ for kind in INTERVENTIONS)
            raise ValueError(f"interventions must be a list of {names}, and {type(one).__name__} is none.")
    return found


def _place(one: Any, config: QwenConfig, capacity: int | None) -> Placed:
    name = type(one).__name__
    size = _Size(name, config, len(layers := _layers(one, config)), width_of(one.point, config))
    phases = np.array([one.positions in ("all", phase) for phase in PHASES])
    listed = [] if isinstance(one.positions, str) else _positions(one)
    if capacity is None:
        capacity = max(listed, default=0) + 1
    elif max(listed, default=0) >= capacity:
        raise ValueError(
            f"{name}.positions holds {max(listed)}, and no sequence has more than {capacity} positions."
        )
    index = np.full(capacity, -1, np.int32)
    index[listed] = np.arange(len(listed))
    return Placed(type(one), one.point, layers, one.code(size), one.values(size), phases, index)


def _layers(one: Any, config: QwenConfig) -> tuple[int | None, ...]:
    name, depth = type(one).__name__, config.num_hidden_layers
    return point_layers(f"{name}.layers", check_point(one.point), one.layers, depth)


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


def _positions(one: Any) -> list[int]:
    name, given = f"{type(one).__name__}.positions", one.positions
    refusal = f'{name} must be "all", "prompt", "generated" or a list of positions from 0, not {given!r}.'
    found = [as_int(position) for position in one_by_one(given, refusal)]
    if not found or any(position is None or position < 0 for position in found):
        raise ValueError(refusal)
    if len(set(found)) != len(found):
        raise ValueError(f"{name} names a position twice.")
    return found  # pyright: ignore[reportReturnType]


def _strength(one: Any, rows: int) -> Any:
    name = f"{type(one).__name__}.strength"
    given = _numbers(name, one.strength)
    if given.shape not in ((), (rows,)):
        raise ValueError(
            f"{name} must be one number, or one for each of the {rows} rows, not of shape {given.shape}."
        )
    return jnp.broadcast_to(given, rows) if isinstance(given, Tracer) else np.broadcast_to(given, rows)


def _numbers(name: str, given: Any) -> Any:
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
class _Size:
    """What an intervention's values must fit."""

    name: str  # the intervention's
    config: QwenConfig
    layers: int
    width: int

    def numbers(self, field: str, given: Any) -> Any:
        """Returns [layers, 1] of one number, or of one for each layer."""
        array = self._of_shapes(field, given, ((), (self.layers,)))
        return _broadcast(array, (self.layers,))[:, None]

    def by_layer(self, field: str, given: Any) -> Any:
        """Returns [layers, width] of [width] or [layers, width]."""
        shape = (self.layers, self.width)
        return _broadcast(self._of_shapes(field, given, (shape[1:], shape)), shape)

    def by_position(self, field: str, given: Any, positions: Any) -> Any:
        """Returns [layers, 1 or more, width]; there are more rows than positions, up to a power of two."""
        if isinstance(positions, str) or np.ndim(given) == 1:
            return self.by_layer(field, given)[:, None]
        rows = len(positions) if isinstance(positions, Sequence) else 1
        shape = (self.layers, rows, self.width)
        one_row = (self.layers, 1, self.width)
        array = self._of_shapes(field, given, (shape[1:], shape, one_row, shape[2:]))
        if array.shape == one_row or rows == 1:
            return _broadcast(array, one_row)
        padded = 1 << (rows - 1).bit_length()
        pad = jnp.pad if isinstance(array, Tracer) else np.pad
        return pad(_broadcast(array, shape), ((0, 0), (0, padded - rows), (0, 0)))

    def _of_shapes(self, field: str, given: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
        array = _numbers(f"{self.name}.{field}", given)
        if array.shape not in shapes:
            wanted = " or ".join(str(list(shape)) if shape else "one number" for shape in dict.fromkeys(shapes))
            raise ValueError(f"{self.name}.{field} must be {wanted}, not of shape {list(array.shape)}.")
        return array


def _broadcast(array: Any, shape: tuple[int, ...]) -> Any:
    return (jnp if isinstance(array, Tracer) else np).broadcast_to(array, shape)
