"""Drafts: where they are copied from, which of their tokens stay, and that sampling stays what it is."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generate_jitted import DecodeState
from kvcache_utils import KVCacheConfig, advance_ar_index, create_kv_cache_buffers
from qwen2_core import drafts
from qwen2_core.sampling import Sampling, sample_tokens, sampling_params, sequence_keys

# --- Where a draft is copied from ---------------------------------------------------------------------------


def copied(text: list[int], count: int) -> list[int]:
    """The draft in plain Python."""
    best, place = 0, 1
    for after in range(1, len(text)):
        n = 0
        while n < min(after, drafts.MATCHED_TOKENS) and text[after - 1 - n] == text[-1 - n]:
            n += 1
        if n > best:
            best, place = n, after
    rest = text[place:] or text
    return list(itertools.islice(itertools.cycle(rest), count))


@functools.partial(jax.jit, static_argnums=2)
def find_draft(history: Any, length: Any, count: int) -> Any:
    return drafts.find_draft(history, length, count)


def found(text: list[int], count: int, garbage: int = 7) -> list[int]:
    history = np.full(64, garbage, np.int32)
    history[: len(text)] = text
    return find_draft(history, len(text), count).tolist()


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9, 1]),  # what followed 1 2
        ([5, 2, 8, 8, 1, 2, 3, 3, 5, 1, 2], [3, 3, 5, 1]),  # the longer match, not the first 2
        ([1, 2, 3, 1, 2, 4, 0, 1, 2], [3, 1, 2, 4]),  # of two alike, the first
        ([4, 6, 4, 6], [4, 6, 4, 6]),  # what lies between is repeated
        ([3, 3], [3, 3, 3, 3]),
        ([3], [3, 3, 3, 3]),
        ([1, 2, 3, 4], [2, 3, 4, 2]),  # said nowhere before
    ],
)
def test_a_draft_is_what_followed_the_last_tokens_the_first_time(text: list[int], draft: list[int]):
    assert found(text, 4) == draft


def test_drafts_of_random_texts_are_those_of_a_plain_search_whatever_lies_past_the_end():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = rng.integers(0, rng.integers(2, 6), rng.integers(1, 60)).tolist()
        assert found(text, 5) == found(text, 5, garbage=1) == copied(text, 5), text


# --- Which of its tokens stay -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "chosen", "room", "stay"),
    [
        ([5, 1, 2, 3], [1, 2, 3, 8], 9, 4),  # all of them, and 8 is next
        ([5, 1, 2, 3], [1, 2, 4, 8], 9, 3),
        ([5, 1, 2, 3], [2, 2, 3, 8], 9, 1),  # that later ones agree is no help
        ([5, 1, 2, 3], [1, 2, 3, 8], 2, 2),  # no more than max_tokens
        ([5, 0, 2, 3], [0, 2, 3, 8], 9, 2),  # 0 ends the sequence, and is the last token
        ([0, 1, 2, 3], [1, 2, 3, 8], 9, 1),
    ],
)
def test_draft_tokens_stay_up_to_the_first_that_was_not_chosen_an_end_or_the_room(
    tokens: list[int], chosen: list[int], room: int, stay: int
):
    read = jnp.array(tokens)
    assert int(drafts.tokens_that_stay(read, jnp.array(chosen), read == 0, jnp.int32(room))) == stay


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("index", "stay"), [(0, 1), (0, 4), (3, 2), (5, 3), (7, 1)])
def test_only_columns_of_tokens_that_stay_are_written(dtype: Any, axis: int, index: int, stay: int):
    buffer = jnp.arange(24).reshape(3, 8).astype(dtype)
    values = 100 + jnp.arange(12).reshape(3, 4).astype(dtype)
    if axis == 0:
        buffer, values = buffer.T, values.T
    expected = np.array(buffer)
    cut = np.s_[:, index : index + stay] if axis else np.s_[index : index + stay]
    expected[cut] = values[:, :stay] if axis else values[:stay]
    written = jax.jit(drafts.write_columns, static_argnums=2)(buffer, values, axis, index, stay)
    assert written.dtype == dtype
    np.testing.assert_array_equal(written, expected)


def test_a_penalty_counts_the_tokens_read_up_to_each_one():
    seen = jnp.zeros((1, 6), bool).at[0, 4].set(True)
    after = drafts.seen_after_each(seen, jnp.array([1, 3, 1], jnp.int32))
    np.testing.assert_array_equal(after, [[0, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 0], [0, 1, 0, 1, 1, 0]])
    assert drafts.seen_after_each(None, jnp.array([1], jnp.int32)) is None


# --- Sampling stays what it is ------------------------------------------------------------------------------

VOCAB, LENGTH = 4, 4  # 256 possible answers
# A chain of tokens in place of a model: the logits after a token are a row of this table.
TABLE = np.random.default_rng(3).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 1.2
PROMPT = np.array([[0, 1, 1, 2, 0, 3, 1]], np.int32)
SEQUENCES = 20_000
CHANCE = 5  # standard deviations; wrong rules are 20 and more away


def read(tokens: Any, cache: Any) -> Any:
    logits = jnp.asarray(TABLE)[tokens]
    return SimpleNamespace(logits=logits, cache=advance_ar_index(cache, tokens.shape[1])), (None, {})


@functools.partial(jax.jit, static_argnums=2)
def answers(sampling: Any, sequence_ids: Any, draft_tokens: int) -> Any:
    """Tokens [sequences, LENGTH], of many sequences side by side."""

    def one(sequence_id: Any) -> Any:
        keys = sequence_keys(sampling.seed, sequence_id[None])
        cache = create_kv_cache_buffers(KVCacheConfig(1, 1, 1, PROMPT.shape[1], LENGTH + draft_tokens))
        prefill = dataclasses.replace(cache.prefill, length=jnp.full(1, PROMPT.shape[1], jnp.int32))
        logits = jnp.asarray(TABLE)[PROMPT[:, -1]]
        token, logprob = sample_tokens(logits, sampling, keys, 0)
        state = DecodeState(
            cache=dataclasses.replace(cache, prefill=prefill),
            next_token=token,
            next_logprob=logprob,
            ended=jnp.zeros(1, bool),
            token_ids=jnp.zeros((1, LENGTH), jnp.int32),
            logprobs=jnp.zeros((1, LENGTH), jnp.float32),
            lengths=jnp.zeros(1, jnp.int32),
            activations=None,
            history=drafts.start_history(jnp.asarray(PROMPT), LENGTH, draft_tokens),
        )
        return drafts.decode_with_drafts(read, draft_tokens, state, sampling, sequence_id[None]).token_ids[0]

    return jax.vmap(one)(sequence_ids)


def probabilities(sampling: Sampling) -> np.ndarray:
    """Of each next token after each token, in float64: temperature, then top-k, then top-p, then min-p."""
    scaled = TABLE.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max(1, keepdims=True))
    order = np.argsort(-p, axis=1)
    for row, ranks in zip(p, order, strict=True):
        if sampling.top_k:
            row[ranks[sampling.top_k :]] = 0
        before = np.cumsum(row[ranks]) - row[ranks]
        row[ranks[before >= sampling.top_p * row.sum()]] = 0
        row[row < sampling.min_p * row.max()] = 0
    return p / p.sum(1, keepdims=True)


def distance(sampling: Sampling, tokens: np.ndarray) -> float:
    """How many standard deviations chi-square is above what is expected of answers of the right rule."""
    p, last, expected = probabilities(sampling), PROMPT[0, -1], np.ones((VOCAB,) * LENGTH)
    for place in itertools.product(range(VOCAB), repeat=LENGTH):
        for before, token in itertools.pairwise((last, *place)):
            expected[place] *= p[before, token]
    expected *= len(tokens)
    counts = np.zeros_like(expected)
    np.add.at(counts, tuple(tokens.T), 1)
    assert not counts[expected == 0].any()
    often = expected >= 5  # all others are one class
    classes = [(counts[often], expected[often])]
    if expected[~often].sum() >= 5:
        classes.append((counts[~often].sum()[None], expected[~often].sum()[None]))
    seen, right = (np.concatenate(part) for part in zip(*classes, strict=True))
    chi_square, freedom = ((seen - right) ** 2 / right).sum(), len(seen) - 1
    return (chi_square - freedom) / np.sqrt(2 * freedom)


SAMPLINGS = [
    Sampling(0.5),
    Sampling(1.0),
    Sampling(1.7),
    Sampling(1.0, top_k=2),
    Sampling(1.3, top_k=3, top_p=0.8),
    Sampling(1.0, min_p=0.3),
]


def draws(sampling: Sampling, draft_tokens: int) -> np.ndarray:
    params = sampling_params(sampling, 1, (), VOCAB)
    return np.asarray(answers(params, jnp.arange(SEQUENCES, dtype=jnp.uint32), draft_tokens))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=Sampling.describe)
@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_sampled_answers_are_distributed_as_the_models(sampling: Sampling, draft_tokens: int):
    assert distance(sampling, draws(sampling, draft_tokens)) < CHANCE


def by_plain_rule(rule: Callable[..., int], sampling: Sampling) -> np.ndarray:
    """Answers by a rule that is given p, the draft's token, and random numbers."""
    rng, p = np.random.default_rng(0), probabilities(sampling)
    tokens = np.empty((SEQUENCES, LENGTH), np.int64)
    for row in tokens:
        text = PROMPT[0].tolist()
        for place in range(LENGTH):
            row[place] = rule(p[text[-1]], copied(text, 1)[0], rng)
            text.append(row[place])
    return tokens


def right(p: np.ndarray, draft: int, rng: np.random.Generator) -> int:
    if rng.random() < p[draft]:
        return draft
    rest = np.where(np.arange(VOCAB) == draft, 0, p)
    return rng.choice(VOCAB, p=rest / rest.sum())


def keeps_every_draft_that_may_be(p: np.ndarray, draft: int, rng: np.random.Generator) -> int:
    return draft if p[draft] else rng.choice(VOCAB, p=p)


def draws_again_from_all(p: np.ndarray, draft: int, rng: np.random.Generator) -> int:
    return draft if rng.random() < p[draft] else rng.choice(VOCAB, p=p)


def test_the_measure_passes_the_rule_of_the_papers_and_finds_wrong_ones():
    sampling = Sampling(1.0)
    assert distance(sampling, by_plain_rule(right, sampling)) < CHANCE
    for wrong in (keeps_every_draft_that_may_be, draws_again_from_all):
        assert distance(sampling, by_plain_rule(wrong, sampling)) > 20, wrong


@pytest.mark.parametrize("fault", ["every draft is kept", "one key for all", "drawn without the filters"])
def test_a_wrong_rule_in_the_loop_is_found(fault: str, monkeypatch: pytest.MonkeyPatch):
    if fault == "every draft is kept":
        monkeypatch.setattr(
            drafts,
            "tokens_that_stay",
            lambda tokens, chosen, ends, room: jnp.minimum(len(tokens), room).astype(jnp.int32),
        )
    else:

        def wrong(logits: Any, sampling: Any, keys: Any, steps: Any, seen: Any) -> Any:
            if fault == "one key for all":
                return sample_tokens(logits, sampling, keys, jnp.zeros_like(steps), seen)
            return sample_tokens(logits, dataclasses.replace(sampling, top_k=jnp.int32(0)), keys, steps, seen)

        monkeypatch.setattr(drafts, "sample_tokens", wrong)
    sampling = Sampling(1.0, top_k=3)
    params = sampling_params(sampling, 1, (), VOCAB)
    ids = jnp.arange(SEQUENCES, dtype=jnp.uint32)
    plain_answers: Any = answers.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    tokens = np.asarray(jax.jit(lambda ids: plain_answers(params, ids, 3))(ids))
    if fault == "drawn without the filters":
        with pytest.raises(AssertionError):
            distance(sampling, tokens)
    else:
        allowed = (probabilities(sampling)[tokens[:, :-1], tokens[:, 1:]] > 0).all(1)
        assert distance(Sampling(1.0), tokens) > 20 or not allowed.all()
