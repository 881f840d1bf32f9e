"""Interventions as programs take them: what is compiled apart from the values, which are traced."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Bool, Float32, Int32

from qwen2_core.config import QwenConfig
from qwen2_core.custom_code import Code
from qwen2_core.hook_points import check_point, width_of
from qwen2_core.intervention_values import (
    ValueChecks,
    broadcast,
    finite_numbers,
    point_layers,
    position_numbers,
)
from qwen2_core.interventions import PHASES, Intervention, as_list
from qwen2_core.sharding import ROWS, WHOLE, Layout

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placed:
    """An intervention in a model."""

    kind: type[Intervention] = dataclasses.field(metadata=_STATIC)
    point: str = dataclasses.field(metadata=_STATIC)
    layers: tuple[int | None, ...] = dataclasses.field(metadata=_STATIC)
    code: Code | None = dataclasses.field(metadata=_STATIC)
    values: tuple[Any, ...]  # [layers, ...] each
    phases: Bool[Any, 2]  # whether all positions of the prompt, and all generated ones, are chosen
    listed: Int32[Any, " positions"]  # where a position is in the list of those chosen; -1: it is not

    def reaches(self, lengths: Any) -> Bool[np.ndarray, " prompts"]:
        """Returns which prompts of these lengths it changes, if its strength is not 0."""
        listed = np.flatnonzero(np.asarray(self.listed) >= 0)
        first = listed[0] if len(listed) else np.iinfo(np.int32).max
        return np.asarray(self.phases)[0] | (np.asarray(lengths) > first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steering:
    """All interventions of a batch."""

    placed: tuple[Placed, ...]
    strengths: Float32[Any, "rows interventions"]

    def of_prompt(self, strengths: Any, length: int) -> Float32[np.ndarray, " interventions"]:
        """Returns what a prompt is read with: 0 for what does not reach it, so that it can be shared."""
        reached = [placed.reaches([length])[0] for placed in self.placed]
        return np.where(reached, strengths, 0).astype(np.float32)


STEERING: Any = Steering(WHOLE, ROWS)  # pyright: ignore[reportArgumentType]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """An intervention in one forward pass."""

    placed: Placed
    strength: Float32[Array, "rows tokens"]  # 0 at positions that are not chosen
    index: Int32[Array, "rows tokens"]  # of the position in the list of those chosen, or -1

    def at(self, tokens: Int32[Array, "rows chosen"]) -> Edit:
        """Returns it for chosen tokens of the pass alone."""
        strength, index = (jnp.take_along_axis(of, tokens, axis=1) for of in (self.strength, self.index))
        return Edit(self.placed, strength, index)

    def apply(
        self, x: Float32[Array, "rows tokens width"], slot: int | Array, chosen: bool | Array
    ) -> Float32[Array, "rows tokens width"]:
        """Returns x with the intervention done, exactly x where the strength is 0.

        Args:
            x: the point's value in one layer.
            slot: which of the intervention's layers that is.
            chosen: whether it is one of them at all.
        """
        if isinstance(slot, int):
            strength, values = self.strength, tuple(value[slot] for value in self.placed.values)
        else:
            strength = jnp.where(chosen, self.strength, 0)
            values = tuple(
                lax.dynamic_index_in_dim(jnp.asarray(value), slot, keepdims=False)
                for value in self.placed.values
            )
        if self.placed.code is not None:
            values = (self.placed.code,)
        s = strength[..., None]
        return jnp.where(s == 0, x, self.placed.kind.edit(x, s, values, self.index))


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


def steer(interventions: Any, config: QwenConfig, rows: int | None) -> Steering | None:
    """Checks interventions against a model, and turns them into arrays.

    Args:
        interventions: one or several, or None; what this has returned stays as it is.
        config: the model's.
        rows: sequences of the batch; None: each has the same strength, and one row is returned.

    Raises:
        ValueError: one sentence that names the intervention, what is wrong with it and what it must be.
    """
    if isinstance(interventions, Steering):
        return interventions
    found = as_list(interventions)
    if not found:
        return None
    placed = tuple(_place(one, config) for one in found)
    strengths = [_strength(one, rows) for one in found]
    stack = jnp.stack if any(isinstance(one, Tracer) for one in strengths) else np.stack
    return Steering(placed, stack(strengths, axis=1))


def abstract_steering(layout: Layout, placed: tuple[Placed, ...], rows: int) -> Steering:
    """Returns interventions as abstract arguments of a program for so many rows in each group of devices."""
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), placed)
    return Steering(placed, layout.struct((rows, len(placed)), jnp.float32, ROWS))


def steer_prompts(steering: Steering, prompts: int) -> Steering:
    """Returns interventions of P prompts, in place of those of their samples."""
    strengths = np.asarray(steering.strengths)
    return dataclasses.replace(steering, strengths=strengths.reshape(prompts, -1, strengths.shape[1])[:, 0])


def check_prompt_strengths(steering: Steering | None, lengths: Int32[np.ndarray, " prompts"]) -> None:
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
        if (differ[:, number] & placed.reaches(lengths)).any():
            name = placed.kind.__name__
            raise ValueError(
                f"{name}.strength differs among the samples of a prompt, which is read once for all of them: "
                'choose positions="generated", or repeat the prompt with samples_per_prompt=1.'
            )


def _place(one: Intervention, config: QwenConfig) -> Placed:
    name, most = type(one).__name__, config.context_length
    point = check_point(one.point)
    layers = point_layers(f"{name}.layers", point, one.layers, config.num_hidden_layers)
    checks = ValueChecks(name, config, len(layers), width_of(point, config))
    everywhere = one.positions in ("all", *PHASES)
    listed = [] if everywhere else position_numbers(f"{name}.positions", one.positions)
    if max(listed, default=0) >= most:
        raise ValueError(f"{name}.positions holds {max(listed)}, and the model's context has {most}.")
    index = np.full(most, -1, np.int32)
    index[listed] = np.arange(len(listed))
    phases = np.array([one.positions in ("all", phase) for phase in PHASES])
    return Placed(type(one), point, layers, one.code(checks), one.values(checks), phases, index)


def _strength(one: Intervention, rows: int | None) -> Any:
    name = f"{type(one).__name__}.strength"
    given = finite_numbers(name, one.strength)
    if given.shape not in ((), (rows,)):
        each = ": each request has its own" if rows is None else f", or one for each of the {rows} rows"
        raise ValueError(f"{name} must be one number{each}; it is of shape {list(given.shape)}.")
    return broadcast(given, (rows or 1,))
