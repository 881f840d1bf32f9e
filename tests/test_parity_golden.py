"""Parity with what Transformers computed once: the same model from its seed, no torch (make_golden.py)."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy
from golden_cases import CASES, FOLDER, LENGTHS, LOGIT_STRIDE, STEPS, check_values
from lively import Lively, assert_lively, pad_right, row_errors

from generate_jitted import (
    GenerateShape,
    Generation,
    decode_step_with_cache,
    generate_single_task_jitted,
    prefill_with_cache,
)
from kvcache_utils import create_kv_cache_buffers

TOLERANCE = 1e-4


@functools.cache
def generated(name: str) -> tuple[Lively, Generation, dict[str, np.ndarray]]:
    lively = CASES[name]
    # The deep one scanned, which compiles in half the time; unrolled it is compared with torch itself.
    model, params = lively.build(scan_layers=lively.layers > 6)
    ids, lengths = pad_right(lively.prompts(LENGTHS))
    out = generate_single_task_jitted(model, params, ids, STEPS, prompt_lengths=lengths, extract_prompt=True)
    return lively, out, safetensors.numpy.load_file(FOLDER / f"{name}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_recorded_from_transformers(name: str):
    _, out, golden = generated(name)
    assert_lively(out.token_ids)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(out.token_ids[b], golden[f"{n}.tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_row_of_prompt_and_generated_tokens_is_that_recorded_from_transformers(name: str):
    lively, out, golden = generated(name)
    for b, n in enumerate(LENGTHS):
        rows = np.concatenate(
            [np.asarray(out.prompt_activations)[:, :n, b], np.asarray(out.activations)[:, :, b]], axis=1
        )
        got, expected = check_values(rows, lively), golden[f"{n}.rows"]
        assert got.shape == expected.shape == (len(lively.extract), n + STEPS, 5)
        # Relative to the whole row, of which the first value is the norm.
        errors = np.linalg.norm(got - expected, axis=-1) / expected[..., 0]
        assert errors.max() < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_logprobs_are_those_of_the_recorded_logits(name: str):
    _, out, golden = generated(name)
    for b, n in enumerate(LENGTHS):
        chosen = golden[f"{n}.tokens"][::LOGIT_STRIDE, None]
        logits = golden[f"{n}.logits"][: len(chosen)].astype(np.float64)
        expected = np.take_along_axis(logits, chosen, -1) - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(out.logprobs[b, ::LOGIT_STRIDE], expected[:, 0], atol=1e-3)


def test_logits_of_prefill_and_decode_steps_are_those_recorded_from_transformers():
    lively, out, golden = generated("mqa_untied")
    model, params = lively.build(scan_layers=True)
    shape = GenerateShape(len(LENGTHS), max(LENGTHS), STEPS)
    cache = create_kv_cache_buffers(shape.cache_config(model.config))
    ids, lengths = pad_right(lively.prompts(LENGTHS))
    logits, cache, _ = jax.jit(functools.partial(prefill_with_cache, model))(params, ids, lengths, cache)
    step = jax.jit(functools.partial(decode_step_with_cache, model), donate_argnums=2)
    steps = [logits]
    for t in range(STEPS):
        logits, cache, _ = step(params, out.token_ids[:, t], cache)
        steps.append(logits)
    for b, n in enumerate(LENGTHS):
        got = np.stack(steps)[::LOGIT_STRIDE, b]
        assert row_errors(got, golden[f"{n}.logits"]).max() < TOLERANCE


def test_the_golden_files_stay_below_300_kb():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 300_000
