"""Attention against the same sums, written in plain float64 numpy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_utils import KVCache, KVCacheConfig, create_kv_cache_buffers
from qwen2_core.kernels import attention
from qwen2_core.kernels.attention import attend_causal, attend_tokens_two_part, attend_two_part
from qwen2_core.kernels.gpu_attention import gpu_attention
from qwen2_engine.decode_window import STEP_ALIGNMENT

HEAD_DIM = 8
GARBAGE = 1e4  # where no token is: finite, and large enough to ruin every sum that it enters


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One query [heads, head_dim] over keys and values [kv_heads, n, head_dim]: [heads, head_dim]."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    out = np.empty_like(q)
    group = len(q) // len(k)
    for head, query in enumerate(q):
        scores = k[head // group] @ query / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ v[head // group]
    return out


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


# --- Whole prompts ------------------------------------------------------------------------------------------


def causal(*args):
    """Traced afresh, as the sizes of blocks are read while tracing."""
    return np.asarray(jax.jit(functools.partial(attend_causal))(*args))


MHA, GQA, MQA = (4, 4), (6, 2), (5, 1)


@pytest.mark.parametrize(
    ("tokens", "past", "blocks", "layout"),
    [
        (1, 0, "one", MQA),
        (1, 9, "one", GQA),
        (32, 0, "many", MHA),
        *((40, 0, "one", layout) for layout in (MHA, GQA, MQA)),
        *((100, 9, "many", layout) for layout in (MHA, GQA, MQA)),
    ],
)
def test_each_token_attends_to_the_valid_positions_up_to_its_own(
    tokens: int, past: int, blocks: str, layout: tuple[int, int], monkeypatch
):
    if blocks == "many":
        monkeypatch.setattr(attention, "_SCORE_BYTES", 0)  # the smallest block, 16 queries
        monkeypatch.setattr(attention, "_PREFILL_KEYS", 24)
    rng, batch, positions = np.random.default_rng(0), 3, past + tokens
    heads, kv_heads = layout
    q = normal(rng, batch, tokens, heads, HEAD_DIM)
    k, v = normal(rng, 2, batch, kv_heads, positions, HEAD_DIM)
    valid = rng.random((batch, positions)) < 0.8
    valid[:, 0] = True  # every query sees a position
    out = causal(q, k, v, valid)
    assert out.shape == q.shape
    for b in range(batch):
        for t in range(tokens):
            seen = np.flatnonzero(valid[b, : past + t + 1])
            expected = reference(q[b, t], k[b][:, seen], v[b][:, seen])
            np.testing.assert_allclose(out[b, t], expected, atol=1e-5)


def test_without_a_mask_each_token_attends_to_every_position_up_to_its_own():
    rng = np.random.default_rng(1)
    q, (k, v) = normal(rng, 2, 5, 4, HEAD_DIM), normal(rng, 2, 2, 2, 5, HEAD_DIM)
    everything = np.ones((2, 5), bool)
    np.testing.assert_allclose(causal(q, k, v, None), causal(q, k, v, everything), atol=1e-6)


@pytest.mark.parametrize("bytes_per_query", [1, 14 * 4 * 512, 10**7, 10**12])
@pytest.mark.parametrize("tokens", [1, 300, 8192])
def test_a_block_of_queries_is_the_largest_whose_scores_fit_the_limit(bytes_per_query: int, tokens: int):
    block = attention._query_block(bytes_per_query, tokens)
    assert 1 <= block <= tokens
    assert block <= 16 or block * bytes_per_query <= attention._SCORE_BYTES
    assert block in (16, tokens) or 2 * block * bytes_per_query > attention._SCORE_BYTES


# --- One decode step over the two parts ---------------------------------------------------------------------

Attend = Callable[[Any, KVCache, int], jax.Array]


def of_tpus(q: Any, cache: KVCache, layer: int) -> jax.Array:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_sums_of_pieces", attention._sums_by_masks)
        return attend_two_part(q, cache, layer)


# What the forms are for, their compilers show: test_performance, benchmarks/gpu_program.py.
FORMS = [jax.jit(form, static_argnums=2) for form in (attend_two_part, of_tpus, gpu_attention)]
IN_EACH_FORM = pytest.mark.parametrize("attend", FORMS, ids=["blocks", "of TPUs", "of GPUs"])


def zeros(config: KVCacheConfig) -> Any:
    """``create_kv_cache_buffers`` in numpy: nothing is compiled to fill them."""
    abstract = jax.eval_shape(lambda: create_kv_cache_buffers(config))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)


def filled_cache(
    rng: np.random.Generator, config: KVCacheConfig, lengths: np.ndarray, index: int, garbage: float
) -> KVCache:
    """Random keys and values where valid (the token being read included), ``garbage`` everywhere else."""
    cache = zeros(config)

    def fill(buffers, valid: np.ndarray):
        return tuple(
            np.where(valid[:, None, :, None], normal(rng, *buffer.shape), np.float32(garbage))
            for buffer in buffers
        )

    prompt = np.arange(config.max_prefill_length) < lengths[:, None]
    decode = np.broadcast_to(
        np.arange(config.max_decode_length) <= index, (config.batch_size, config.max_decode_length)
    )
    return KVCache(
        dataclasses.replace(
            cache.prefill,
            k=fill(cache.prefill.k, prompt),
            v=fill(cache.prefill.v, prompt),
            length=lengths.astype(np.int32),
        ),
        dataclasses.replace(
            cache.ar, k=fill(cache.ar.k, decode), v=fill(cache.ar.v, decode), index=np.int32(index)
        ),
    )


def expected_two_part(q: np.ndarray, cache: KVCache, layer: int) -> np.ndarray:
    out = []
    for b, query in enumerate(q):
        prompt, steps = b // cache.samples_per_prompt, int(cache.ar.index) + 1
        n = int(cache.prefill.length[prompt])
        k, v = (
            np.concatenate([first[prompt, :, :n], second[b, :, :steps]], axis=1)
            for first, second in (
                (cache.prefill.k[layer], cache.ar.k[layer]),
                (cache.prefill.v[layer], cache.ar.v[layer]),
            )
        )
        out.append(reference(query, k, v))
    return np.stack(out)


def stacked(part: Any) -> Any:
    return dataclasses.replace(part, k=np.stack(part.k), v=np.stack(part.v))


def check(
    attend: Attend, config: KVCacheConfig, heads: int, lengths: list[int], index: int
) -> tuple[np.ndarray, KVCache]:
    rng = np.random.default_rng(0)
    cache = filled_cache(rng, config, np.array(lengths), index, GARBAGE)
    q = normal(rng, config.batch_size, heads, HEAD_DIM)
    out = attend(q, cache, 1)
    assert out.shape == q.shape
    np.testing.assert_allclose(out, expected_two_part(q, cache, 1), atol=1e-5)
    return q, cache


def sizes(prefill: int, decode: int, prompts: int = 3, samples: int = 1, kv_heads: int = 2) -> KVCacheConfig:
    return KVCacheConfig(2, kv_heads, HEAD_DIM, prefill, decode, prompts, samples)


@IN_EACH_FORM
@pytest.mark.parametrize("index", [0, 126, 127, 128, 129, 255, 256, 299])
def test_a_decode_step_attends_to_the_steps_up_to_the_index_also_at_the_borders_of_blocks(
    index: int, attend: Attend
):
    check(attend, sizes(300, 300), 4, [1, 17, 40], index)


@IN_EACH_FORM
@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 300])
def test_a_decode_step_attends_to_each_prompt_up_to_its_length_also_at_the_borders_of_blocks(
    length: int, attend: Attend
):
    check(attend, sizes(300, 300), 4, [length, 1, 300], 7)


@IN_EACH_FORM
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (14, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
def test_all_samples_of_a_prompt_attend_to_its_one_row(heads: int, kv_heads: int, attend: Attend):
    check(attend, sizes(150, 140, prompts=2, samples=3, kv_heads=kv_heads), heads, [150, 33], 130)


@IN_EACH_FORM
def test_a_stacked_cache_gives_what_separate_layers_give(attend: Attend):
    q, cache = check(attend, sizes(300, 300), 4, [150, 33, 1], 130)
    stack = KVCache(stacked(cache.prefill), stacked(cache.ar))
    np.testing.assert_allclose(attend(q, stack, 1), attend(q, cache, 1), atol=1e-6)


def with_own_copies(cache: KVCache, rows: list[int]) -> KVCache:
    """The same sequences without an index: each has a copy of the prompt that it points at."""
    length = np.where(np.array(rows) < 0, 0, np.asarray(cache.prefill.length)[rows])
    k, v = (tuple(layer[rows] for layer in part) for part in (cache.prefill.k, cache.prefill.v))
    return KVCache(dataclasses.replace(cache.prefill, k=k, v=v, length=length.astype(np.int32)), cache.ar)


@IN_EACH_FORM
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 2, 0, 2], [3, -1, 3, 1], [-1] * 4], ids=str)
def test_sequences_that_share_a_prompt_by_an_index_have_the_bits_of_those_with_own_copies(
    attend: Any, rows: list[int], window: int | None
):
    """Whoever shares it, in whichever row it lies; a sequence of no prompt (-1) sees its own steps alone."""
    lengths = np.array([150, 1, 40, 129])
    config = dataclasses.replace(sizes(150, 160, prompts=4), step_alignment=PIECE)
    cache = filled_cache(np.random.default_rng(0), config, lengths, 130, GARBAGE)
    starts = np.array([0, 16, 128, 96], np.int32)
    cache = dataclasses.replace(cache, ar=dataclasses.replace(cache.ar, start=starts))
    q, copies = normal(np.random.default_rng(1), 4, 14, HEAD_DIM), with_own_copies(cache, rows)
    windows = () if window is None else (window,)
    form = WINDOWED[FORMS.index(attend)] if windows else attend
    indexed = dataclasses.replace(cache, prompt_row=np.array(rows, np.int32))
    got = np.asarray(form(q, indexed, 1, *windows))
    np.testing.assert_array_equal(got, form(q, copies, 1, *windows))
    for b, query in enumerate(q):
        n = copies.prefill.length[b]
        k, v = (
            np.concatenate([prompt[1][b, :, :n], steps[1][b, :, starts[b] : 131]], axis=1)[
                :, -(window or 999) :
            ]
            for prompt, steps in ((copies.prefill.k, cache.ar.k), (copies.prefill.v, cache.ar.v))
        )
        np.testing.assert_allclose(got[b], reference(query, k, v), atol=1e-5)


@IN_EACH_FORM
def test_blocks_that_only_prompts_without_a_sequence_reach_are_masked(attend: Attend):
    """What lies in rows that no sequence points at, longer than theirs, changes not a bit."""
    config = sizes(300, 16, prompts=3)
    q = normal(np.random.default_rng(1), 3, 4, HEAD_DIM)
    outs = []
    for unused in (300, 1):
        cache = filled_cache(np.random.default_rng(0), config, np.array([20, 300, 30]), 3, GARBAGE)
        prefill = dataclasses.replace(cache.prefill, length=np.array([20, unused, 30], np.int32))
        rows: Any = np.array([2, 0, 2], np.int32)
        outs.append(attend(q, KVCache(prefill, cache.ar, rows), 1))
    np.testing.assert_array_equal(*outs)


# --- The ring of decode steps -------------------------------------------------------------------------------

PIECE = STEP_ALIGNMENT


def ring_of(config: KVCacheConfig, starts: list[int], index: int, seed: int, filler: float) -> KVCache:
    """Prompts of one token, and each row's own keys and values of the steps since its start.

    What a row holds at its own n-th step is always the same. Positions that no row owns hold ``filler``.
    """
    cache = zeros(config)
    prefill = dataclasses.replace(cache.prefill, length=np.ones_like(cache.prefill.length))
    own = normal(np.random.default_rng(seed), 2, config.batch_size, config.num_kv_heads, 4096, HEAD_DIM)
    parts = np.full((2, *cache.ar.k[0].shape), filler, np.float32)
    for b, start in enumerate(starts):
        steps = np.arange(max(start, index - config.max_decode_length + 1), index + 1)
        parts[:, b, :, steps % config.max_decode_length] = np.moveaxis(own[:, b, :, steps - start], 2, 1)
    k, v = ((part,) * config.num_layers for part in parts)
    ar = dataclasses.replace(cache.ar, k=k, v=v, index=np.int32(index), start=np.array(starts, np.int32))
    return KVCache(prefill, ar)


def expected_on_the_ring(q: np.ndarray, cache: KVCache, starts: list[int]) -> np.ndarray:
    out, index = [], int(cache.ar.index)
    for b, (query, start) in enumerate(zip(q, starts, strict=True)):
        positions = np.arange(start, index + 1) % cache.ar.capacity
        k, v = (
            np.concatenate([of_prompt[0][b, :, :1], of_steps[0][b][:, positions]], axis=1)
            for of_prompt, of_steps in ((cache.prefill.k, cache.ar.k), (cache.prefill.v, cache.ar.v))
        )
        out.append(reference(query, k, v))
    return np.stack(out)


@IN_EACH_FORM
@pytest.mark.parametrize("capacity", [5, 100, 128, 300, 320])
@pytest.mark.parametrize("laps", [0, 1, 2.5])
def test_rows_that_began_at_different_steps_attend_each_to_its_own(
    capacity: int, laps: float, attend: Attend
):
    """At any step and capacity, whether or not they are multiples of anything."""
    index = int(capacity * laps) + capacity * 2 // 3
    ages = [0, 1, capacity // 2, capacity - 2, capacity - 1]
    starts = [max(index - age, 0) for age in ages]
    config = dataclasses.replace(sizes(1, capacity, prompts=5), step_alignment=PIECE)
    cache = ring_of(config, starts, index, seed=4, filler=GARBAGE)
    q = normal(np.random.default_rng(5), 5, 4, HEAD_DIM)
    out = attend(q, cache, 0)
    np.testing.assert_allclose(out, expected_on_the_ring(q, cache, starts), atol=1e-5)


@IN_EACH_FORM
@settings(max_examples=25, deadline=None)
@given(
    age=st.integers(0, 319),
    starts=st.lists(st.integers(0, 60).map(lambda n: n * PIECE), min_size=2, max_size=2),
    mates=st.lists(st.integers(0, 319), min_size=8, max_size=8),
    filler=st.sampled_from([0.0, GARBAGE]),
)
def test_neither_the_place_in_the_ring_nor_the_other_rows_change_a_bit(
    attend: Attend, age: int, starts: list[int], mates: list[int], filler: float
):
    config = dataclasses.replace(sizes(1, 320, prompts=5), step_alignment=PIECE)
    q = normal(np.random.default_rng(6), 5, 4, HEAD_DIM)
    outs = []
    for start, of_mates in zip(starts, (mates[:4], mates[4:]), strict=True):
        index = start + age
        all_starts = [start, *(max(0, index - mate) // PIECE * PIECE for mate in of_mates)]
        all_starts = [max(s, index - 319) for s in all_starts]
        cache = ring_of(config, all_starts, index, seed=7, filler=filler)
        outs.append(attend(q, cache, 0))
    np.testing.assert_array_equal(*(np.asarray(out)[0] for out in outs))


@IN_EACH_FORM
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=2, max_size=2),
    index=st.integers(0, 139),
    garbage=st.sampled_from([-GARBAGE, 0.0, 7.0, GARBAGE]),
)
def test_what_invalid_positions_hold_changes_not_a_bit(
    attend: Attend, lengths: list[int], index: int, garbage: float
):
    config = sizes(150, 140, prompts=2, samples=3)
    q = normal(np.random.default_rng(1), config.batch_size, 14, HEAD_DIM)
    outs = [
        attend(q, filled_cache(np.random.default_rng(2), config, np.array(lengths), index, filler), 1)
        for filler in (garbage, 1.0)
    ]
    np.testing.assert_array_equal(outs[0], outs[1])


def test_what_padding_holds_changes_not_a_bit_of_a_prompt():
    rng = np.random.default_rng(3)
    q, (k, v) = normal(rng, 2, 20, 4, HEAD_DIM), normal(rng, 2, 2, 2, 20, HEAD_DIM)
    valid = np.arange(20) < np.array([[5], [20]])
    dirty_k, dirty_v = (np.where(valid[:, None, :, None], a, np.float32(GARBAGE)) for a in (k, v))
    clean, dirty = causal(q, k, v, valid), causal(q, dirty_k, dirty_v, valid)
    np.testing.assert_array_equal(clean[0, :5], dirty[0, :5])
    np.testing.assert_array_equal(clean[1], dirty[1])


# --- Sliding windows ----------------------------------------------------------------------------------------

WINDOWS = pytest.mark.parametrize("window", [1, 2, 40, 127, 128, 1000])


def of_tpus_windowed(q: Any, cache: KVCache, layer: int, window: Any) -> jax.Array:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_sums_of_pieces", attention._sums_by_masks)
        return attend_two_part(q, cache, layer, window)


WINDOWED = [jax.jit(form, static_argnums=2) for form in (attend_two_part, of_tpus_windowed, gpu_attention)]
WINDOWED_IN_EACH_FORM = pytest.mark.parametrize("attend", WINDOWED, ids=["blocks", "of TPUs", "of GPUs"])


@pytest.mark.parametrize(("tokens", "past"), [(1, 40), (100, 9)])
@pytest.mark.parametrize("given_as", ["a number", "traced"])
def test_each_token_sees_as_many_tokens_as_its_window_has(tokens: int, past: int, given_as: str, monkeypatch):
    """Padding, of which there is some in between, counts for nothing."""
    monkeypatch.setattr(attention, "_SCORE_BYTES", 0)  # the smallest block, 16 queries
    monkeypatch.setattr(attention, "_PREFILL_KEYS", 24)
    rng, positions = np.random.default_rng(0), past + tokens
    q, (k, v) = normal(rng, 2, tokens, 4, HEAD_DIM), normal(rng, 2, 2, 2, positions, HEAD_DIM)
    valid = rng.random((2, positions)) < 0.8
    attend = jax.jit(lambda *a: attend_causal(*a), static_argnums=4 if given_as == "a number" else ())
    for window in (60,) if given_as == "a number" else (1, 5, 24, 60, 1000):
        out = attend(q, k, v, valid, window)
        for b, t in np.ndindex(2, tokens):
            own = past + t
            seen = np.flatnonzero(valid[b, : own + 1])[-window:]
            none = np.zeros((4, HEAD_DIM))
            expected = reference(q[b, t], k[b][:, seen], v[b][:, seen]) if len(seen) else none
            np.testing.assert_allclose(out[b, t], expected, atol=1e-5)


@WINDOWED_IN_EACH_FORM
@WINDOWS
@pytest.mark.parametrize("index", [0, 39, 130, 260])
def test_a_decode_step_sees_no_further_back_than_the_window_into_steps_and_prompt(
    index: int, window: int, attend: Any
):
    """Rows of prompts of several lengths, of which some are out of sight."""
    lengths = np.array([300, 1, 130])
    config = sizes(300, 300, samples=2)
    cache = filled_cache(np.random.default_rng(0), config, lengths, index, GARBAGE)
    q = normal(np.random.default_rng(1), config.batch_size, 4, HEAD_DIM)
    out = attend(q, cache, 1, window)
    for b, query in enumerate(q):
        n = lengths[b // 2]
        first = max(n + index - window + 1, 0)
        k, v = (
            np.concatenate([prompt[1][b // 2, :, :n], steps[1][b, :, : index + 1]], axis=1)[:, first:]
            for prompt, steps in ((cache.prefill.k, cache.ar.k), (cache.prefill.v, cache.ar.v))
        )
        np.testing.assert_allclose(out[b], reference(query, k, v), atol=1e-5)


@WINDOWED_IN_EACH_FORM
@settings(max_examples=15, deadline=None)
@given(
    age=st.integers(0, 319),
    starts=st.lists(st.integers(0, 60).map(lambda n: n * PIECE), min_size=2, max_size=2),
    mates=st.lists(st.integers(0, 319), min_size=8, max_size=8),
    window=st.integers(1, 330),
)
def test_with_a_window_neither_the_place_in_the_ring_nor_the_other_rows_change_a_bit(
    attend: Any, age: int, starts: list[int], mates: list[int], window: int
):
    config = dataclasses.replace(sizes(1, 320, prompts=5), step_alignment=PIECE)
    q = normal(np.random.default_rng(6), 5, 4, HEAD_DIM)
    outs, caches = [], []
    for start, of_mates in zip(starts, (mates[:4], mates[4:]), strict=True):
        index = start + age
        all_starts = [start, *(max(0, index - mate) // PIECE * PIECE for mate in of_mates)]
        caches.append(
            ring_of(config, [max(s, index - 319) for s in all_starts], index, seed=7, filler=GARBAGE)
        )
        outs.append(np.asarray(attend(q, caches[-1], 0, window))[0])
    np.testing.assert_array_equal(*outs)
    # Of its own prompt's one token and its age + 1 steps the row sees `window`.
    own = [1] * (window > age + 1), np.arange(max(0, age + 1 - window), age + 1)
    k, v = (
        np.concatenate([part[0][0][:, : len(own[0])], ring[0][0][:, (starts[-1] + own[1]) % 320]], axis=1)
        for part, ring in (
            (caches[-1].prefill.k, caches[-1].ar.k),
            (caches[-1].prefill.v, caches[-1].ar.v),
        )
    )
    np.testing.assert_allclose(outs[1], reference(q[0], k, v), atol=1e-5)


@pytest.mark.parametrize("window", [None, 2, 127, 1000])
@pytest.mark.parametrize("index", [0, 125, 254, 290])
def test_several_tokens_attend_as_one_after_the_other_and_none_to_those_after_it(
    index: int, window: int | None
):
    """What the cache holds past each of them is large: keys of tokens to come, and of rejected ones."""
    config, tokens = sizes(300, 300, samples=2), 5
    cache = filled_cache(np.random.default_rng(0), config, np.array([300, 1, 130]), index, GARBAGE)
    rng = np.random.default_rng(1)
    q = normal(rng, config.batch_size, tokens, 4, HEAD_DIM)
    one = WINDOWED[0] if window else FORMS[0]
    together = jax.jit(attend_tokens_two_part, static_argnums=2)
    options = () if window is None else (window,)
    expected = []
    for t in range(tokens):  # each is written, and attends
        for part in (*cache.ar.k, *cache.ar.v):
            part[:, :, index + t] = normal(rng, *part[:, :, 0].shape)
        moved = KVCache(cache.prefill, dataclasses.replace(cache.ar, index=np.int32(index + t)))
        expected.append(np.asarray(one(q[:, t], moved, 1, *options)))
    out = together(q, cache, 1, *options)
    np.testing.assert_allclose(out, np.stack(expected, axis=1), atol=1e-5)


def test_without_a_window_programs_have_no_trace_of_one():
    """Windows are more operands, comparisons and masks, which those who use none need not carry."""
    cache, q = filled_cache(np.random.default_rng(0), sizes(300, 300), np.ones(3), 1, 0.0), np.ones((3, 4, 8))
    without = jax.jit(lambda q, cache: attend_two_part(q, cache, 1)).lower(q, cache).as_text()
    windowed = jax.jit(lambda q, cache: attend_two_part(q, cache, 1, 2**30)).lower(q, cache).as_text()
    assert without.count("stablehlo.compare") < windowed.count("stablehlo.compare")


@pytest.mark.parametrize("index", [0, 1000, 4000])
def test_a_decode_step_reads_only_the_blocks_that_the_window_touches(index: int, monkeypatch):
    read = []
    whole = attention.get_attention_kv

    def counting(part: Any, layer: int, start: Any, *more: Any) -> Any:
        jax.debug.callback(lambda start: read.append(int(start)), start)
        return whole(part, layer, start, *more)

    monkeypatch.setattr(attention, "get_attention_kv", counting)
    config = dataclasses.replace(sizes(2048, 4096, prompts=1), num_layers=1)
    cache = filled_cache(np.random.default_rng(0), config, np.array([2000]), index, 0.0)
    cache, q = jax.tree.map(jnp.asarray, (cache, normal(np.random.default_rng(1), 1, 4, HEAD_DIM)))
    attention._two_part_by_blocks(q, cache, 0, jnp.int32(200))
    jax.effects_barrier()
    assert len(read) <= 1 + 3 + 3  # and once for the shape alone
