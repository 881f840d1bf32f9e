"""Chooses the next token: repetition penalty, then greedy or temperature, top-k, top-p and min-p.

Each sequence and each of its steps has a random key of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32, Key, UInt32

from qwen2_core.inputs import as_float, as_int, one_by_one, whole_number
from qwen2_core.kernels.logits import first_index, likeliest, summarize

_EOS_MULTIPLE = 8  # EOS ids are padded to a multiple of it, so that sets of different sizes share a program
_ROWS_AT_ONCE = 8
_SIGN = np.uint32(1 << 31)
_MINUS_INFINITY = np.uint32(0x007FFFFF)  # the image of -inf: all bits of its float32 flipped


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: penalty, temperature, top-k, top-p and min-p, in Hugging Face's order.

    ``temperature`` 0 is greedy. ``top_k`` 0 keeps every token. ``top_p`` keeps the smallest set of most
    likely tokens whose probabilities sum to at least it. ``min_p`` keeps the tokens of at least that
    share of the likeliest one's probability. Tokens tied with the last one kept are kept.
    ``repetition_penalty`` divides the positive logits of tokens that the prompt or the answer has already,
    and multiplies the negative ones.

    All become traced values: changing them never recompiles. Only the first use of a min_p above 0 and of a
    penalty other than 1 does: programs without them do none of their work.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        temperature, top_k, top_p = as_float(self.temperature), as_int(self.top_k), as_float(self.top_p)
        min_p, penalty = as_float(self.min_p), as_float(self.repetition_penalty)
        if temperature is None or not 0.0 <= temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or a positive number, not {self.temperature!r}."
            )
        if top_k is None or top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or a positive integer, not {self.top_k!r}.")
        if top_p is None or not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p!r}.")
        if min_p is None or not 0.0 <= min_p <= 1.0:
            raise ValueError(f"min_p must be from 0 (all tokens) to 1, not {self.min_p!r}.")
        if penalty is None or not 0.0 < penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be a positive number, 1 for none, not {self.repetition_penalty!r}."
            )
        values = (temperature, top_k, top_p, min_p, penalty)
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @property
    def settings(self) -> dict[str, float]:
        """The values as a store notes them: those of old always, others where they are in use."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name in _ALWAYS or values[name] != _NEUTRAL[name]}

    def describe(self) -> str:
        """Returns it as it is written in code, without what is not in use: "Sampling(temperature=0.7)"."""
        used = [f"{name}={value}" for name, value in vars(self).items() if value != _NEUTRAL[name]]
        return f"Sampling({', '.join(used)})"


_ALWAYS = ("temperature", "top_k", "top_p")
_NEUTRAL = {field.name: field.default for field in dataclasses.fields(Sampling)}


@dataclasses.dataclass(frozen=True)
class SamplingShape:
    """What of sampling decides which programs are compiled; all else is traced."""

    eos_capacity: int = _EOS_MULTIPLE
    min_p: bool = False  # in use
    repetition_penalty: bool = False  # in use: which tokens each sequence has is then carried along


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What decides tokens besides the model and the prompts, as the compiled programs take it.

    Every field is a traced value, or None where it is not in use. ``sampling_params`` makes one of a user's
    ``Sampling``, seed and EOS ids.
    """

    temperature: Float32[Array | np.ndarray, ""]
    top_k: Int32[Array | np.ndarray, ""]
    top_p: Float32[Array | np.ndarray, ""]
    seed: UInt32[Array | np.ndarray, ""]
    eos_token_ids: Int32[Array | np.ndarray, " eos_capacity"]  # padded with -1, which no token is
    min_p: Float32[Array | np.ndarray, ""] | None = None
    repetition_penalty: Float32[Array | np.ndarray, ""] | None = None

    @property
    def shape(self) -> SamplingShape:
        """What of it decides which programs are compiled."""
        penalized = self.repetition_penalty is not None
        return SamplingShape(len(self.eos_token_ids), self.min_p is not None, penalized)


def sampling_params(sampling: Any, seed: Any, eos_token_ids: Any, vocab_size: int) -> SamplingParams:
    """Checks a call's sampling arguments and converts them to the device's types.

    All are kept within float32's normal numbers, as a device may read smaller ones as 0, and the penalty
    within those that take no logit to infinity.

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
    eos = np.full(-(-max(len(ids), 1) // _EOS_MULTIPLE) * _EOS_MULTIPLE, -1, np.int32)
    eos[: len(ids)] = ids
    tiny, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    temperature = 0.0 if sampling.temperature < tiny else min(sampling.temperature, largest)
    min_p, penalty = sampling.min_p, min(max(sampling.repetition_penalty, 1e-30), 1e30)
    return SamplingParams(
        np.array(temperature, np.float32),
        np.array(min(sampling.top_k, 2**31 - 1), np.int32),
        np.array(max(sampling.top_p, tiny), np.float32),
        np.array(seed, np.uint32),
        eos,
        np.array(max(min_p, tiny), np.float32) if min_p > 0 else None,
        np.array(penalty, np.float32) if penalty != 1 else None,
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


def abstract_sampling_params(shape: SamplingShape = SamplingShape()) -> SamplingParams:
    """Returns greedy ``SamplingParams`` of a shape, to compile programs for."""
    zero, one = np.zeros((), np.float32), np.ones((), np.float32)
    no_eos = np.full(shape.eos_capacity, -1, np.int32)
    return SamplingParams(
        zero,
        np.zeros((), np.int32),
        one,
        np.zeros((), np.uint32),
        no_eos,
        min_p=one if shape.min_p else None,
        repetition_penalty=one if shape.repetition_penalty else None,
    )


def tokens_in(
    input_ids: Int32[Array, "rows width"], lengths: Int32[Array, " rows"], vocab_size: int
) -> Bool[Array, "rows vocab"]:
    """Returns which tokens of the vocabulary each right-padded prompt has."""
    rows, width = input_ids.shape
    valid = jnp.arange(width, dtype=jnp.int32) < lengths[:, None]
    tokens = jnp.where(valid, input_ids, vocab_size)  # no token: dropped
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return jnp.zeros((rows, vocab_size), bool).at[row, tokens].set(True, mode="drop")


def with_tokens(
    seen: Bool[Array, "rows vocab"] | None, tokens: Int32[Array, " rows"]
) -> Bool[Array, "rows vocab"] | None:
    """Adds a token of each row to those that it has; None stays None."""
    if seen is None:
        return None
    return seen.at[jnp.arange(len(tokens), dtype=jnp.int32), tokens].set(True)


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
    seen: Bool[Array, "batch vocab"] | None = None,
) -> tuple[Int32[Array, " batch"], Float32[Array, " batch"]]:
    """Chooses one token a row.

    Args:
        logits: of the token to choose.
        sampling: how to choose.
        keys: from ``sequence_keys``; the step is folded in, so no key is used twice.
        step: index of the token being chosen, one for all rows or one a row.
        seen: the tokens that each row has, prompt and answer, where there is a repetition penalty.

    Returns:
        token ids, and their log-probabilities under the model's own distribution (temperature 1, nothing
        filtered, nothing penalized).
    """
    steps = jnp.broadcast_to(step, keys.shape)
    own, model = logits, summarize(logits)
    summary = model
    if sampling.repetition_penalty is not None:
        logits = _penalized(logits, seen, sampling.repetition_penalty)
        summary = summarize(logits)

    def draw() -> Array:
        # A few rows at a time: noise and filters for 64 rows at once would take 100 MB of temporaries.
        rows = (logits, summary.peak, keys, steps)
        return lax.map(lambda row: _draw(*row, sampling=sampling), rows, batch_size=_ROWS_AT_ONCE)

    tokens = lax.cond(sampling.temperature > 0, draw, lambda: likeliest(logits, summary))
    chosen = jnp.take_along_axis(own, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - model.log_sum


def _penalized(logits: Array, seen: Array | None, penalty: Array | np.ndarray) -> Array:
    """Returns logits in which those of tokens seen are nearer to -inf (penalty > 1), as in Transformers."""
    assert seen is not None
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _draw(logits: Array, peak: Array, key: Array, step: Array, sampling: SamplingParams) -> Array:
    """Draws one token of one row ``[vocab]`` by the Gumbel trick, over what the filters keep."""
    noise = jax.random.gumbel(jax.random.fold_in(key, step), logits.shape, jnp.float32, mode="low")
    # Relative to the largest: a tiny temperature takes all others to -inf, and none to +inf.
    scaled = (logits - peak) / sampling.temperature
    scores = jnp.where(logits >= _threshold(logits, peak, sampling), scaled + noise, -jnp.inf)
    return first_index(scores, jnp.max(scores))


def _threshold(logits: Array, peak: Array, sampling: SamplingParams) -> Array:
    """Returns the smallest logit that top-k and then, at the temperature, top-p and min-p keep; -inf where
    all are kept.

    The first two are found exactly: the k-th largest logit, then the one at which the summed probability
    reaches p. Nothing is stored beside the logits; sorting 152k of them would take as long as a decode step.
    """
    top_k = jnp.float32(sampling.top_k)
    kth = _largest_with(logits, top_k, lambda: jnp.ones_like(logits), sampling.top_k > 0)

    def mass() -> Array:
        return jnp.where(logits >= kth, jnp.exp((logits - peak) / sampling.temperature), 0.0)

    at_p = _largest_with(logits, sampling.top_p * jnp.sum(mass()), mass, sampling.top_p < 1)
    kept = jnp.maximum(kth, at_p)
    if sampling.min_p is None:
        return kept
    # exp((logit - peak) / temperature) >= min_p; the likeliest token is among the kept whatever rounding does
    return jnp.maximum(kept, jnp.minimum(peak, peak + sampling.temperature * jnp.log(sampling.min_p)))


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
