"""Choosing the next token: greedy, temperature, top-k, top-p, with one random key per sequence and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
    peak = jnp.max(logits, -1)  # every further reading of 152k logits shows in a step's time

    def draw() -> Array:
        # A few rows at a time: noise and filters for 64 rows at once would take 100 MB of temporaries.
        rows = (logits, peak, keys, steps)
        return lax.map(lambda row: _draw(*row, sampling=sampling), rows, batch_size=_ROWS_AT_ONCE)

    tokens = lax.cond(sampling.temperature > 0, draw, lambda: _first(logits, peak))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - (peak + jnp.log(jnp.sum(jnp.exp(logits - peak[:, None]), -1)))


def _first(values: Array, peak: Array) -> Array:
    """The first index of ``peak``, the largest along the last axis, int32; the last where one is NaN."""
    # A plain reduction over float32 indices (exact below 2**24): XLA on CPU runs argmax, and a minimum of
    # integers, as scalar code, which takes 11 and 19 ms for 32 rows of a vocabulary; maximum and this, 4.
    last = values.shape[-1] - 1
    index = lax.broadcasted_iota(jnp.float32, values.shape, values.ndim - 1)
    return jnp.min(jnp.where(values == peak[..., None], index, last), -1).astype(jnp.int32)


def _draw(logits: Array, peak: Array, key: Array, step: Array, sampling: SamplingArrays) -> Array:
    """One token of one row ``[vocab]``, by the Gumbel trick over what top-k and top-p keep."""
    noise = jax.random.gumbel(jax.random.fold_in(key, step), logits.shape, jnp.float32)
    # Relative to the largest: a tiny temperature takes all others to -inf, and none to +inf.
    scaled = (logits - peak) / sampling.temperature
    scores = jnp.where(logits >= _threshold(logits, peak, sampling), scaled + noise, -jnp.inf)
    return _first(scores, jnp.max(scores))


def _threshold(logits: Array, peak: Array, sampling: SamplingArrays) -> Array:
    """The smallest logit kept by top-k and then, at the temperature, top-p; -inf where all are.

    Both are found exactly: the k-th largest logit, and then the one at which the probability reaches p.
    Nothing is stored beside the logits; sorting 152k of them would take as long as a decode step.
    """
    top_k = jnp.float32(sampling.top_k)
    kth = _largest_with(logits, top_k, lambda: jnp.ones_like(logits), sampling.top_k > 0)

    def mass() -> Array:
        return jnp.where(logits >= kth, jnp.exp((logits - peak) / sampling.temperature), 0.0)

    at_p = _largest_with(logits, sampling.top_p * jnp.sum(mass()), mass, sampling.top_p < 1)
    return jnp.maximum(kth, at_p)


def _largest_with(
    logits: Array, needed: Array, weights: Callable[[], Array], wanted: Array | np.bool_
) -> Array:
    """The largest logit above or at which the weights sum to ``needed``; -inf if it is not ``wanted``.

    Found bit by bit, in the order-preserving integer image of float32.
    """

    def refine(i: Array, found: Array) -> Array:
        candidate = found | (_SIGN >> i.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(logits >= _as_float(candidate), weights(), 0.0)) >= needed
        return jnp.where(reached, candidate, found)

    return _as_float(lax.fori_loop(0, jnp.where(wanted, 32, 0), refine, jnp.uint32(0)))


def _as_float(image: Array) -> Array:
    """The float32 of an ordered image; those below the image of -inf (NaNs) count as -inf."""
    image = jnp.maximum(image, _MINUS_INFINITY)
    negative = image >> 31 == 0
    return lax.bitcast_convert_type(jnp.where(negative, ~image, image ^ _SIGN), jnp.float32)
