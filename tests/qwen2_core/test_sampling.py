"""Sampling: which tokens may be chosen, how often, and on what the random numbers depend."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_core.sampling import (
    Sampling,
    SamplingParams,
    sample_tokens,
    sampling_params,
    sequence_keys,
    tokens_in,
    with_tokens,
)

DRAWS = 20_000

sample = jax.jit(sample_tokens)
keys_of = jax.jit(sequence_keys)


def traced(sampling: Sampling) -> SamplingParams:
    return sampling_params(sampling, 0, (), vocab_size=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def exact_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities of every token of one row, by sorting; ties with the last token kept are kept."""
    scaled = logits.astype(np.float64) / sampling.temperature
    keep = np.exp(scaled - scaled.max()) >= sampling.min_p * (1 - 1e-6)
    if sampling.top_k:
        keep &= scaled >= np.sort(scaled)[::-1][min(sampling.top_k, len(scaled)) - 1]
    probabilities = softmax(np.where(keep, scaled, -np.inf))
    if sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        enough = np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p)
        keep &= probabilities >= probabilities[order[enough]]
    return softmax(np.where(keep, scaled, -np.inf))


def draw(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Tokens of ``DRAWS`` sequences that all see the same logits."""
    keys = keys_of(np.uint32(1), np.arange(DRAWS, dtype=np.uint32))
    tokens, _ = sample(np.tile(logits, (DRAWS, 1)), traced(sampling), keys, 0)
    return np.asarray(tokens)


LOGITS = np.random.default_rng(0).normal(scale=2, size=24).astype(np.float32)
TIED = np.array([3, 1, 2, 2, 2, 0, -1, 2.5], np.float32)


@pytest.mark.parametrize(
    ("logits", "sampling"),
    [
        (LOGITS, Sampling(1.0)),
        (LOGITS, Sampling(0.5)),
        (LOGITS, Sampling(2.0)),
        (LOGITS, Sampling(1.0, top_k=5)),
        (LOGITS, Sampling(1.0, top_p=0.7)),
        (LOGITS, Sampling(1.3, top_k=6, top_p=0.8)),
        (LOGITS, Sampling(0.8, top_k=10**12, top_p=0.999)),
        (TIED, Sampling(1.0, top_k=3)),  # three tokens tie for the third place
        (TIED, Sampling(1.0, top_p=0.75)),
        (LOGITS, Sampling(1.0, min_p=0.1)),
        (LOGITS, Sampling(2.0, min_p=0.02)),
        (LOGITS, Sampling(1.3, top_k=6, top_p=0.95, min_p=0.3)),
        (TIED, Sampling(1.0, min_p=np.exp(-1.0))),  # three tokens tie with the last one kept
        (TIED, Sampling(2e-38)),  # what is left is the largest alone
        (np.array([1, 2, 2, 2, 1, 1, 1, 1], np.float32), Sampling(2e-38)),  # or several, equally likely
        (LOGITS, Sampling(1e300)),  # more than float32 can hold: all are equally likely
    ],
    ids=str,
)
def test_tokens_come_as_often_as_the_exact_distribution_says(logits: np.ndarray, sampling: Sampling):
    expected = exact_distribution(logits, sampling)
    counts = np.bincount(draw(logits, sampling), minlength=len(logits))
    assert not counts[expected == 0].any()
    kept = expected > 0
    deviation = np.sqrt(DRAWS * expected * (1 - expected)) + 1e-9
    assert (np.abs(counts - DRAWS * expected) / np.maximum(deviation, 1))[kept].max() < 4.5
    assert counts[expected > 0.001].all()


def test_ties_with_the_last_token_kept_are_kept():
    assert set(draw(TIED, Sampling(1.0, top_k=3))) == {0, 2, 3, 4, 7}
    assert set(draw(TIED, Sampling(1.0, top_k=2))) == {0, 7}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, top_k=1),
        Sampling(0.7, top_p=1e-6),
        Sampling(0.7, top_p=1e-300),
        # A logit divided by these overflows float32; the last two are no normal float32 themselves.
        *(Sampling(temperature) for temperature in (1e-4, 1e-30, 2e-38, 1e-38, 1e-44, 1e-300)),
        Sampling(1e-38, top_k=5, top_p=0.9),
        Sampling(0.7, min_p=1.0),
        Sampling(1e-38, min_p=1e-300),
    ],
    ids=str,
)
def test_what_leaves_one_token_is_greedy(sampling: Sampling):
    assert set(draw(10 * LOGITS, sampling)) == {int(LOGITS.argmax())}


def test_greedy_is_the_largest_logit_the_first_of_equals_and_needs_no_luck():
    logits = np.random.default_rng(1).normal(size=(50, 30)).astype(np.float32)
    logits[7, [4, 20]] = 9.0
    outs = []
    for seed in (0, 1):
        keys = keys_of(np.uint32(seed), np.arange(50, dtype=np.uint32))
        outs.append(np.asarray(sample(logits, traced(Sampling()), keys, seed)[0]))
    np.testing.assert_array_equal(outs[0], logits.argmax(-1))
    np.testing.assert_array_equal(outs[0], outs[1])
    assert outs[0].dtype == np.int32
    assert outs[0][7] == 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.3, top_k=2)], ids=str)
def test_logprobs_are_the_models_own_whatever_the_filter(sampling: Sampling):
    logits = np.random.default_rng(2).normal(scale=3, size=(50, 30)).astype(np.float32)
    keys = keys_of(np.uint32(3), np.arange(50, dtype=np.uint32))
    tokens, logprobs = sample(logits, traced(sampling), keys, 5)
    np.testing.assert_allclose(logprobs, np.log(softmax(logits))[np.arange(50), tokens], atol=1e-5)


# --- Tokens that a sequence has -----------------------------------------------------------------------------

PENALTIES = [1.3, 0.6, 1e300, 1e-300]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_divides_positive_logits_of_tokens_seen_and_multiplies_negative_ones(penalty: float):
    logits = np.random.default_rng(4).normal(scale=3, size=(50, 30)).astype(np.float32)
    seen = np.random.default_rng(5).random((50, 30)) < 0.3
    keys = keys_of(np.uint32(3), np.arange(50, dtype=np.uint32))
    sampling = Sampling(repetition_penalty=penalty)
    tokens, logprobs = sample(logits, traced(sampling), keys, 5, seen)
    changed = np.where(logits < 0, logits.astype(np.float64) * penalty, logits.astype(np.float64) / penalty)
    np.testing.assert_array_equal(tokens, np.where(seen, changed, logits).argmax(-1))
    np.testing.assert_allclose(logprobs, np.log(softmax(logits))[np.arange(50), tokens], atol=1e-5)
    np.testing.assert_array_equal(tokens, sample(logits, traced(sampling), keys, 5, jnp.array(seen))[0])


def test_a_penalty_comes_before_temperature_and_filters():
    seen = np.array([False, True] * 12)
    penalized = np.where(seen, np.where(LOGITS < 0, LOGITS * 1.4, LOGITS / 1.4), LOGITS).astype(np.float32)
    sampling = Sampling(1.3, top_k=9, top_p=0.9, min_p=0.02)
    keys = keys_of(np.uint32(1), np.arange(DRAWS, dtype=np.uint32))
    with_penalty = dataclasses.replace(sampling, repetition_penalty=1.4)
    tokens, _ = sample(np.tile(LOGITS, (DRAWS, 1)), traced(with_penalty), keys, 0, np.tile(seen, (DRAWS, 1)))
    np.testing.assert_array_equal(tokens, draw(penalized, sampling))


def test_padding_is_no_token_of_a_prompt_and_a_chosen_token_is_one_more():
    ids = np.array([[5, 2, 2, 7, 0], [1, 3, 0, 6, 6]], np.int32)
    seen = tokens_in(jnp.array(ids), jnp.array([4, 2]), 9)
    np.testing.assert_array_equal(np.argwhere(seen), [[0, 2], [0, 5], [0, 7], [1, 1], [1, 3]])
    more = with_tokens(seen, jnp.array([2, 8]))
    assert more is not None
    np.testing.assert_array_equal(np.argwhere(more), [[0, 2], [0, 5], [0, 7], [1, 1], [1, 3], [1, 8]])


def test_settings_of_old_are_noted_always_and_the_others_where_they_are_in_use():
    assert Sampling().settings == {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    assert Sampling(0.7, 20, 0.8, min_p=0.1, repetition_penalty=1.1).settings == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
    }
    assert list(Sampling(repetition_penalty=1.1).settings) == [
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
    ]


# --- Keys ---------------------------------------------------------------------------------------------------


def uniform_tokens(seed: int, ids: list[int], step: int | list[int]) -> list[int]:
    """One draw each from 100,000 equally likely tokens: two different keys hardly ever agree."""
    keys = keys_of(np.uint32(seed), np.array(ids, np.uint32))
    logits = np.zeros((len(ids), 100_000), np.float32)
    tokens, _ = sample(
        logits, traced(Sampling(1.0)), keys, np.broadcast_to(np.array(step, np.int32), len(ids))
    )
    return np.asarray(tokens).tolist()


def test_every_sequence_every_step_and_every_seed_has_its_own_key():
    draws = [
        token
        for seed in range(5)
        for step in range(8)
        for token in uniform_tokens(seed, [0, 1, 2, 2**32 - 1], step)
    ]
    assert len(set(draws)) > 0.9 * len(draws)
    for step in range(20):  # (sequence, step) and (step, sequence) are different keys
        assert uniform_tokens(0, [step], step + 1) != uniform_tokens(0, [step + 1], step)


def test_a_sequences_tokens_do_not_depend_on_its_batch():
    together = uniform_tokens(7, [5, 6, 7, 8], 3)
    assert uniform_tokens(7, [8, 5], 3) == [together[3], together[0]]
    assert uniform_tokens(7, [6], 3) == [together[1]]
    assert uniform_tokens(7, [6, 6], [3, 4])[0] == together[1]  # nor on the steps of the others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_k": 1.5}, "top_k must be 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p must be in \(0, 1\]"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\]"),
        ({"min_p": -0.1}, "min_p must be from 0"),
        ({"min_p": 1.1}, "min_p must be from 0"),
        ({"min_p": float("nan")}, "min_p must be from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number"),
        ({"repetition_penalty": -1}, "repetition_penalty must be a positive number"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be a positive number"),
        ({"repetition_penalty": "1.1"}, "repetition_penalty must be a positive number"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(arguments: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)  # type: ignore[arg-type]


def test_greedy_takes_the_first_of_equal_logits_in_a_whole_vocabulary():
    logits = np.full((3, 151936), -2.0, np.float32)
    logits[0, [151935, 151934]] = 1.5
    logits[1, 77_777] = -1.0
    keys = keys_of(np.uint32(0), np.arange(3, dtype=np.uint32))
    tokens, _ = sample(logits, traced(Sampling()), keys, 0)
    np.testing.assert_array_equal(tokens, [151934, 77_777, 0])
