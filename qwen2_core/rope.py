"""Rotary position embeddings (Su et al. 2021), plain or stretched to longer contexts.

A head's numbers are taken in pairs, and pair i of a token at position p is rotated by the angle ``p * f_i``.
The frequencies f fall from 1 to 1 / theta. A model that was trained on short texts reads longer ones if its
frequencies are lowered. Each way of doing so is a ``rope_type`` of Transformers, and a class here.

Two of them, "dynamic" and "longrope", choose the frequencies by the length of the text. That is the number of
tokens up to the last one of the forward pass that reads the token: a prompt's length, then for each generated
token its position plus one. It is a sequence's own, whatever else is in its batch.

Frequencies and angles are float32, bit for bit those of Transformers: a model is computed as it is computed
elsewhere. Float32 shows at far positions: with theta 1e6 an angle at 131,072 is off by up to 0.01 rad, at
1,000,000 by up to 0.065.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32, Int

from qwen2_core.errors import CheckpointError
from qwen2_core.kernels.platforms import by_platform

Frequencies = Float32[np.ndarray, " half"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Says how a model's frequencies differ from the plain ones; ``rope_config`` reads the right class."""

    rope_type: ClassVar[str]
    original_max_position_embeddings: int  # the context that the frequencies were made for
    factor: float = 1.0  # how many times as long the context is
    attention_factor: float = 1.0  # cosine and sine are multiplied by it

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return False

    @property
    def context_length(self) -> int:
        """The number of positions that the frequencies serve."""
        return int(self.factor * self.original_max_position_embeddings)

    def check(self, theta: float, head_dim: int) -> None:
        """Raises CheckpointError where this does not fit the model."""

    def frequencies(self, theta: float, head_dim: int) -> Frequencies:
        """Returns the frequencies at the lengths of the original context."""
        raise NotImplementedError

    def frequencies_at(
        self, theta: float, head_dim: int, lengths: Int[Array, "batch tokens"] | None
    ) -> Frequencies | Float32[Array, "batch tokens half"]:
        """Returns the frequencies of each token, or of all; ``lengths`` are those of their texts."""
        return self.frequencies(theta, head_dim)


class Linear(RopeScaling):
    """Divides all frequencies by one factor ("position interpolation", Chen et al. 2023)."""

    rope_type = "linear"

    def frequencies(self, theta: float, head_dim: int) -> Frequencies:
        """Returns the frequencies."""
        return plain_frequencies(theta, head_dim) / np.float32(self.factor)


class Dynamic(RopeScaling):
    """Raises theta with the length of the text, from the original context on ("dynamic NTK", bloc97 2023)."""

    rope_type = "dynamic"

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return True

    def check(self, theta: float, head_dim: int) -> None:
        """Raises CheckpointError where this does not fit the model."""
        if head_dim <= 2:
            raise CheckpointError(f"RoPE of type 'dynamic' needs a head_dim of at least 4, not {head_dim}.")

    def frequencies(self, theta: float, head_dim: int) -> Frequencies:
        """Returns the frequencies at the lengths of the original context."""
        return plain_frequencies(theta, head_dim)

    def frequencies_at(
        self, theta: float, head_dim: int, lengths: Int[Array, "batch tokens"] | None
    ) -> Frequencies | Float32[Array, "batch tokens half"]:
        """Returns the frequencies of each token; ``lengths`` are those of their texts."""
        assert lengths is not None
        original = self.original_max_position_embeddings
        beyond = jnp.maximum(lengths - original, 0)[..., None].astype(jnp.float32)
        growth = 1 + np.float32(self.factor) * beyond / np.float32(original)
        # theta times growth ** (d / (d - 2)), as a product that is exact to the last bits.
        theta_then = np.float32(theta) * growth * growth ** np.float32(2 / (head_dim - 2))
        grown = 1 / theta_then ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
        return jnp.where(beyond > 0, grown, plain_frequencies(theta, head_dim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(RopeScaling):
    """Divides the low frequencies and keeps the high ones, with a ramp between (Peng et al. 2023).

    Pairs that turn more than ``beta_fast`` times within the original context are kept, those that turn less
    than ``beta_slow`` times are divided.
    """

    rope_type = "yarn"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp begins and ends at whole pairs

    def check(self, theta: float, head_dim: int) -> None:
        """Raises CheckpointError where this does not fit the model."""
        if theta == 1:
            raise CheckpointError("RoPE of type 'yarn' needs another rope_theta than 1.")

    def frequencies(self, theta: float, head_dim: int) -> Frequencies:
        """Returns the frequencies."""
        first, last = (self._pair(turns, theta, head_dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first or 0.001
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
        kept = 1 - np.clip(ramp, 0, 1)
        wavelengths = _wavelengths(theta, head_dim)
        return 1 / (np.float32(self.factor) * wavelengths) * (1 - kept) + 1 / wavelengths * kept

    def _pair(self, turns: float, theta: float, head_dim: int) -> float:
        """Returns the pair that turns so many times within the original context."""
        wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(RopeScaling):
    """Divides the low frequencies and keeps the high ones, as in Llama 3.1 (Dubey et al. 2024).

    Wavelengths above the original context / ``low_freq_factor`` are stretched, those below it /
    ``high_freq_factor`` are kept.
    """

    rope_type = "llama3"
    low_freq_factor: float
    high_freq_factor: float

    def frequencies(self, theta: float, head_dim: int) -> Frequencies:
        """Returns the frequencies."""
        plain = plain_frequencies(theta, head_dim)
        factor, original = np.float32(self.factor), self.original_max_position_embeddings
        wavelengths = 1 / plain * np.float32(2 * math.pi)  # torch divides a number by an array like this
        is_long = wavelengths > np.float32(original / self.low_freq_factor)
        is_short = wavelengths < np.float32(original / self.high_freq_factor)
        span = np.float32(self.high_freq_factor - self.low_freq_factor)
        kept = (1 / wavelengths * np.float32(original) - np.float32(self.low_freq_factor)) / span
        between = (1 - kept) * plain / factor + kept * plain
        return np.where(is_long, plain / factor, np.where(is_short, plain, between))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(RopeScaling):
    """Divides each frequency by a number of its own: one set within the original context, one beyond it.

    LongRoPE: Ding et al. 2024.
    """

    rope_type = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return True

    def check(self, theta: float, head_dim: int) -> None:
        """Raises CheckpointError where this does not fit the model."""
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != head_dim // 2:
                raise CheckpointError(
                    f"RoPE of type 'longrope' needs a {name} of {head_dim // 2} numbers (head_dim / 2), not "
                    f"{len(getattr(self, name))}."
                )

    def frequencies(self, theta: float, head_dim: int) -> Frequencies:
        """Returns the frequencies at the lengths of the original context."""
        return self._divided(self.short_factor, theta, head_dim)

    def frequencies_at(
        self, theta: float, head_dim: int, lengths: Int[Array, "batch tokens"] | None
    ) -> Frequencies | Float32[Array, "batch tokens half"]:
        """Returns the frequencies of each token; ``lengths`` are those of their texts."""
        assert lengths is not None
        is_long = lengths[..., None] > self.original_max_position_embeddings
        long = self._divided(self.long_factor, theta, head_dim)
        return jnp.where(is_long, long, self.frequencies(theta, head_dim))

    @staticmethod
    def _divided(by: tuple[float, ...], theta: float, head_dim: int) -> Frequencies:
        return 1 / (np.array(by, np.float32) * _wavelengths(theta, head_dim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional(RopeScaling):
    """Rotates only the first share of the pairs, and divides their frequencies by one factor."""

    rope_type = "proportional"
    partial_rotary_factor: float = 1.0

    def frequencies(self, theta: float, head_dim: int) -> Frequencies:
        """Returns the frequencies; 0 for pairs that are not rotated."""
        rotated = np.arange(head_dim // 2) < int(self.partial_rotary_factor * head_dim // 2)
        return np.where(rotated, plain_frequencies(theta, head_dim), 0) / np.float32(self.factor)


def plain_frequencies(theta: float, head_dim: int) -> Frequencies:
    """Returns the frequencies of RoPE as it was published."""
    return 1 / _wavelengths(theta, head_dim)


def _wavelengths(theta: float, head_dim: int) -> Frequencies:
    # In float32 to be bit-equal to Transformers': at position 8000 one ulp is 3e-4 rad. The power is rounded
    # from float64: numpy's own of float32 is some ulp off on CPUs with AVX-512.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (np.float64(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)


# --- Angles and rotations ---------------------------------------------------------------------------------


def rope_angles(
    positions: Int[Array, "batch tokens"],
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    lengths: Int[Array, "batch tokens"] | None = None,
) -> tuple[Float32[Array, "batch tokens half"], Float32[Array, "batch tokens half"]]:
    """Computes cosine and sine of the rotary angles, ``half`` = head_dim / 2.

    Args:
        lengths: of the text that each token is read in, where ``scaling.follows_length``.
    """
    if scaling is None:
        frequencies = plain_frequencies(theta, head_dim)
    else:
        frequencies = scaling.frequencies_at(theta, head_dim, lengths)
    angles = positions[..., None].astype(jnp.float32) * frequencies

    def scaled(x: Array) -> Array:
        factor = 1 if scaling is None else scaling.attention_factor
        return x if factor == 1 else np.float32(factor) * x

    return _once(scaled(jnp.cos(angles))), _once(scaled(jnp.sin(angles)))


def _once(x: Array) -> Array:
    """Returns x; on CPU as a product, which XLA computes once, and not anew in each layer and head."""

    def product(x: Array) -> Array:
        return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=lax.Precision.HIGHEST)

    return by_platform(x, cpu=product, default=lambda x: x)


def apply_rope(
    x: Float[Array, "batch tokens heads head_dim"],
    cos: Float32[Array, "batch tokens half"],
    sin: Float32[Array, "batch tokens half"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotates queries or keys in float32. The first half of each head is paired with the second half."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
