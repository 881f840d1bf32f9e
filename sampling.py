"""Choosing the next token: greedy, temperature, top-k, top-p, with one random key per sequence and step."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


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
        return SamplingArrays(
            np.float32(self.temperature), np.int32(min(self.top_k, 2**31 - 1)), np.float32(self.top_p)
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

    def draw() -> Array:
        steps = jnp.broadcast_to(step, keys.shape)
        noise = jax.vmap(
            lambda key, at: jax.random.gumbel(jax.random.fold_in(key, at), logits.shape[-1:], jnp.float32)
        )(keys, steps)
        scaled = _filter(logits / sampling.temperature, sampling)
        return jnp.argmax(scaled + noise, axis=-1)

    tokens = lax.cond(sampling.temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1)).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _filter(logits: Array, sampling: SamplingArrays) -> Array:
    """Sets what top-k and then top-p leave out to -inf."""
    by_k = lax.cond(
        sampling.top_k > 0,
        lambda: _keep_top(logits, jnp.ones_like(logits), jnp.float32(sampling.top_k)),
        lambda: logits,
    )
    return lax.cond(
        sampling.top_p < 1,
        lambda: _keep_top(by_k, jax.nn.softmax(by_k, axis=-1), jnp.float32(sampling.top_p)),
        lambda: by_k,
    )


def _keep_top(logits: Array, weights: Array, amount: Array) -> Array:
    """Keeps, per row, the largest logits whose weights reach ``amount`` together.

    The threshold is found exactly, bit by bit, in the order-preserving integer image of float32:
    32 passes over the row, where sorting 152k logits would take the time of a decode step.
    """
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def refine(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(ordered >= candidate[:, None], weights, 0.0), axis=-1) >= amount
        return jnp.where(reached, candidate, threshold)

    threshold = lax.fori_loop(0, 32, refine, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(ordered >= threshold[:, None], logits, -jnp.inf)
