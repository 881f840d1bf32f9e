"""The fixed-size buffers of generation: their shapes never change and they are updated in place.

The whole promise is that of ``test_output_equivalence``: nothing shows that the cache does not grow.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import Lively, assert_lively, pad_right, row_errors

from kvcache_utils import (
    ActivationBufferConfig,
    ARCache,
    KVCache,
    KVCacheConfig,
    PrefillCache,
    advance_ar_index,
    create_activation_buffer,
    create_kv_cache_buffers,
    get_attention_kv,
    update_activation_buffer,
    update_kv_cache_ar,
    write_prefill_cache,
)

CONFIG = KVCacheConfig(
    num_layers=3,
    num_kv_heads=2,
    head_dim=4,
    max_prefill_length=10,
    max_decode_length=6,
    num_prompts=2,
    samples_per_prompt=3,
)
LAYOUTS = pytest.mark.parametrize("stacked", [False, True], ids=["tuple of layers", "one stack"])


def cache_of(stacked: bool, **changes) -> KVCache:
    return create_kv_cache_buffers(dataclasses.replace(CONFIG, stacked=stacked, **changes))


def shapes(tree) -> list[tuple[tuple[int, ...], str]]:
    return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


def values(rows: int, tokens: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shape = (rows, CONFIG.num_kv_heads, tokens, CONFIG.head_dim)
    return jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(rng.normal(size=shape), jnp.float32)


def all_layers(part: PrefillCache | ARCache) -> np.ndarray:
    """[layers, k and v, rows, kv_heads, slots, head_dim]"""
    return np.stack([np.stack(get_attention_kv(part, layer)) for layer in range(CONFIG.num_layers)])


@LAYOUTS
def test_create_kv_cache_buffers(stacked: bool):
    """The prefill part has a row for each prompt, the ar part one for each sequence, all of them zero."""
    cache = cache_of(stacked)
    assert CONFIG.batch_size == 6
    assert get_attention_kv(cache.prefill, 0)[0].shape == (2, 2, 10, 4)
    assert get_attention_kv(cache.ar, 0)[1].shape == (6, 2, 6, 4)
    assert cache.prefill.capacity == 10
    assert cache.ar.capacity == 6
    assert cache.samples_per_prompt == 3
    assert cache.prefill.length.shape == (2,)
    assert cache.ar.index.shape == ()
    assert cache.ar.start.shape == (6,)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(cache))


@LAYOUTS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nbytes_says_how_much_is_allocated(stacked: bool, dtype):
    for indexed in (False, True):
        config = dataclasses.replace(CONFIG, stacked=stacked, dtype=dtype, indexed_prompts=indexed)
        leaves = jax.tree.leaves(create_kv_cache_buffers(config))
        assert config.nbytes == sum(leaf.nbytes for leaf in leaves)
    activations = ActivationBufferConfig(3, 5, 2, 8, dtype)
    assert activations.nbytes == create_activation_buffer(activations).nbytes


@pytest.mark.parametrize(
    "field",
    [field.name for field in dataclasses.fields(KVCacheConfig) if field.type not in ("Any", "bool")],
)
def test_a_size_below_one_is_refused_and_named(field: str):
    with pytest.raises(ValueError, match=rf"KVCacheConfig\.{field} must be at least 1, not 0"):
        dataclasses.replace(CONFIG, **{field: 0})


@LAYOUTS
def test_a_prompt_is_written_from_position_0_and_nothing_else_changes(stacked: bool):
    empty = cache_of(stacked).prefill
    k, v = values(rows=2, tokens=7)
    written = write_prefill_cache(empty, 1, k, v)
    assert shapes(written) == shapes(empty)
    expected = np.zeros((3, 2, 2, 2, 10, 4), np.float32)
    expected[1, 0, :, :, :7], expected[1, 1, :, :, :7] = k, v
    np.testing.assert_array_equal(all_layers(written), expected)
    assert not all_layers(empty).any()  # pure: the argument is as it was


@LAYOUTS
def test_a_prompt_longer_than_the_buffer_is_refused(stacked: bool):
    k, v = values(rows=2, tokens=11)
    with pytest.raises(ValueError, match="11 tokens does not fit the prefill cache of 10 positions"):
        write_prefill_cache(cache_of(stacked).prefill, 0, k, v)


@LAYOUTS
def test_update_kv_cache(stacked: bool):
    """A token's keys and values are written at its step, and the index advances once a token, not a layer."""
    cache = cache_of(stacked)
    before = shapes(cache)
    expected = np.zeros((3, 2, 6, 2, 6, 4), np.float32)
    for token in range(CONFIG.max_decode_length):
        for layer in range(CONFIG.num_layers):
            k, v = values(rows=6, tokens=1, seed=10 * token + layer)
            cache = KVCache(cache.prefill, update_kv_cache_ar(cache.ar, layer, k, v))
            expected[layer, 0, :, :, token], expected[layer, 1, :, :, token] = k[:, :, 0], v[:, :, 0]
            assert int(cache.ar.index) == token
        cache = advance_ar_index(cache)
        assert int(cache.ar.index) == token + 1
        np.testing.assert_array_equal(all_layers(cache.ar), expected)
        assert shapes(cache) == before
    assert not all_layers(cache.prefill).any()


@LAYOUTS
def test_a_sequence_longer_than_the_ring_writes_nan_over_its_own_beginning(stacked: bool):
    capacity = CONFIG.max_decode_length
    step = 2 * capacity + 3
    ages = jnp.array([0, 1, capacity - 1, capacity, capacity + 1, step], jnp.int32)  # the last three: too old
    ar = dataclasses.replace(cache_of(stacked).ar, index=jnp.int32(step), start=step - ages)
    written = all_layers(update_kv_cache_ar(ar, 2, *values(rows=6, tokens=1)))
    expected = np.zeros_like(written)
    expected[2, :, :, :, 3] = np.stack(values(rows=6, tokens=1))[:, :, :, 0]
    expected[2, :, 3:, :, 3] = np.nan  # and never a silent overwrite of a sequence's own beginning
    np.testing.assert_array_equal(written, expected)


@LAYOUTS
def test_several_tokens_are_written_behind_one_another_and_the_index_says_how_many_count(stacked: bool):
    cache = cache_of(stacked)
    cache = advance_ar_index(cache, 2)
    k, v = values(rows=6, tokens=3)
    written = all_layers(update_kv_cache_ar(cache.ar, 1, k, v))
    expected = np.zeros_like(written)
    expected[1, 0, :, :, 2:5], expected[1, 1, :, :, 2:5] = k, v
    np.testing.assert_array_equal(written, expected)
    assert int(advance_ar_index(cache, jnp.int32(3)).ar.index) == 5


@LAYOUTS
def test_several_tokens_that_do_not_fit_before_the_rings_end_are_nan_and_never_moved(stacked: bool):
    capacity = CONFIG.max_decode_length
    for index, starts in ((capacity - 1, 0), (capacity + capacity - 1, capacity + 2)):
        ar = cache_of(stacked).ar
        ar = dataclasses.replace(ar, index=jnp.int32(index), start=jnp.full(6, starts, jnp.int32))
        written = all_layers(update_kv_cache_ar(ar, 2, *values(rows=6, tokens=2)))
        assert np.isnan(written[2, :, :, :, -2:]).all()
        assert not written[2, :, :, :, :-2].any()


def test_a_tokens_position_is_its_prompts_length_plus_the_steps_since_its_sequence_began():
    cache = cache_of(False)
    prefill = dataclasses.replace(cache.prefill, length=jnp.array([4, 9], jnp.int32))
    cache = KVCache(prefill, dataclasses.replace(cache.ar, index=jnp.int32(2)))
    np.testing.assert_array_equal(cache.positions, [6, 6, 6, 11, 11, 11])
    starts = jnp.array([0, 1, 2, 2, 1, 0], jnp.int32)
    later = KVCache(prefill, dataclasses.replace(cache.ar, start=starts))
    np.testing.assert_array_equal(later.positions, [6, 5, 4, 9, 10, 11])
    np.testing.assert_array_equal(cache.prefill.valid.sum(1), [4, 9])
    assert cache.prefill.valid[0, 3]
    assert not cache.prefill.valid[0, 4]


def test_with_an_index_a_sequences_prompt_is_the_one_it_points_at():
    cache = create_kv_cache_buffers(dataclasses.replace(CONFIG, indexed_prompts=True))
    assert cache.prompt_row is not None
    assert cache.prompt_row.tolist() == [-1] * 6  # no sequence has a prompt yet
    ar = dataclasses.replace(cache.ar, index=jnp.int32(7), start=jnp.array([0, 4, 7, 0, 0, 7], jnp.int32))
    prefill = dataclasses.replace(cache.prefill, length=jnp.array([9, 4], jnp.int32))
    cache = KVCache(prefill, ar, jnp.array([1, 0, 0, -1, 1, -1], jnp.int32))
    assert cache.prompt_lengths.tolist() == [4, 9, 9, 0, 4, 0]
    assert cache.positions.tolist() == [11, 12, 9, 7, 11, 0]


def test_both_layouts_hold_the_same_and_only_a_stack_takes_a_traced_layer():
    def fill(cache: KVCache, layer) -> KVCache:
        prefill = write_prefill_cache(cache.prefill, layer, *values(2, 10, seed=1))
        return KVCache(prefill, update_kv_cache_ar(cache.ar, layer, *values(6, 1, seed=2)))

    tuples = jax.jit(fill, static_argnums=1)(cache_of(False), 2)
    stack = jax.jit(fill)(cache_of(True), jnp.int32(2))
    np.testing.assert_array_equal(all_layers(tuples.prefill), all_layers(stack.prefill))
    np.testing.assert_array_equal(all_layers(tuples.ar), all_layers(stack.ar))
    with pytest.raises(TypeError, match="Python int as layer"):
        jax.jit(fill)(cache_of(False), jnp.int32(2))


@LAYOUTS
def test_a_block_of_positions_is_read_and_a_start_past_the_end_is_clamped(stacked: bool):
    part = write_prefill_cache(cache_of(stacked).prefill, 1, *values(2, 10))
    whole = np.stack(get_attention_kv(part, 1))
    np.testing.assert_array_equal(np.stack(get_attention_kv(part, 1, 3, 4)), whole[:, :, :, 3:7])
    np.testing.assert_array_equal(np.stack(get_attention_kv(part, 1, 8, 4)), whole[:, :, :, 6:10])


def test_a_bfloat16_cache_rounds_what_is_written():
    part = cache_of(False, dtype=jnp.bfloat16).ar
    k, v = values(6, 1)
    read, _ = get_attention_kv(update_kv_cache_ar(part, 0, k, v), 0)
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read[:, :, 0], k[:, :, 0].astype(jnp.bfloat16))


def test_activation_buffer():
    """Each step writes the rows of its own token and changes no others."""
    config = ActivationBufferConfig(num_layers=2, max_tokens=3, batch_size=4, hidden_size=5)
    buffer = create_activation_buffer(config)
    assert buffer.shape == config.shape == (2, 3, 4, 5)
    rows = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
    write = jax.jit(update_activation_buffer, donate_argnums=0)
    for step in (0, 2):
        buffer = write(buffer, rows[step], step)
    np.testing.assert_array_equal(buffer[:, 0], rows[0])
    np.testing.assert_array_equal(buffer[:, 2], rows[2])
    assert not buffer[:, 1].any()


@LAYOUTS
def test_jit_compilation(stacked: bool):
    """A compiled step is traced once whatever the values, keeps all shapes, and writes in place."""
    traces = 0

    def step(cache: KVCache, buffer: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array) -> Any:
        nonlocal traces
        traces += 1
        ar = cache.ar
        for layer in range(CONFIG.num_layers):
            ar = update_kv_cache_ar(ar, layer, k, v)
        buffer = update_activation_buffer(buffer, rows, ar.index)
        return advance_ar_index(KVCache(cache.prefill, ar)), buffer

    def addresses(cache: KVCache, buffer: jax.Array) -> list[int]:
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((cache.ar.k, cache.ar.v, buffer))]

    compiled = jax.jit(step, donate_argnums=(0, 1))
    cache = cache_of(stacked)
    buffer = create_activation_buffer(
        ActivationBufferConfig(CONFIG.num_layers, CONFIG.max_decode_length, CONFIG.batch_size, hidden_size=5)
    )
    shapes_before, addresses_before = shapes((cache, buffer)), addresses(cache, buffer)
    for token in range(CONFIG.max_decode_length):
        k, v = values(rows=6, tokens=1, seed=token)
        rows = jnp.full((CONFIG.num_layers, CONFIG.batch_size, 5), 1.0 + token)
        cache, buffer = compiled(cache, buffer, k, v, rows)
        np.testing.assert_array_equal(get_attention_kv(cache.ar, 2)[0][:, :, token], k[:, :, 0])
        np.testing.assert_array_equal(buffer[:, token], rows)
    assert traces == 1
    assert shapes((cache, buffer)) == shapes_before
    assert addresses(cache, buffer) == addresses_before


# --- Against a cache that grows -----------------------------------------------------------------------------

LIVELY = Lively(layers=3, extract=(0, 2), seed=5)
STEPS = 64


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_output_equivalence(scan_layers: bool):
    """At every step the fixed cache gives the logits, rows and greedy tokens of the growing cache."""
    model, params = LIVELY.build(scan_layers=scan_layers)
    apply = jax.jit(model.apply)
    ids, lengths = pad_right(LIVELY.prompts((17, 40)))
    tokens, logits, rows = generate_with_fixed_cache(apply, params, ids, lengths, stacked=scan_layers)
    assert_lively(tokens)
    expected_logits, expected_rows = read_with_growing_cache(apply, params, ids, lengths, tokens)
    # By induction: each token is the growing cache's choice after all those before it.
    np.testing.assert_array_equal(tokens, expected_logits[:, :-1].argmax(-1))
    assert row_errors(logits, expected_logits).max() < 1e-4
    assert row_errors(rows, expected_rows).max() < 1e-4


def generate_with_fixed_cache(
    apply: Any, params: Any, ids: np.ndarray, lengths: np.ndarray, stacked: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Greedy tokens [B, STEPS], logits [B, STEPS + 1, vocab], rows [layers, STEPS, B, hidden]."""
    prompts, width = ids.shape
    config = KVCacheConfig(
        num_layers=LIVELY.layers,
        num_kv_heads=LIVELY.kv_heads,
        head_dim=LIVELY.hidden // LIVELY.heads,
        max_prefill_length=width,
        max_decode_length=STEPS,
        num_prompts=prompts,
        stacked=stacked,
    )
    empty = create_kv_cache_buffers(config)
    out, prefill, _ = apply({"params": params}, ids, np.arange(width) < lengths[:, None], empty.prefill)
    cache = KVCache(prefill, empty.ar)
    tokens, logits, rows = [], [out], []
    for _ in range(STEPS):
        tokens.append(np.asarray(out[:, 0]).argmax(-1).astype(np.int32))
        out, cache, captured = apply({"params": params}, tokens[-1][:, None], None, cache)
        assert shapes(cache) == shapes(empty)
        logits.append(out)
        rows.append(captured)
    return np.stack(tokens, 1), np.concatenate(logits, 1), np.concatenate(rows, 1)


def read_with_growing_cache(
    apply: Any, params: Any, ids: np.ndarray, lengths: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same tokens read after the prompts: first one alone, then all others."""
    prompts, width = ids.shape
    mask = np.arange(width) < lengths[:, None]
    out, caches, _ = apply({"params": params}, ids, mask, None)
    logits, rows = [np.take_along_axis(np.asarray(out), lengths[:, None, None] - 1, axis=1)], []
    for first, piece in ((0, tokens[:, :1]), (1, tokens[:, 1:])):
        mask = np.concatenate([mask, np.ones(piece.shape, bool)], axis=1)
        out, caches, captured = apply({"params": params}, piece, mask, caches, lengths + first)
        logits.append(out)
        rows.append(captured)
    head_dim = LIVELY.hidden // LIVELY.heads
    assert len(caches) == LIVELY.layers
    assert caches[0][0].shape == (prompts, LIVELY.kv_heads, width + tokens.shape[1], head_dim)
    return np.concatenate(logits, 1), np.concatenate(rows, 1)
