"""The CPU kernels for attention: only valid keys, in the sequence's own order, summed in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcache_utils import ARCache, KVCache, PrefillCache
from qwen2_core.kernels.attention import attend_causal, attend_two_part


@pytest.fixture
def attend(cpu_kernels: str) -> Any:
    return jax.jit(lambda *a: attend_two_part(*a), static_argnums=2)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(jnp.bfloat16)


def cache_of(
    lengths: list[int],
    starts: list[int],
    index: int,
    *,
    prompt_capacity: int = 40,
    ring: int = 32,
    kv_heads: int = 2,
    dim: int = 64,
) -> KVCache:
    """Two layers of random keys and values; what is not valid is NaN."""
    prompt = [normal(len(lengths), kv_heads, prompt_capacity, dim) + np.float32(i) for i in range(4)]
    step = [normal(len(starts), kv_heads, ring, dim) + np.float32(i) for i in range(4)]
    for values in prompt:
        for row, length in enumerate(lengths):
            values[row, :, length:] = np.nan
    for values in step:
        for row, start in enumerate(starts):
            valid = {t % ring for t in range(max(start, index - ring + 1), index + 1)}
            values[row, :, [position for position in range(ring) if position not in valid]] = np.nan
    prompt, step = ([jnp.asarray(v, jnp.bfloat16) for v in part] for part in (prompt, step))
    return KVCache(
        PrefillCache(tuple(prompt[:2]), tuple(prompt[2:]), jnp.array(lengths, jnp.int32)),
        ARCache(tuple(step[:2]), tuple(step[2:]), jnp.int32(index), jnp.array(starts, jnp.int32)),
    )


def exact(q: np.ndarray, cache: KVCache, layer: int, window: int = 2**30) -> np.ndarray:
    """In float64, row by row and head by head."""
    index, ring = int(cache.ar.index), cache.ar.capacity
    out = np.zeros(q.shape)
    for row, head in np.ndindex(q.shape[:2]):
        prompt = row // cache.samples_per_prompt
        kv_head = head * cache.ar.k[layer].shape[1] // q.shape[1]
        oldest = max(int(cache.ar.start[row]), index - ring + 1)
        positions = [t % ring for t in range(oldest, index + 1)]
        k, v = (
            np.concatenate(
                [
                    np.asarray(part[0][layer][prompt, kv_head, : int(cache.prefill.length[prompt])]),
                    np.asarray(part[1][layer][row, kv_head])[positions],
                ]
            ).astype(np.float64)[-window:]
            for part in ((cache.prefill.k, cache.ar.k), (cache.prefill.v, cache.ar.v))
        )
        scores = k @ q[row, head].astype(np.float64) / np.sqrt(q.shape[2])
        weights = np.exp(scores - scores.max())
        out[row, head] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize("heads", [2, 14, 26])
@pytest.mark.parametrize(
    ("lengths", "starts", "index"),
    [
        ([40], [0], 0),  # a first step
        ([37], [0], 31),  # odd lengths, a full ring
        ([1], [5, 20, 0], 20),  # samples of one prompt, one in its first step
        ([40, 3], [40, 64, 37, 66], 68),  # around the ring, from even and odd positions
        ([7], [0], 50),  # more steps than the ring holds: the last 32
    ],
)
def test_a_decode_step_is_the_softmax_over_the_valid_positions(
    attend: Any, lengths, starts, index: int, heads: int
):
    cache, q, layer = cache_of(lengths, starts, index), normal(len(starts), heads, 64), 1
    got = np.asarray(attend(q, cache, layer), np.float64)
    np.testing.assert_allclose(got, exact(q, cache, layer), atol=0.02, rtol=2**-7)


@pytest.mark.parametrize("window", [1, 2, 7, 20, 33, 500])
@pytest.mark.parametrize(
    ("lengths", "starts", "index"),
    [([40], [0], 0), ([37], [0], 31), ([1], [5, 20, 0], 20), ([40, 3], [40, 64, 37, 66], 68)],
)
def test_with_a_window_a_decode_step_sees_no_further_back(
    attend: Any, lengths, starts, index: int, window: int
):
    cache, q = cache_of(lengths, starts, index), normal(len(starts), 14, 64)
    got = np.asarray(attend(q, cache, 1, window), np.float64)
    np.testing.assert_allclose(got, exact(q, cache, 1, window), atol=0.02, rtol=2**-7)
    assert "qwen2_cpu_attention" in attend.lower(q, cache, 1, window).as_text()
    if window == 500:
        np.testing.assert_array_equal(attend(q, cache, 1, window), attend(q, cache, 1))


def test_an_odd_head_dim_is_left_to_xla_and_an_even_one_need_not_fill_a_vector(attend: Any):
    for dim in (7, 6, 50):
        cache = cache_of([9], [0], 4, dim=dim)
        cache = jax.tree.map(lambda a: jnp.nan_to_num(a) if a.dtype == jnp.bfloat16 else a, cache)
        q = normal(1, 4, dim)
        got = np.asarray(attend(q, cache, 0), np.float64)
        np.testing.assert_allclose(got, exact(q, cache, 0), atol=0.02, rtol=2**-7)
        used = "qwen2_cpu_attention" in attend.lower(q, cache, 0).as_text()
        assert used == (dim % 2 == 0)


def test_a_stacked_cache_gives_the_bits_of_separate_layers(attend: Any):
    cache, q = cache_of([5, 40], [2, 0], 9), normal(2, 14, 64)
    prefill, ar = cache.prefill, cache.ar
    stacked = KVCache(
        dataclasses.replace(prefill, k=jnp.array(prefill.k), v=jnp.array(prefill.v)),
        dataclasses.replace(ar, k=jnp.array(ar.k), v=jnp.array(ar.v)),
    )
    traced = jax.jit(lambda *a: attend_two_part(*a))
    for layer in (0, 1):
        got = traced(q, stacked, jnp.int32(layer))
        np.testing.assert_array_equal(got, attend(q, cache, layer))


@pytest.mark.parametrize("window", [None, 19, 120])
@pytest.mark.parametrize("steps", [21, 100, 111])
def test_neither_the_place_in_the_ring_nor_the_other_rows_change_a_bit(
    attend: Any, steps: int, window: int | None
):
    ring, (prompt, own) = (
        128,
        [[normal(*shape) for _ in range(2)] for shape in ((1, 2, 40, 128), (2, steps, 128))],
    )
    q = normal(3, 120, 128)  # of many outputs one is off: rounding hides most differences

    def of(row: int, start: int) -> np.ndarray:
        """The sequence in ``row`` since ``start``, beside others of NaN."""
        buffers = [np.full((3, 2, ring, 128), np.nan, jnp.bfloat16) for _ in range(2)]
        for buffer, values in zip(buffers, own, strict=True):
            buffer[row][:, (start + np.arange(steps)) % ring] = values
        k, v = ((jnp.asarray(np.repeat(part, 3, 0)),) for part in prompt)
        prefill = PrefillCache(k, v, jnp.array([33, 33, 33], jnp.int32))
        starts = jnp.array([start if b == row else 0 for b in range(3)], jnp.int32)
        k, v = ((jnp.asarray(buffer),) for buffer in buffers)
        ar = ARCache(k, v, jnp.int32(start + steps - 1), starts)
        queries = np.stack([q[0] if b == row else q[b] for b in range(3)])
        return np.asarray(attend(queries, KVCache(prefill, ar), 0, window))[row]

    expected = of(0, 0)
    assert np.isfinite(expected.astype(np.float32)).all()
    for row, start in ((1, 0), (2, 16), (0, 48), (1, 96), (2, 112)):
        np.testing.assert_array_equal(of(row, start), expected)


def sensitive(q: np.ndarray, cache: KVCache) -> tuple[np.ndarray, KVCache]:
    """Two large products in each score that cancel: what is left depends on the order of the sum."""
    q[..., 0], q[..., -1] = 256, -256

    def with_large(part: Any) -> Any:
        k = tuple(layer.at[..., 0].set(256).at[..., -1].set(256) for layer in part.k)
        return dataclasses.replace(part, k=k)

    return q, KVCache(with_large(cache.prefill), with_large(cache.ar))


def with_own_copies(cache: KVCache, rows: list[int]) -> KVCache:
    """The same sequences without an index: each has a copy of the prompt that it points at."""
    at = jnp.array(rows)
    length = jnp.where(at < 0, 0, cache.prefill.length[at])
    k, v = (tuple(layer[at] for layer in part) for part in (cache.prefill.k, cache.prefill.v))
    return KVCache(PrefillCache(k, v, length), cache.ar)


def indexed(cache: KVCache, rows: list[int]) -> KVCache:
    return dataclasses.replace(cache, prompt_row=jnp.array(rows, jnp.int32))


@pytest.mark.parametrize("heads", [2, 4, 14, 26])  # one query head to a head of keys, two, seven, thirteen
@pytest.mark.parametrize("window", [None, 9, 33])
@pytest.mark.parametrize(
    "rows", [[0, 1, 2, 3, 4], [2, 2, 2, 2, 2], [4, 2, 4, 2, 2], [-1, 4, -1, 0, 4], [-1] * 5], ids=str
)
def test_sequences_that_share_a_prompt_have_the_bits_of_those_with_own_copies(
    attend: Any, rows: list[int], window: int | None, heads: int
):
    """All that nobody may read is NaN: the rows that no sequence points at, and what is not valid."""
    cache = cache_of([40, 3, 37, 1, 36], [40, 64, 37, 66, 68], 68)
    q, cache = sensitive(normal(5, heads, 64), cache)
    windows = () if window is None else (window,)
    copies = with_own_copies(cache, rows)
    spoil = [
        layer.at[jnp.array([r for r in range(5) if r not in rows], int)].set(jnp.nan)
        for layer in (*cache.prefill.k, *cache.prefill.v)
    ]
    prefill = PrefillCache(tuple(spoil[:2]), tuple(spoil[2:]), cache.prefill.length)
    shared = indexed(KVCache(prefill, cache.ar), rows)
    got = np.asarray(attend(q, shared, 1, *windows))
    np.testing.assert_array_equal(got, attend(q, copies, 1, *windows))
    expected = exact(q, copies, 1, *windows)
    np.testing.assert_allclose(got.astype(np.float64), expected, atol=0.02, rtol=2**-7)
    assert "qwen2_cpu_attention" in attend.lower(q, shared, 1, *windows).as_text()


@pytest.mark.parametrize(("prompts", "heads"), [(1, 14), (2, 14), (7, 4), (3, 2)])
def test_many_that_share_long_prompts_have_the_bits_of_each_alone(attend: Any, prompts: int, heads: int):
    """More than are computed together, at several places of the ring; also without an index, side by side."""
    sequences, capacity = 42, 1500
    lengths = [capacity - 3 * p for p in range(prompts)]
    starts = [int(n) for n in np.random.default_rng(0).integers(0, 40, sequences)]
    cache = cache_of(lengths, starts, 44, prompt_capacity=capacity)
    q, cache = sensitive(normal(sequences, heads, 64), cache)
    rows = np.random.default_rng(1).integers(0, prompts, sequences)
    got = np.asarray(attend(q, indexed(cache, list(rows)), 0))
    side_by_side = np.asarray(attend(q, cache, 0))
    for b in range(0, sequences, 5):
        ar = ARCache(
            tuple(layer[b : b + 1] for layer in cache.ar.k),
            tuple(layer[b : b + 1] for layer in cache.ar.v),
            cache.ar.index,
            cache.ar.start[b : b + 1],
        )
        for row, of_all in ((rows[b], got), (b // (sequences // prompts), side_by_side)):
            alone = attend(q[b : b + 1], indexed(KVCache(cache.prefill, ar), [int(row)]), 0)
            np.testing.assert_array_equal(of_all[b], alone[0])


def test_an_index_beyond_the_prompts_reads_no_memory_that_is_not_theirs(attend: Any):
    """It reads the last prompt, as XLA does."""
    cache, q = cache_of([5, 40], [2, 0], 9), normal(2, 14, 64)
    np.testing.assert_array_equal(attend(q, indexed(cache, [7, 2]), 0), attend(q, indexed(cache, [1, 1]), 0))


def test_a_nan_in_a_valid_key_reaches_the_output(attend: Any):
    cache, q = cache_of([40], [0], 3), normal(1, 14, 64)
    k = cache.prefill.k[0].at[0, 0, 11, 5].set(jnp.nan)
    poisoned = KVCache(PrefillCache((k, k), cache.prefill.v, cache.prefill.length), cache.ar)
    got = np.asarray(attend(q, poisoned, 0), np.float32)
    assert np.isnan(got[:, :7]).all()
    assert np.isfinite(got[:, 7:]).all()


def exactly_causal(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, valid: np.ndarray, window: int = 2**30
) -> np.ndarray:
    """In float64, all scores at once."""
    tokens, positions = q.shape[1], k.shape[2]
    k, v = (np.repeat(part.astype(np.float64), q.shape[2] // k.shape[1], axis=1) for part in (k, v))
    scores = np.einsum("bthd,bhsd->bhts", q.astype(np.float64), k) / np.sqrt(q.shape[3])
    seen = np.tri(tokens, positions, positions - tokens, bool) & valid[:, None, None]
    places = np.cumsum(valid, 1)  # a window counts tokens, not padding
    seen &= (places[:, None] > places[:, -tokens:, None] - window)[:, None]
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return np.einsum("bhts,bhsd->bthd", weights, v)


def some_valid(rows: int, positions: int) -> np.ndarray:
    """All valid, padding on the right, padding on the left, holes; none."""
    valid = np.ones((5, positions), bool)
    valid[1, positions * 2 // 3 :] = False
    valid[2, : positions // 3] = False
    valid[3] = np.random.default_rng(positions).random(positions) < 0.5
    valid[4] = False
    return valid[:rows]


@pytest.fixture
def prompt(cpu_kernels: str) -> Any:
    return jax.jit(lambda *a: attend_causal(*a))


@pytest.mark.parametrize(("heads", "kv_heads"), [(14, 2), (3, 3), (26, 2)])
@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (33, 33), (64, 64), (1, 70), (5, 70), (300, 301)])
def test_a_prompts_attention_is_the_softmax_over_the_valid_positions_up_to_each_tokens_own(
    prompt: Any, tokens: int, positions: int, heads: int, kv_heads: int
):
    q, (k, v) = normal(5, tokens, heads, 64), (normal(5, kv_heads, positions, 64) + i for i in range(2))
    valid = some_valid(5, positions)
    k, v = (np.asarray(part, jnp.bfloat16) for part in (k, v))
    got = np.asarray(prompt(q, k, v, valid), np.float64)
    np.testing.assert_allclose(got, exactly_causal(q, k, v, valid), atol=0.02, rtol=2**-7)
    np.testing.assert_array_equal(prompt(q, k, v, None)[0], got[0].astype(jnp.bfloat16))


@pytest.mark.parametrize("window", [1, 3, 32, 50, 301])
@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (33, 33), (1, 70), (5, 70), (300, 301)])
def test_with_a_window_no_token_of_a_prompt_sees_further_back(
    prompt: Any, tokens: int, positions: int, window: int
):
    q, (k, v) = normal(5, tokens, 14, 64), (normal(5, 2, positions, 64) + i for i in range(2))
    valid = some_valid(5, positions)
    k, v = (np.asarray(part, jnp.bfloat16) for part in (k, v))
    got = np.asarray(prompt(q, k, v, valid, window), np.float64)
    np.testing.assert_allclose(got, exactly_causal(q, k, v, valid, window), atol=0.02, rtol=2**-7)
    assert "qwen2_cpu_attention_causal" in prompt.lower(q, k, v, valid, window).as_text()
    if window == 301:
        np.testing.assert_array_equal(prompt(q, k, v, valid, window), prompt(q, k, v, valid))


@pytest.mark.parametrize("window", [None, 45])
@pytest.mark.parametrize(("width", "length"), [(90, 41), (350, 202), (700, 601)])
def test_what_follows_a_token_in_its_prompt_changes_not_a_bit(
    prompt: Any, width: int, length: int, window: int | None
):
    """Neither in the sequence, nor as padding, nor in the rows beside it; only what is invalid is NaN."""
    q, k, v = normal(2, width, 14, 64), normal(2, 2, width, 64), normal(2, 2, width, 64)
    valid = np.ones((2, width), bool)
    expected = np.asarray(prompt(q, k, v, valid, window))
    valid[0, length:] = False
    for part in (k, v):
        part[0, :, length:] = np.nan
        part[1, :, 70:] = 3
    got = np.asarray(prompt(q, k, v, valid, window))
    np.testing.assert_array_equal(got[0, :length], expected[0, :length])
    np.testing.assert_array_equal(got[1, :70], expected[1, :70])
    assert np.isfinite(got.astype(np.float32)).all()
    assert "qwen2_cpu_attention_causal" in prompt.lower(q, k, v, valid, window).as_text()
    narrow = [a[:, :length] if a is q else a[:, :, :length] for a in (q, k, v)]
    np.testing.assert_array_equal(prompt(*narrow, None, window)[0], got[0, :length])


def test_attention_over_a_prompt_can_be_differentiated(prompt: Any):
    q, k, v = normal(1, 20, 4, 8), normal(1, 2, 20, 8), normal(1, 2, 20, 8)

    def tangent(*arrays: np.ndarray) -> Any:
        return jax.jit(lambda *a: jax.jvp(lambda *b: prompt(*b, None), a, a)[1])(*arrays)

    expected = tangent(*(a.astype(np.float32) for a in (q, k, v)))
    np.testing.assert_allclose(tangent(q, k, v).astype(np.float32), expected, atol=0.05)


def test_heads_of_128_as_in_qwen3_are_attended_by_the_kernels(attend: Any, prompt: Any):
    cache, q = cache_of([40, 3], [40, 64, 37, 66], 68, kv_heads=4, dim=128), normal(4, 8, 128)
    got = np.asarray(attend(q, cache, 1), np.float64)
    np.testing.assert_allclose(got, exact(q, cache, 1), atol=0.02, rtol=2**-7)
    assert "qwen2_cpu_attention" in attend.lower(q, cache, 1).as_text()
    q, (k, v) = normal(2, 33, 8, 128), (np.asarray(normal(2, 4, 33, 128), jnp.bfloat16) for _ in range(2))
    valid = some_valid(2, 33)
    got = np.asarray(prompt(q, k, v, valid), np.float64)
    np.testing.assert_allclose(got, exactly_causal(q, k, v, valid), atol=0.02, rtol=2**-7)
    assert "qwen2_cpu_attention_causal" in prompt.lower(q, k, v, valid).as_text()
