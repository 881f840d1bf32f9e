"""Chooses the next token: greedy, temperature, top-k, top-p, with one random key per sequence and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32, Int32, Key, UInt32

from qwen2_core.inputs import as_float, as_int, one_by_one, whole_number

_EOS_MULTIPLE = 8  # EOS ids are padded to a multiple of it, so that sets of different sizes share a program
_ROWS_AT_ONCE = 8
_SIGN = np.uint32(1 << 31)
_MINUS_INFINITY = np.uint32(0x007FFFFF)  # the image of -inf: all bits of its float32 flipped


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature, then top-k, then top-p, in Hugging Face's order.

    ``temperature`` 0 is greedy. ``top_k`` 0 keeps every token. ``top_p`` keeps the smallest set of most
    likely tokens whose probabilities sum to at least it. Tokens tied with the last one kept are kept. All
    three become traced values: changing them never recompiles.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        temperature, top_k, top_p = as_float(self.temperature), as_int(self.top_k), as_float(self.top_p)
        if temperature is None or not 0.0 <= temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or a positive number, not {self.temperature!r}."
            )
        if top_k is None or top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or a positive integer, not {self.top_k!r}.")
        if top_p is None or not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p!r}.")
        for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
            object.__setattr__(self, name, value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What decides tokens besides the model and the prompts, as the compiled programs take it.

    Every field is a traced value. ``sampling_params`` makes one of a user's ``Sampling``, seed and EOS ids.
    """

    temperature: Float32[Array | np.ndarray, ""]
    top_k: Int32[Array | np.ndarray, ""]
    top_p: Float32[Array | np.ndarray, ""]
    seed: UInt32[Array | np.ndarray, ""]
    eos_token_ids: Int32[Array | np.ndarray, " eos_capacity"]  # padded with -1, which no token is


def sampling_params(sampling: Any, seed: Any, eos_token_ids: Any, vocab_size: int) -> SamplingParams:
    """Checks a call's sampling arguments and converts them to the device's types.

    Temperature and top_p are kept within float32's normal numbers: a device may read smaller ones as 0.

    Args:
        sampling: a ``Sampling``.
        seed: an integer.
        eos_token_ids: integers of any kind; a single one, and None for none, will do.
        vocab_size: the model's.

    Raises:
        ValueError: no ``Sampling``, a seed outside 0 to 2**32 - 1, or an EOS id that is no token of the
            vocabulary.
    """
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling, such as Sampling(temperature=0.7), not {sampling!r}.")
    seed = whole_number("seed", seed, 0, 2**32 - 1)
    ids = _eos_ids(eos_token_ids, vocab_size)
    eos = np.full(eos_capacity(len(ids)), -1, np.int32)
    eos[: len(ids)] = ids
    tiny, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    temperature = 0.0 if sampling.temperature < tiny else min(sampling.temperature, largest)
    return SamplingParams(
        np.array(temperature, np.float32),
        np.array(min(sampling.top_k, 2**31 - 1), np.int32),
        np.array(max(sampling.top_p, tiny), np.float32),
        np.array(seed, np.uint32),
        eos,
    )


def _eos_ids(given: Any, vocab_size: int) -> list[int]:
    if given is None:
        return []
    refusal = f"eos_token_ids must be token ids, not {given!r}; tokenizer.eos_token_id is one."
    ids = []
    for token in one_by_one(given, refusal):
        number = as_int(token)
        if number is None:
            raise ValueError(f"EOS token id {token!r} is no integer; does the tokenizer have an EOS token?")
        if not 0 <= number < vocab_size:
            raise ValueError(f"EOS token id {number} is outside the vocabulary of {vocab_size}.")
        ids.append(number)
    return ids


def eos_capacity(count: int) -> int:
    """Returns the number that so many EOS ids are padded to; programs are compiled for that number."""
    return -(-max(count, 1) // _EOS_MULTIPLE) * _EOS_MULTIPLE


def abstract_sampling_params(capacity: int = _EOS_MULTIPLE) -> SamplingParams:
    """Returns greedy ``SamplingParams`` with room for ``capacity`` EOS ids, to compile programs for."""
    zero, one = np.zeros((), np.float32), np.ones((), np.float32)
    no_eos = np.full(capacity, -1, np.int32)
    return SamplingParams(zero, np.zeros((), np.int32), one, np.zeros((), np.uint32), no_eos)


def sequence_keys(
    seed: UInt32[Array | np.ndarray, ""], sequence_ids: UInt32[Array | np.ndarray, " batch"]
) -> Key[Array, " batch"]:
    """Derives each sequence's key from the run's seed and its own id, whatever else is in its batch."""
    # As jax.random.key(seed), but for the process's settings: its generator, its seed offset, its 64 bits.
    words = jnp.stack([jnp.zeros((), jnp.uint32), jnp.asarray(seed)])
    base = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.vmap(lambda sequence_id: jax.random.fold_in(base, sequence_id))(sequence_ids)


def sample_tokens(
    logits: Float32[Array, "batch vocab"],
    sampling: SamplingParams,
    keys: Key[Array, " batch"],
    step: int | Int32[Array, "*batch"],
) -> tuple[Int32[Array, " batch"], Float32[Array, " batch"]]:
    """Chooses one token a row.

    Args:
        logits: of the token to choose.
        sampling: how to choose.
        keys: from ``sequence_keys``; the step is folded in, so no key is used twice.
        step: index of the token being chosen, one for all rows or one a row.

    Returns:
        token ids, and their log-probabilities under the model's own distribution (temperature 1, nothing
        filtered).
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
    """Returns the first index of ``peak``, the largest value of the last axis; the last index for NaN."""
    # A plain reduction over float32 indices (exact below 2**24): XLA on CPU runs argmax, and a minimum of
    # integers, as scalar code, which takes 11 and 19 ms for 32 rows of a vocabulary; maximum and this, 4.
    last = values.shape[-1] - 1
    index = lax.broadcasted_iota(jnp.float32, values.shape, values.ndim - 1)
    return jnp.min(jnp.where(values == peak[..., None], index, last), -1).astype(jnp.int32)


def _draw(logits: Array, peak: Array, key: Array, step: Array, sampling: SamplingParams) -> Array:
    """Draws one token of one row ``[vocab]`` by the Gumbel trick, over what top-k and top-p keep."""
    noise = jax.random.gumbel(jax.random.fold_in(key, step), logits.shape, jnp.float32, mode="low")
    # Relative to the largest: a tiny temperature takes all others to -inf, and none to +inf.
    scaled = (logits - peak) / sampling.temperature
    scores = jnp.where(logits >= _threshold(logits, peak, sampling), scaled + noise, -jnp.inf)
    return _first(scores, jnp.max(scores))


def _threshold(logits: Array, peak: Array, sampling: SamplingParams) -> Array:
    """Returns the smallest logit that top-k and then, at the temperature, top-p keep; -inf where all are
    kept.

    Both are found exactly: the k-th largest logit, then the one at which the summed probability reaches p.
    Nothing is stored beside the logits; sorting 152k of them would take as long as a decode step.
    """
    top_k = jnp.float32(sampling.top_k)
    kth = _largest_with(logits, top_k, lambda: jnp.ones_like(logits), sampling.top_k > 0)

    def mass() -> Array:
        return jnp.where(logits >= kth, jnp.exp((logits - peak) / sampling.temperature), 0.0)

    at_p = _largest_with(logits, sampling.top_p * jnp.sum(mass()), mass, sampling.top_p < 1)
    return jnp.maximum(kth, at_p)


def _largest_with(
    logits: Array, needed: Array | np.ndarray, weights: Callable[[], Array], wanted: Array | np.ndarray
) -> Array:
    """Returns the largest logit at or above which the weights sum to ``needed``; -inf if it is not
    ``wanted``.

    It is found bit by bit, in an integer image of float32 that keeps the order.
    """

    def refine(i: Array, found: Array) -> Array:
        candidate = found | (_SIGN >> i.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(logits >= _as_float(candidate), weights(), 0.0)) >= needed
        return jnp.where(reached, candidate, found)

    return _as_float(lax.fori_loop(0, jnp.where(wanted, 32, 0), refine, jnp.uint32(0)))


def _as_float(image: Array) -> Array:
    """Converts an ordered image back to float32. Images below that of -inf, of NaNs, count as -inf."""
    image = jnp.maximum(image, _MINUS_INFINITY)
    negative = image >> 31 == 0
    return lax.bitcast_convert_type(jnp.where(negative, ~image, image ^ _SIGN), jnp.float32)
