"""Generation as compiled programs: stopping, sampling, batches, capture, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import DEEP, Lively, assert_lively, pad_right, row_errors

from generate_jitted import (
    GenerateShape,
    Sampling,
    bucket_length,
    compile_generate,
    generate_single_task_jitted,
    pad_prompts,
)
from kvcache_utils import create_kv_cache_buffers
from qwen2_core.requests import check_prompts, check_sequence_ids
from qwen2_core.sampling import sampling_params
from qwen2_engine.python_loop import generate_single_task_python
from qwen2_jax import QwenModel
from qwen2_jax_with_hooks import create_model_with_hooks

TINY = Lively(layers=3, extract=(0, 2), seed=5)
LENGTHS = (1, 33, 40)
STEPS = 64


@functools.cache
def built(scan_layers: bool = True) -> tuple[Any, Any]:
    """Scanned unless a test is about the other way: it compiles in a third of the time."""
    return TINY.build(scan_layers=scan_layers)


def generate(prompts: list[np.ndarray], max_tokens: int = STEPS, **kwargs: Any) -> Any:
    ids, lengths = pad_right(prompts, width=48)
    model, params = built()
    kwargs.setdefault("extract_prompt", True)  # everywhere, so that few programs are compiled
    out = generate_single_task_jitted(model, params, ids, max_tokens, prompt_lengths=lengths, **kwargs)
    return jax.tree.map(np.asarray, out)  # each slice of an array on the device would be compiled


PROMPTS = TINY.prompts(LENGTHS)


@pytest.fixture(scope="module")
def greedy() -> Any:
    out = generate(PROMPTS)
    assert_lively(out.token_ids)
    return out


def assert_rows_close(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Rows that are zero in both are equal; all others agree relatively."""
    got, expected = np.asarray(got), np.asarray(expected)
    zero = ~expected.any(-1)
    np.testing.assert_array_equal(zero, ~got.any(-1))
    assert row_errors(got[~zero], expected[~zero]).max() < tolerance


# --- By layer and row ---


def test_the_rows_of_a_layer_come_by_its_number_cut_to_the_length_as_float32():
    out = generate(PROMPTS, eos_token_ids=range(8))
    assert len(set(out.lengths.tolist())) > 1
    rounded = dataclasses.replace(out, activations=out.activations.astype(jnp.bfloat16))
    for generation in (out, rounded):
        for place, layer in enumerate(TINY.extract):
            for row, length in enumerate(out.lengths):
                rows = generation.layer(layer, row)
                assert rows.dtype == np.float32
                expected = generation.activations[place, :length, row].astype(np.float32)
                np.testing.assert_array_equal(rows, expected)


def test_the_tokens_of_a_row_come_as_a_list_cut_to_the_length(stopping):
    _, expected, out = stopping
    for row, length in enumerate(expected):
        tokens = out.tokens(row)
        assert tokens == out.token_ids[row, :length].tolist()
        assert all(type(token) is int for token in tokens)
    for row in (3, -1):
        with pytest.raises(IndexError, match=f"row {row} is none of the 3 rows"):
            out.tokens(row)


def test_a_layer_or_row_that_is_not_there_is_an_index_error_and_never_another_ones_values(greedy: Any):
    for layer in (1, 10, -1):
        with pytest.raises(IndexError, match=f"layer {layer} was not captured; captured are: 0, 2"):
            greedy.layer(layer, row=0)
    for row in (3, -1):
        with pytest.raises(IndexError, match=f"row {row} is none of the 3 rows"):
            greedy.layer(0, row)
    tokens_only = dataclasses.replace(greedy, activations=None, layers=())
    with pytest.raises(IndexError, match="captured are: none"):
        tokens_only.layer(0, row=0)
    for layer in (True, 0.5, "0", None, slice(2), [0]):
        with pytest.raises(TypeError, match="layer must be a whole number, not "):
            greedy.layer(layer, row=0)
        with pytest.raises(TypeError, match="row must be a whole number, not "):
            greedy.layer(0, row=layer)
    np.testing.assert_array_equal(greedy.layer(np.int64(2), row=jnp.int32(1)), greedy.layer(2, 1))
    assert repr(greedy) == f"Generation(3 rows of up to {STEPS} tokens, layers 0, 2)"
    assert repr(tokens_only) == f"Generation(3 rows of up to {STEPS} tokens, no layers)"


# --- What comes back ----------------------------------------------------------------------------------------


def test_single_task_generation(greedy: Any):
    """One call returns the tokens, log-probabilities and rows of every sequence, in fixed shapes."""
    arrays = {name: value for name, value in vars(greedy).items() if hasattr(value, "shape")}
    assert vars(greedy).keys() - arrays.keys() == {"layers", "points", "prompt_points", "point_layers"}
    described = {name: (value.shape, value.dtype) for name, value in arrays.items()}
    assert described == {
        "token_ids": ((3, STEPS), jnp.int32),
        "lengths": ((3,), jnp.int32),
        "finished": ((3,), jnp.bool_),
        "logprobs": ((3, STEPS), jnp.float32),
        "activations": ((2, STEPS, 3, TINY.hidden), jnp.float32),
        "prompt_activations": ((2, 48, 3, TINY.hidden), jnp.float32),
    }
    assert greedy.layers == TINY.extract
    assert greedy.points == greedy.prompt_points == {}
    np.testing.assert_array_equal(greedy.lengths, STEPS)
    assert not greedy.finished.any()


def test_prompt_rows_are_zero_past_the_end_of_each_prompt_and_nowhere_else(greedy: Any):
    rows = greedy.prompt_activations
    for b, length in enumerate(LENGTHS):
        assert rows[:, :length, b].any(-1).all()
        assert not rows[:, length:, b].any()


def test_without_activations_the_tokens_are_the_same(greedy: Any):
    model, params = built()
    ids, lengths = pad_right(PROMPTS, width=48)
    plain = generate_single_task_jitted(
        QwenModel(model.config),
        params,
        ids,
        STEPS,
        prompt_lengths=lengths,
        extract_activations=False,
        extract_prompt=True,
    )
    assert plain.activations is None
    assert plain.prompt_activations is None
    np.testing.assert_array_equal(plain.token_ids, greedy.token_ids)


def test_captured_layers_come_in_the_order_in_which_they_were_named(greedy: Any):
    model, params = built()
    reordered: Any = create_model_with_hooks(model.config, (2, 1, 0))
    rows = np.asarray(jax.jit(reordered.apply)({"params": params}, PROMPTS[2][None])[2])
    assert rows.shape == (3, LENGTHS[2], 1, TINY.hidden)
    for of_reordered, of_greedy in ((0, 1), (2, 0)):
        expected = greedy.prompt_activations[of_greedy, : LENGTHS[2], 2]
        assert_rows_close(rows[of_reordered, :, 0], expected)


# --- Stopping -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopping(greedy: Any) -> tuple[tuple[int, ...], list[int], Any]:
    """EOS ids that end row 0 after 11 tokens and row 1 later; the lengths expected; what was generated."""
    tokens = greedy.token_ids
    eos = [int(tokens[0, 10])]
    if eos[0] not in tokens[1]:
        eos.append(int(tokens[1, 20]))
    expected = [next((t + 1 for t in range(STEPS) if row[t] in eos), STEPS) for row in tokens]
    return tuple(eos), expected, generate(PROMPTS, eos_token_ids=tuple(eos))


def test_a_sequence_ends_with_its_first_eos_token_which_is_counted_and_captured(greedy: Any, stopping):
    eos, expected, out = stopping
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(out.lengths, expected)
    for b, length in enumerate(expected):
        np.testing.assert_array_equal(out.token_ids[b, :length], greedy.token_ids[b, :length])
        np.testing.assert_allclose(out.logprobs[b, :length], greedy.logprobs[b, :length], atol=1e-5)
        assert_rows_close(out.activations[:, :length, b], greedy.activations[:, :length, b], 1e-5)
        assert bool(out.finished[b]) == (int(out.token_ids[b, length - 1]) in eos)
        assert out.activations[:, length - 1, b].any()


def test_everything_past_a_sequences_end_is_zero(stopping):
    _, expected, out = stopping
    for b, length in enumerate(expected):
        assert not out.token_ids[b, length:].any()
        assert not out.logprobs[b, length:].any()
        assert not out.activations[:, length:, b].any()


def test_a_sequence_whose_last_allowed_token_is_an_eos_token_is_finished(greedy: Any):
    first, last, would_come_next = greedy.token_ids[2, :3].tolist()
    assert len({first, last, would_come_next}) == 3
    for eos, finished in ((last, True), (would_come_next, False)):
        out = generate(PROMPTS, 2, samples_per_prompt=2, eos_token_ids=[eos])
        assert out.lengths[4:].tolist() == [2, 2]
        assert out.finished[4:].tolist() == [finished, finished]


def test_the_loop_stops_as_soon_as_every_sequence_has_ended(greedy: Any):
    model, params = built()
    ids, lengths = pad_right(PROMPTS, width=48)
    eos = greedy.token_ids[:, 0]
    prompts = check_prompts(model.config, ids, lengths, STEPS)
    sampling, own_ids = sampling_params(Sampling(), 0, eos, TINY.vocab), check_sequence_ids(3, 1, None)
    shape = GenerateShape(3, 48, STEPS, capture_prompt=True)
    program = compile_generate(model, params, shape)
    state, _ = program.prefill(params, prompts, sampling, own_ids)
    state = program.decode(params, state, sampling, own_ids)
    assert int(state.cache.ar.index) == 1
    np.testing.assert_array_equal(state.lengths, 1)


def test_a_pad_token_inside_a_prompt_is_read_as_any_other_token(greedy: Any):
    """Qwen can generate its pad token: validity comes from lengths, never from a token's value."""
    prompt = np.array([0, 5, 0, 7, 0], np.int32)
    other = np.array([9, 5, 9, 7, 0], np.int32)
    one, two = (generate([p, *PROMPTS[1:]]).activations for p in (prompt, other))
    assert row_errors(one[:, :, 0], two[:, :, 0]).min() > 1e-3


# --- Prompts, samples and the sequences beside them ---------------------------------------------------------

SAMPLING = Sampling(temperature=1.2, top_k=50, top_p=0.95)


@pytest.mark.parametrize("b", range(len(LENGTHS)), ids=[f"{n} tokens" for n in LENGTHS])
def test_different_input_lengths(greedy: Any, b: int):
    """A prompt gives beside longer and shorter ones what it gives alone."""
    alone = generate([PROMPTS[b]])
    np.testing.assert_array_equal(alone.token_ids[0], greedy.token_ids[b])
    np.testing.assert_allclose(alone.logprobs[0], greedy.logprobs[b], atol=1e-3)
    assert_rows_close(alone.activations[:, :, 0], greedy.activations[:, :, b])
    assert_rows_close(alone.prompt_activations[:, :, 0], greedy.prompt_activations[:, :, b])


def test_kv_cache_persistence(greedy: Any):
    """Through the cache, each generated token sees all those before it, as in one pass without a cache."""
    model, params = built()
    apply = jax.jit(model.apply)
    b, start = 2, LENGTHS[2]
    sequence = np.concatenate([PROMPTS[b], greedy.token_ids[b]])[None]

    def rows_of(sequence: np.ndarray) -> np.ndarray:
        return np.asarray(apply({"params": params}, sequence)[2])[:, start:, 0]

    assert_rows_close(greedy.activations[:, :, b], rows_of(sequence))
    # Not for want of looking back: a different first token is seen in every one of the rows.
    sequence[0, 0] = (sequence[0, 0] + 1) % TINY.vocab
    assert row_errors(rows_of(sequence)[-1], greedy.activations[-1, :, b]).min() > 1e-3


def test_a_sampled_sequence_does_not_depend_on_the_others_in_its_batch():
    ids = np.array([11, 22, 33])
    batch = generate(PROMPTS, sampling=SAMPLING, sequence_ids=ids, seed=9)
    alone = generate([PROMPTS[1]], sampling=SAMPLING, sequence_ids=ids[1:2], seed=9)
    others = TINY.prompts((48, 2), seed=1)
    mixed = generate(
        [others[0], others[1], PROMPTS[1]], sampling=SAMPLING, sequence_ids=np.array([7, 8, 22]), seed=9
    )
    assert_lively(batch.token_ids)
    for out, b in ((alone, 0), (mixed, 2)):
        np.testing.assert_array_equal(out.token_ids[b], batch.token_ids[1])
        np.testing.assert_allclose(out.logprobs[b], batch.logprobs[1], atol=1e-3)
        assert_rows_close(out.activations[:, :, b], batch.activations[:, :, 1])


def test_samples_of_one_prompt_are_adjacent_share_it_and_differ(greedy: Any):
    out = generate(PROMPTS, sampling=SAMPLING, samples_per_prompt=4, seed=3)
    tokens = out.token_ids
    assert tokens.shape == (12, STEPS)
    assert len({tuple(row) for row in tokens.tolist()}) == 12
    assert out.prompt_activations.shape == (2, 48, 3, TINY.hidden)
    assert_rows_close(out.prompt_activations, greedy.prompt_activations)
    # Each is what its prompt gives alone, under the same id.
    for b in (0, 6, 11):
        alone = generate([PROMPTS[b // 4]], sampling=SAMPLING, sequence_ids=np.array([b]), seed=3)
        np.testing.assert_array_equal(alone.token_ids[0], tokens[b])
        assert_rows_close(alone.activations[:, :, 0], out.activations[:, :, b])


def test_tokens_are_decided_by_the_seed_and_the_sequence_id_which_counts_from_0_by_default():
    first = generate(PROMPTS, sampling=SAMPLING, seed=3)
    np.testing.assert_array_equal(
        generate(PROMPTS, sampling=SAMPLING, seed=3, sequence_ids=[0, 1, 2]).token_ids, first.token_ids
    )
    for changed in ({"seed": 4}, {"seed": 3, "sequence_ids": [3, 4, 5]}):
        other = generate(PROMPTS, sampling=SAMPLING, **changed).token_ids
        assert (other != first.token_ids).any(1).all()


def test_every_step_draws_with_a_random_key_of_its_own():
    """At a temperature that drowns the logits, one key for every step would draw one token for ever."""
    out = generate(PROMPTS, sampling=Sampling(1e4))
    assert_lively(out.token_ids, distinct=35)


# --- The other paths ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_uncompiled_python_loop_gives_the_same():
    kwargs: dict[str, Any] = {
        "samples_per_prompt": 2,
        "sampling": SAMPLING,
        "seed": 5,
        "extract_prompt": True,
    }
    some = generate(PROMPTS, 2, eos_token_ids=(0,), **kwargs)
    kwargs["eos_token_ids"] = some.token_ids[:1, 0]  # the first row's first token: it ends before others
    fast = generate(PROMPTS, 2, **kwargs)
    ids, lengths = pad_right(PROMPTS, width=48)
    slow: Any = generate_single_task_python(*built(), ids, 2, prompt_lengths=lengths, **kwargs)
    assert len(set(fast.lengths.tolist())) > 1
    for name in ("token_ids", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(slow, name), getattr(fast, name))
    np.testing.assert_allclose(slow.logprobs, fast.logprobs, atol=1e-4)
    assert_rows_close(slow.activations, fast.activations)
    assert_rows_close(slow.prompt_activations, fast.prompt_activations)


def test_a_model_for_fixed_caches_makes_no_growing_cache():
    model, params = built()
    fixed = QwenModel(model.config.replace(use_fixed_cache=True))
    logits, caches = fixed.apply({"params": params}, PROMPTS[1][None])
    assert caches is None
    assert logits.shape == (1, LENGTHS[1], TINY.vocab)


def test_capturing_activations_does_not_change_the_logits():
    model, params = built()
    ids = PROMPTS[1][None]
    logits, _, rows = model.apply({"params": params}, ids)
    bare, _ = model.apply({"params": params}, ids, return_activations=False)
    base, _ = QwenModel(model.config).apply({"params": params}, ids)
    assert rows.shape == (2, ids.size, 1, TINY.hidden)
    np.testing.assert_array_equal(logits, bare)
    np.testing.assert_array_equal(logits, base)


# --- bfloat16 -----------------------------------------------------------------------------------------------

# Relative error of a row of the 24-layer lively model in bfloat16, weights and residual stream, against the
# same (rounded) weights in float32: measured 0.04 (layer 10) to 0.08 (layer 23) at the median token, 0.14 at
# the worst, and 0.27 with scanned layers. Lively weights amplify rounding from layer to layer.
BF16_MEDIAN, BF16_WORST = 0.12, 0.4
# The same rows by way of the fixed cache and by a plain forward pass, both in bfloat16, differ only in the
# order of their sums: measured 0.02 to 0.035 at the median token, 0.07 at the worst.
BF16_PATHS_MEDIAN, BF16_PATHS_WORST = 0.06, 0.15


@pytest.fixture(scope="module")
def half() -> tuple[Any, Any, Any, np.ndarray]:
    """One sequence's rows [14, tokens, hidden]: float32, bfloat16, bfloat16 while generating; its prompt."""
    model, params = DEEP.build(jnp.bfloat16, scan_layers=True)
    wide = model.clone(config=model.config.replace(dtype=jnp.float32))
    prompt = DEEP.prompts((40,))[0]
    out: Any = generate_single_task_jitted(model, params, prompt[None], STEPS)
    sequence = np.concatenate([prompt, out.token_ids[0]])[None]
    _, _, rows = jax.jit(model.apply)({"params": params}, sequence)
    wide_params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    _, _, wide_rows = jax.jit(wide.apply)({"params": wide_params}, sequence)
    wide_rows, rows, generated = (np.asarray(a)[:, :, 0] for a in (wide_rows, rows, out.activations))
    return wide_rows, rows, generated, prompt


@pytest.mark.slow
def test_bfloat16_rows_are_within_known_bounds_of_float32_rows(half):
    wide, rows, _, _ = half
    assert rows.dtype == jnp.bfloat16
    errors = row_errors(rows, wide)
    assert np.median(errors, axis=1).max() < BF16_MEDIAN
    assert errors.max() < BF16_WORST


@pytest.mark.slow
def test_bfloat16_rows_of_generation_are_close_to_those_of_one_forward_pass(half):
    _, rows, generated, prompt = half
    assert generated.dtype == jnp.bfloat16
    errors = row_errors(generated, rows[:, len(prompt) :])
    assert np.median(errors, axis=1).max() < BF16_PATHS_MEDIAN
    assert errors.max() < BF16_PATHS_WORST


def test_the_cache_may_be_bfloat16_beside_a_float32_model(greedy: Any):
    out = generate(PROMPTS, 8, cache_dtype="bfloat16")
    assert out.activations.dtype == jnp.float32
    # Only keys and values are rounded: less than in a model that is bfloat16 throughout.
    first = row_errors(out.activations[:, 0], greedy.activations[:, 0])
    assert 1e-5 < first.max() < 2e-2
    shape = GenerateShape(3, 48, 8)
    full, halved = (
        GenerateShape(3, 48, 8, cache_dtype=dtype).cache_config(built()[0].config).nbytes
        for dtype in (None, np.dtype("bfloat16"))
    )
    assert full - 28 == 2 * (halved - 28)  # lengths, starts and the index are int32
    buffers = 4 * TINY.hidden * len(TINY.extract) * 8 * 3
    assert shape.nbytes(built()[0]) == full + buffers


# --- Prompts on the host ------------------------------------------------------------------------------------


def test_prompt_widths_are_rounded_up_to_four_sizes_a_power_of_two():
    assert [bucket_length(n) for n in (1, 64, 65, 96, 97, 128, 129, 200, 256, 257, 8000)] == [
        64, 64, 96, 96, 128, 128, 160, 224, 256, 320, 8192,
    ]  # fmt: skip
    widths = {bucket_length(n) for n in range(1, 10_000)}
    assert all(bucket_length(width) == width for width in widths)
    assert all(n <= bucket_length(n) < max(1.25 * n, n + 64) for n in range(1, 10_000))
    assert len(widths) == 28


def test_prompts_are_padded_on_the_right():
    ids, lengths = pad_prompts([[1, 2, 3], np.arange(70)])
    assert ids.shape == (2, 96)
    assert ids.dtype == lengths.dtype == np.int32
    assert lengths.tolist() == [3, 70]
    assert ids[0, :4].tolist() == [1, 2, 3, 0]
    assert ids[1, :70].tolist() == list(range(70))
    with pytest.raises(ValueError, match="There are no prompts"):
        pad_prompts([])
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        pad_prompts([[1], []])


def test_prompts_may_be_jax_arrays_or_lists_with_anything_as_padding(greedy: Any):
    model, params = built()
    ids, lengths = pad_right(PROMPTS, width=48, fill=-100)  # what fills the padding is nobody's business
    for given in (jnp.asarray(ids), ids.astype(np.int64), ids.tolist()):
        out = generate_single_task_jitted(
            model, params, given, STEPS, prompt_lengths=list(lengths), extract_prompt=True
        )
        np.testing.assert_array_equal(out.token_ids, greedy.token_ids)


def test_an_attention_mask_gives_what_prompts_without_padding_give(greedy: Any):
    model, params = built()
    right, _ = pad_right(PROMPTS, width=48)
    mask = np.arange(48) < np.array(LENGTHS)[:, None]
    left = np.stack([np.roll(row, 48 - length) for row, length in zip(right, LENGTHS, strict=True)])
    given: dict[str, Any]
    for given in (
        {"input_ids": right, "attention_mask": mask.astype(np.int64)},
        {"input_ids": left, "attention_mask": mask[:, ::-1]},
        {"input_ids": {"input_ids": left, "attention_mask": mask[:, ::-1].tolist()}},
    ):
        out = generate_single_task_jitted(
            model, params, given.pop("input_ids"), STEPS, extract_prompt=True, **given
        )
        for one, expected in zip(jax.tree.leaves(out), jax.tree.leaves(greedy), strict=True):
            np.testing.assert_array_equal(one, expected)


def test_a_forward_pass_takes_padding_on_the_left_by_its_mask():
    model, params = built()
    prompt = PROMPTS[1]
    padded = np.concatenate([np.full(7, 3, np.int32), prompt])[None]
    mask = (np.arange(padded.size) >= 7)[None].astype(int)
    apply = jax.jit(model.apply)
    logits, _, rows = apply({"params": params}, padded, mask)
    expected, _, expected_rows = apply({"params": params}, prompt[None])
    assert row_errors(logits[:, 7:], expected).max() < 1e-4
    assert row_errors(rows[:, 7:], expected_rows).max() < 1e-4


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((1, 5)),
        np.ones((1, 4), int),
        np.ones((2, 5), int),
        np.ones((1, 1, 5, 5), int),
        np.ones(5, int),
    ],
    ids=["floats", "short", "rows", "4 axes", "1 axis"],
)
def test_a_forward_pass_refuses_a_mask_that_does_not_fit(mask: np.ndarray):
    model, params = built()
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 5\], integers or booleans"):
        model.apply({"params": params}, np.ones((1, 5), np.int32), mask)


def test_fixed_caches_refuse_the_masks_that_they_cannot_keep():
    model, params = built()
    cache = create_kv_cache_buffers(model.config.kv_cache(5, 4))
    with pytest.raises(ValueError, match=r"A prefill's attention_mask must have its padding on the right"):
        model.apply({"params": params}, np.ones((1, 5), np.int32), np.array([[0, 1, 1, 1, 1]]), cache.prefill)
    with pytest.raises(ValueError, match="A decode step takes no attention_mask"):
        model.apply({"params": params}, np.ones((1, 1), np.int32), np.ones((1, 1), int), cache)


# --- Prompts alone ------------------------------------------------------------------------------------------


def test_without_tokens_the_prompts_rows_come_and_no_loop_is_compiled(greedy: Any):
    ids, lengths = pad_right(PROMPTS, width=48)
    sampling = Sampling(0.7, repetition_penalty=1.1)
    for samples, extra in ((1, {}), (2, {"eos_token_ids": (3,), "sampling": sampling, "seed": 5})):
        out = generate(PROMPTS, 0, samples_per_prompt=samples, **extra)
        np.testing.assert_array_equal(out.prompt_activations, greedy.prompt_activations)
        assert out.token_ids.shape == out.logprobs.shape == (3 * samples, 0)
        np.testing.assert_array_equal(out.lengths, [0] * 3 * samples)
        assert not out.finished.any()
        assert out.layer(2, row=1).shape == (0, TINY.hidden)
        assert out.tokens(1) == []
    shape = GenerateShape(3, 48, 0, stop=False, capture_prompt=True)
    assert len(compile_generate(*built(), shape).programs) == 1
    old = generate_single_task_python(*built(), ids, 0, prompt_lengths=lengths, extract_prompt=True)
    assert old.token_ids.shape == (3, 0)
    assert_rows_close(old.prompt_activations, greedy.prompt_activations)


def test_without_tokens_the_rows_of_other_points_come_too():
    model, params = built()
    ids, lengths = pad_right(PROMPTS, width=48)
    hooked = create_model_with_hooks(model.config, (), points={"hook_mlp_out": [1]})
    few, none = (
        generate_single_task_jitted(hooked, params, ids, tokens, prompt_lengths=lengths, extract_prompt=True)
        for tokens in (1, 0)
    )
    np.testing.assert_array_equal(none.prompt_points["hook_mlp_out"], few.prompt_points["hook_mlp_out"])
    assert none.points["hook_mlp_out"].shape == (1, 0, 3, TINY.hidden)


def test_a_prompt_may_fill_the_whole_context_where_nothing_is_generated():
    check_prompts(TINY.config(max_position_embeddings=5), IDS, None, 0)
    with pytest.raises(ValueError, match="exceed the model's context of 5"):
        check_prompts(TINY.config(max_position_embeddings=5), IDS, None, 1)


def test_prompts_that_give_nan_are_told_where_the_user_looks_for_nan():
    model, params = built()
    spoiled = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="computed NaN"):
        generate_single_task_jitted(model, spoiled, np.ones((1, 48), np.int32), 0, extract_prompt=True)


# --- What is refused ----------------------------------------------------------------------------------------

IDS = np.ones((2, 5), np.int32)


@pytest.mark.parametrize("function", [generate_single_task_jitted, generate_single_task_python])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": np.ones((2, 1, 5), np.int32)}, r"integers \[prompts, tokens\], not int32 of shape"),
        ({"input_ids": np.ones((2, 5))}, r"input_ids must be integers \[prompts, tokens\], not float64"),
        ({"input_ids": np.ones((0, 5), np.int32)}, "holds no prompts"),
        ({"input_ids": np.ones((2, 0), np.int32)}, "Prompt 0 is empty"),
        ({"prompt_lengths": [5, 0]}, "Prompt 1 is empty; every prompt needs at least one token"),
        ({"prompt_lengths": [5, -1]}, "Prompt 1 is empty"),
        ({"prompt_lengths": [5, 6]}, "Prompt 1 is said to have 6 tokens, but input_ids is only 5 wide"),
        ({"prompt_lengths": [5]}, r"prompt_lengths must be 2 integers, one a prompt, not .*of shape \(1,\)"),
        ({"prompt_lengths": [5.0, 5.0]}, "prompt_lengths must be 2 integers"),
        ({"max_tokens": -1}, "max_tokens must be at least 0, not -1"),
        ({"max_tokens": 0}, "max_tokens 0 generates nothing, .* say extract_prompt=True"),
        ({"max_tokens": 32764}, "5 tokens and 32764 new ones exceed the model's context of 32768"),
        ({"input_ids": np.full((2, 5), 160)}, r"Token id 160 \(prompt 0, position 0\) is outside .* 160"),
        ({"input_ids": np.array([[1, 2], [3, -1]])}, r"Token id -1 \(prompt 1, position 1\) is outside"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, not 1.5"),
        ({"max_tokens": "16"}, "max_tokens must be a whole number, not '16'"),
        ({"samples_per_prompt": True}, "samples_per_prompt must be a whole number, not True"),
        ({"extract_prompt": "no"}, "extract_prompt must be True or False, not 'no'"),
        ({"sampling": 0.7}, "sampling must be a Sampling"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"attention_mask": np.ones((2, 4), int)}, "attention_mask must have the shape of input_ids"),
        ({"input_ids": ["2 + 2 ="]}, r"tokenizer\(text\).input_ids gives them"),
        ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1, not 0"),
        (
            {"sequence_ids": [1]},
            r"sequence_ids must be 2 integers, one a sequence, not .*of shape \(1,\)",
        ),
        ({"sequence_ids": [1.0, 2.0]}, "sequence_ids must be 2 integers"),
        ({"eos_token_ids": (160,)}, "EOS token id 160 is outside the vocabulary of 160"),
        ({"eos_token_ids": (-1,)}, "EOS token id -1 is outside"),
        ({"seed": -1}, r"seed must be between 0 and 2\*\*32 - 1, not -1"),
        ({"seed": 2**32}, "seed must be between"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_before_the_weights_are_touched(
    function, changes: dict[str, Any], message: str
):
    request: dict[str, Any] = {"input_ids": IDS, "max_tokens": 4} | changes
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(function)(  # without the checks of types, which are the tests' own
            built()[0], None, request.pop("input_ids"), request.pop("max_tokens"), **request
        )


def test_a_model_without_hooks_is_refused_when_activations_are_wanted():
    with pytest.raises(ValueError, match="make it with create_model_with_hooks"):
        generate_single_task_jitted(QwenModel(TINY.config()), None, IDS, 4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((3,), r"extract_layers \[3\] are out of range: the model has 3 layers, 0 to 2"),
        ((0, -1), r"extract_layers \[-1\] are out of range"),
        ((0, 10, 23), r"extract_layers \[10, 23\] are out of range: the model has 3 layers"),
        ((), "at least one layer"),
        ((1, 1), "none twice"),
    ],
    ids=str,
)
def test_layers_that_the_model_does_not_have_are_refused(layers: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        create_model_with_hooks(TINY.config(), layers)


def test_a_model_without_the_layers_of_the_default_says_how_many_it_has():
    for depth in (1, 23):
        sentence = (
            f"by default the layers 10 to 23 are captured, and this model has {depth}, 0 to {depth - 1}:"
        )
        with pytest.raises(ValueError, match=f"^extract_layers: {sentence} name those that you want.$"):
            create_model_with_hooks(TINY.config(num_hidden_layers=depth))
    for depth in (24, 28, 64):
        model = create_model_with_hooks(TINY.config(num_hidden_layers=depth))
        assert model.capture_layers == tuple(range(10, 24))


def test_the_model_refuses_input_ids_of_one_dimension():
    model, params = built()
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, tokens\], not of shape \(5,\)"):
        model.apply({"params": params}, np.ones(5, np.int32))


def test_an_id_outside_the_vocabulary_gives_nan_and_not_a_neighbours_row():
    model, params = built()
    for token, outside in ((TINY.vocab, True), (-1, True), (2**32 + 5, True), (TINY.vocab - 1, False)):
        ids = np.append(PROMPTS[1][:-1].astype(np.int64), token)[None]  # of a shape that has been compiled
        logits, _ = model.apply({"params": params}, ids, return_activations=False)
        assert np.isnan(logits)[0, -1].mean() == outside
