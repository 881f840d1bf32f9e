"""Choosing the next token: greedy, temperature, top-k, top-p, with one random key per sequence and step."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_ROWS_AT_ONCE = 8
_SIGN = np.uint32(1 << 31)
_MINUS_INFINITY = np.uint32(0x007FFFFF)  # the image of -inf: all bits of its float32 flipped


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, applied in this order (as Hugging Face does).

    ``temperature`` 0 is greedy; ``top_k`` 0 keeps every token; ``top_p`` keeps the smallest set of most
    likely tokens whose probabilities sum to at least it. Tokens tied with the last one kept are kept.
    All three are traced: changing them never recompiles.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}.")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"top_k must be 0 (all tokens) or a positive integer, not {self.top_k}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}.")

    def traced(self) -> SamplingArrays:
        """In the device's types, at their ends: below float32's normal numbers a device may read 0."""
        tiny, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
        temperature = 0.0 if self.temperature < tiny else min(self.temperature, largest)
        return SamplingArrays(
            np.float32(temperature),
            np.int32(min(self.top_k, 2**31 - 1)),
            np.float32(max(self.top_p, tiny)),
        )


class SamplingArrays(NamedTuple):
    """``Sampling`` as scalars inside a compiled program."""

    temperature: Array | np.float32
    top_k: Array | np.int32
    top_p: Array | np.float32


def sequence_keys(seed: Array | np.uint32, sequence_ids: Array) -> Array:
    """[B] keys from the run's seed and each sequence's own id, whatever else is in its batch."""
    base = jax.random.key(seed)
    return jax.vmap(lambda sequence_id: jax.random.fold_in(base, sequence_id))(sequence_ids)


def sample_tokens(
    logits: Array, sampling: SamplingArrays, keys: Array, step: int | Array
) -> tuple[Array, Array]:
    """One token a row.

    Args:
        logits: [B, vocab] float32.
        keys: [B] from ``sequence_keys``; the step is folded in, so no key is used twice.
        step: index of the token being chosen, a scalar or [B].

    Returns:
        token ids [B] int32, and their log-probabilities [B] float32 under the model's own distribution
        (temperature 1, nothing filtered).
    """
    steps = jnp.broadcast_to(step, keys.shape)

    def draw() -> Array:
        # A few rows at a time: noise and filters for 64 rows at once would take 100 MB of temporaries.
        return lax.map(
            lambda row: _draw(row[0], row[1], row[2], sampling),
            (logits, keys, steps),
            batch_size=_ROWS_AT_ONCE,
        )

    tokens = lax.cond(sampling.temperature > 0, draw, lambda: _argmax(logits))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _argmax(values: Array) -> Array:
    """The first index of the largest value along the last axis, int32; the last index where one is NaN."""
    # Two plain reductions, the second over float32 indices (exact below 2**24): XLA on CPU runs argmax, and
    # a minimum of integers, as scalar code, which takes 11 and 19 ms for 32 rows of a vocabulary; this, 4.
    last = values.shape[-1] - 1
    index = lax.broadcasted_iota(jnp.float32, values.shape, values.ndim - 1)
    is_largest = values == jnp.max(values, -1, keepdims=True)
    return jnp.min(jnp.where(is_largest, index, last), -1).astype(jnp.int32)


def _draw(logits: Array, key: Array, step: Array, sampling: SamplingArrays) -> Array:
    """One token of one row ``[vocab]``, by the Gumbel trick over what top-k and top-p keep."""
    noise = jax.random.gumbel(jax.random.fold_in(key, step), logits.shape, jnp.float32)
    # Relative to the largest: a tiny temperature takes all others to -inf, and none to +inf.
    scaled = (logits - jnp.max(logits)) / sampling.temperature
    kept = logits >= _threshold(logits, sampling)
    return _argmax(jnp.where(kept, scaled + noise, -jnp.inf))


def _threshold(logits: Array, sampling: SamplingArrays) -> Array:
    """The smallest logit kept by top-k and then, at the temperature, top-p; -inf where all are.

    The thresholds are found exactly, bit by bit, in the order-preserving integer image of float32: passes
    0 to 31 look for the k-th largest logit, passes 32 to 63 for the one at which the probability reaches
    p. Nothing is stored beside the logits; sorting 152k of them would take as long as a decode step.
    """
    peak = jnp.max(logits)

    def refine(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        by_count, by_mass = found
        counting = i < 32
        candidate = jnp.where(counting, by_count, by_mass) | (_SIGN >> (i % 32).astype(jnp.uint32))
        mass = jnp.where(logits >= _as_float(by_count), jnp.exp((logits - peak) / sampling.temperature), 0.0)
        weights = jnp.where(counting, 1.0, mass)
        needed = jnp.where(counting, jnp.float32(sampling.top_k), sampling.top_p * jnp.sum(weights))
        reached = jnp.sum(jnp.where(logits >= _as_float(candidate), weights, 0.0)) >= needed
        found_now = jnp.where(reached, candidate, jnp.where(counting, by_count, by_mass))
        return jnp.where(counting, found_now, by_count), jnp.where(counting, by_mass, found_now)

    first = jnp.where(sampling.top_k > 0, 0, 32)
    last = jnp.where(sampling.top_p < 1, 64, 32)
    nothing = jnp.uint32(0)
    by_count, by_mass = lax.fori_loop(first, last, refine, (nothing, nothing))
    return jnp.maximum(_as_float(by_count), _as_float(by_mass))


def _as_float(image: Array) -> Array:
    """The float32 of an ordered image; those below the image of -inf (NaNs) count as -inf."""
    image = jnp.maximum(image, _MINUS_INFINITY)
    negative = image >> 31 == 0
    return lax.bitcast_convert_type(jnp.where(negative, ~image, image ^ _SIGN), jnp.float32)
