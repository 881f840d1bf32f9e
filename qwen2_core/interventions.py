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
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from qwen2_core.custom_code import Code
from qwen2_core.hook_points import HEAD_OUTPUTS
from qwen2_core.inputs import as_int, one_by_one, plain
from qwen2_core.intervention_values import ValueChecks

PHASES = ("prompt", "generated")
Values = tuple[Any, ...]  # arrays whose first axis are the layers; of one layer in ``edit``


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

    def values(self, checks: ValueChecks) -> Values:
        """Returns its checked values."""
        raise NotImplementedError

    def code(self, checks: ValueChecks) -> Code | None:
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

    def values(self, checks: ValueChecks) -> Values:
        """Returns the vector."""
        return (checks.by_layer("vector", self.vector),)

    @staticmethod
    def edit(x: Array, s: Array, values: Values, index: Array) -> Array:
        """Returns ``x + s * vector``."""
        return x + s * values[0]


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

    def values(self, checks: ValueChecks) -> Values:
        """Returns the direction, of length 1."""
        direction = checks.by_layer("direction", self.direction)
        norm = (direction**2).sum(-1, keepdims=True) ** 0.5
        if not isinstance(norm, Tracer) and not norm.all():
            raise ValueError("ProjectOut.direction is zero: it must point somewhere.")
        return (direction / norm,)

    @staticmethod
    def edit(x: Array, s: Array, values: Values, index: Array) -> Array:
        """Returns ``x - s * (x . direction) * direction``."""
        direction = values[0]
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

    def values(self, checks: ValueChecks) -> Values:
        """Returns the rows [layers, rows, width] and what of them counts [layers, 1]."""
        rows = checks.by_position("value", self.value, self.positions)
        return rows, np.ones((checks.layers, 1), np.float32)

    @staticmethod
    def edit(x: Array, s: Array, values: Values, index: Array) -> Array:
        """Returns ``(1 - s) * x + s * value`` where the mask is 1: exactly the value at strength 1."""
        rows, mask = values
        value = rows[0] if len(rows) == 1 else rows[jnp.maximum(index, 0)]
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
    point: ClassVar[str] = HEAD_OUTPUTS  # pyright: ignore[reportIncompatibleVariableOverride]
    edit = Replace.edit

    def __post_init__(self) -> None:
        super().__post_init__()
        refusal = f"AblateHeads.heads must be head numbers such as [0, 3], not {self.heads!r}."
        heads = tuple(as_int(one) for one in one_by_one(self.heads, refusal))
        if not heads or None in heads:
            raise ValueError(refusal)
        object.__setattr__(self, "heads", heads)

    def values(self, checks: ValueChecks) -> Values:
        """Returns the rows [layers, 1, width] and a mask [layers, width]."""
        heads, dim = checks.config.num_attention_heads, checks.config.head_dim
        outside = [head for head in self.heads if not 0 <= head < heads]
        if outside:
            raise ValueError(
                f"AblateHeads.heads {outside} are out of range: the model has heads 0 to {heads - 1}."
            )
        mask = np.zeros((checks.layers, heads, dim), np.float32)
        mask[:, list(self.heads)] = 1
        value = self.value
        if not isinstance(value, Tracer) and np.ndim(plain(value)) == 0:
            value = np.full(heads * dim, plain(value))
        return checks.by_layer("value", value)[:, None], mask.reshape(checks.layers, -1)


class _OfFeature(Intervention):
    """A feature of a sparse autoencoder: ``a = relu((x - decoder_bias) . encoder + encoder_bias)``."""

    encoder: Any
    decoder: Any
    encoder_bias: Any
    decoder_bias: Any

    def _values(self, checks: ValueChecks, scale: Any, value: Any) -> Values:
        width_or_number = self.decoder_bias
        if not isinstance(width_or_number, Tracer) and np.ndim(plain(width_or_number)) == 0:
            width_or_number = np.full(checks.width, plain(width_or_number))
        return (
            checks.by_layer("encoder", self.encoder),
            checks.by_layer("decoder", self.decoder),
            checks.numbers("encoder_bias", self.encoder_bias),
            checks.by_layer("decoder_bias", width_or_number),
            checks.numbers("scale", scale),
            checks.numbers("value", value),
        )

    @staticmethod
    def edit(x: Array, s: Array, values: Values, index: Array) -> Array:
        """Returns ``x + s * (scale * a + value - a) * decoder``."""
        encoder, decoder, encoder_bias, decoder_bias, scale, value = values
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

    def values(self, checks: ValueChecks) -> Values:
        """Returns the feature's vectors and biases, scale and 0."""
        return self._values(checks, self.scale, 0.0)


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

    def values(self, checks: ValueChecks) -> Values:
        """Returns the feature's vectors and biases, 0 and the value."""
        return self._values(checks, 0.0, self.value)


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

    def values(self, checks: ValueChecks) -> Values:
        """Returns nothing: all is in the code."""
        return ()

    def code(self, checks: ValueChecks) -> Code | None:
        """Returns the traced function."""
        return Code.of(self.fn, checks.width)

    @staticmethod
    def edit(x: Array, s: Array, values: Values, index: Array) -> Array:
        """Returns ``(1 - s) * x + s * fn(x)``."""
        (code,) = values
        return (1 - s) * x + s * code(x)


INTERVENTIONS = (Add, ProjectOut, Replace, ScaleFeature, ClampFeature, AblateHeads, Custom)


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
