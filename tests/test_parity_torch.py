"""Live parity with Transformers on torch, in float32: tokens, logits and every captured row.

The rows are those of forward hooks on the torch decoder layers, the last one included: Transformers'
``hidden_states[-1]`` is the value after the final norm, which is something else. RoPE is relative, so a
shift of all positions by one is invisible; what is tested is the seam between prompt and decode.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import pytest
from lively import DEEP, SHALLOW, THREE, Lively, assert_lively, pad_right, row_errors

from generate_jitted import (
    GenerateShape,
    Generation,
    Sampling,
    decode_step_with_cache,
    generate_single_task_jitted,
    prefill_with_cache,
)
from kvcache_utils import KVCache, advance_ar_index, create_kv_cache_buffers
from qwen2_core.kernels.attention import attend_two_part
from qwen2_core.weights import load_qwen2
from qwen2_jax import convert_hf_to_jax_weights, stack_layers

pytest.importorskip("torch", reason="live parity needs torch: pip install '.[parity]'")
from torch_reference import TorchReference

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
STEPS = 64
Step = Callable[..., tuple[Any, Any, Any]]  # of decode_step_with_cache without its model
LENGTHS = (1, 2, 17, 64, 127, 128, 129, 300)
SAMPLES = 8

SMALL = "6 layers scanned, MQA, untied"
MODELS = {
    "24 layers scanned, GQA, tied": DEEP,
    "6 layers scanned, MHA, untied": dataclasses.replace(SHALLOW, kv_heads=4, tied=False, seed=1),
    SMALL: dataclasses.replace(SHALLOW, kv_heads=1, tied=False, seed=2),
    "3 layers, 14 heads on 2, tied, layers out of order": dataclasses.replace(
        SHALLOW, layers=3, heads=14, hidden=112, inner=160, extract=(2, 0, 1), seed=4
    ),
    "Qwen3, 4 layers scanned, GQA, tied": dataclasses.replace(THREE, extract=(0, 1, 2, 3)),
    "Qwen3, 3 layers, 6 heads on 2, untied, layers out of order": dataclasses.replace(
        THREE, layers=3, heads=6, tied=False, extract=(2, 0, 1), seed=12
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on both sides, what we generated from it, and the reference's view of the same sequences."""

    lively: Lively
    torch: TorchReference
    model: Any
    params: Any

    @property
    def prompts(self) -> list[np.ndarray]:
        return self.lively.prompts(LENGTHS)

    def generate(self, **kwargs: Any) -> Generation:
        # Padded with a token that exists, so that a slot read past a prompt's end would change the result.
        ids, lengths = pad_right(self.prompts, fill=self.lively.vocab - 1)
        return generate_single_task_jitted(
            self.model,
            self.params,
            ids,
            STEPS,
            prompt_lengths=lengths,
            samples_per_prompt=SAMPLES,
            extract_prompt=True,
            **kwargs,
        )

    def forward(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The reference's logits [B, n, vocab] and chosen rows [layers, B, n, hidden] of whole sequences."""
        logits, rows = self.torch.forward(sequences)
        return logits, rows[list(self.lively.extract)]

    @functools.cached_property
    def out(self) -> Generation:
        """Greedy: all samples of a prompt are the same."""
        return self.generate()

    @functools.cached_property
    def reference(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each prompt and what followed it, logits [n, vocab] and rows [layers, n, hidden]."""
        result = []
        for prompt, tokens in zip(self.prompts, np.asarray(self.out.token_ids)[::SAMPLES], strict=True):
            logits, rows = self.forward(np.concatenate([prompt, tokens])[None])
            result.append((logits[0], rows[:, 0]))
        return result


@functools.cache
def build_case(name: str) -> Case:
    lively = MODELS[name]
    torch_model = TorchReference(lively)
    model, _ = lively.build()
    params = convert_hf_to_jax_weights(torch_model.model, model.config)
    if "scanned" in name:
        model, params = model.clone(config=model.config.replace(scan_layers=True)), stack_layers(params)
    return Case(lively, torch_model, model, params)


# The deep model takes longer than all others together.
def cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if MODELS[name] is DEEP else []) for name in names]


@pytest.fixture(params=cases(MODELS))
def case(request) -> Case:
    return build_case(request.param)


def test_greedy_tokens_are_those_of_transformers(case: Case):
    assert_lively(case.out.token_ids)
    np.testing.assert_array_equal(case.out.lengths, STEPS)
    # With Transformers' own loop and cache,
    expected = case.torch.greedy(case.prompts, STEPS)
    np.testing.assert_array_equal(case.out.token_ids, expected.repeat(SAMPLES, axis=0))
    # and by induction: each token is the reference's choice after all those before it.
    for prompt, tokens, (logits, _) in zip(case.prompts, expected, case.reference, strict=True):
        np.testing.assert_array_equal(tokens, logits.argmax(-1)[len(prompt) - 1 : -1])


def test_every_generated_row_is_that_of_the_hooked_torch_layer(case: Case):
    rows = np.asarray(case.out.activations)
    assert rows.shape == (len(case.lively.extract), STEPS, len(LENGTHS) * SAMPLES, case.lively.hidden)
    for b in range(rows.shape[2]):
        expected = case.reference[b // SAMPLES][1][:, LENGTHS[b // SAMPLES] :]
        assert row_errors(rows[:, :, b], expected).max() < TOLERANCE


def test_every_prompt_row_is_that_of_the_hooked_torch_layer(case: Case):
    rows = np.asarray(case.out.prompt_activations)
    assert rows.shape == (len(case.lively.extract), max(LENGTHS), len(LENGTHS), case.lively.hidden)
    for b, prompt in enumerate(case.prompts):
        n = len(prompt)
        assert row_errors(rows[:, :n, b], case.reference[b][1][:, :n]).max() < TOLERANCE
        assert not rows[:, n:, b].any()


def test_prompt_rows_and_logits_are_as_near_the_truth_as_transformers_own_float32(case: Case):
    """The truth is computed in float64: no error of ours, the largest and the median, is twice theirs."""
    tokens = np.asarray(case.out.token_ids)[::SAMPLES]
    for b, prompt in enumerate(case.prompts):
        n = len(prompt)
        logits, rows = case.torch.forward_float64(np.concatenate([prompt, tokens[b]])[None])
        assert rows.dtype == np.float64
        true = rows[list(case.lively.extract), 0]
        ours = np.concatenate(
            [case.out.prompt_activations[:, :n, b], case.out.activations[:, :, b * SAMPLES]], axis=1
        )
        got = row_errors(ours, true), row_errors(case.reference[b][1], true)
        for layer, (mine, theirs) in enumerate(zip(*got, strict=True)):
            assert mine.max() < 2 * theirs.max(), (n, layer)
            assert np.median(mine) < 2 * np.median(theirs), (n, layer)
        np.testing.assert_array_equal(tokens[b], logits[0].argmax(-1)[n - 1 : -1])


def test_samples_of_one_prompt_differ_and_each_has_the_rows_and_logprobs_of_transformers(case: Case):
    out = case.generate(sampling=Sampling(temperature=1.0), seed=1)
    tokens, rows = np.asarray(out.token_ids), np.asarray(out.activations)
    assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)
    for i, prompt in enumerate(case.prompts):
        of_prompt = slice(i * SAMPLES, (i + 1) * SAMPLES)
        sequences = np.concatenate([np.tile(prompt, (SAMPLES, 1)), tokens[of_prompt]], axis=1)
        logits, expected = case.forward(sequences)
        errors = row_errors(rows[:, :, of_prompt].swapaxes(1, 2), expected[:, :, len(prompt) :])
        assert errors.max() < TOLERANCE
        logprobs = log_softmax(logits[:, len(prompt) - 1 : -1])
        chosen = np.take_along_axis(logprobs, tokens[of_prompt, :, None], axis=-1)[..., 0]
        np.testing.assert_allclose(out.logprobs[of_prompt], chosen, atol=1e-3)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    "name", cases(name for name, lively in MODELS.items() if lively.layers - 1 in lively.extract)
)
def test_the_last_layers_row_is_taken_before_the_final_norm(name: str):
    case = build_case(name)
    b, last = len(LENGTHS) - 1, case.lively.layers - 1
    tokens = np.concatenate([case.prompts[b], case.out.token_ids[b * SAMPLES]])
    rows = np.asarray(case.out.activations)[case.lively.extract.index(last), :, b * SAMPLES]
    hooked, after_norm = case.torch.last_layer(tokens)
    assert row_errors(rows, hooked[LENGTHS[b] :]).max() < TOLERANCE
    assert row_errors(rows, after_norm[LENGTHS[b] :]).min() > 0.1


# --- Prefill and decode step by hand, one sample of each prompt: the logits of every step -------------------


@functools.cache
def prefilled(case_name: str) -> tuple[Any, Any]:
    """The prompts' last logits [B, vocab] and the cache after them."""
    case = build_case(case_name)
    shape = GenerateShape(len(LENGTHS), max(LENGTHS), STEPS)
    cache = create_kv_cache_buffers(shape.cache_config(case.model.config))
    ids, lengths = pad_right(case.prompts, fill=7)
    prefill = jax.jit(functools.partial(prefill_with_cache, case.model))
    return prefill(case.params, ids, lengths, cache)[:2]


def compile_step(case_name: str) -> Step:
    """A fresh function, so that nothing compiled before a fault was planted is used again."""
    return jax.jit(functools.partial(decode_step_with_cache, build_case(case_name).model))


sound_step = functools.cache(compile_step)


def stepwise(case_name: str, step: Step, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Teacher-forced over what was generated.

    Returns:
        logits [steps + 1, B, vocab] and rows [steps, layers, B, hidden].
    """
    case = build_case(case_name)
    tokens = np.asarray(case.out.token_ids)[::SAMPLES]
    out, cache = prefilled(case_name)
    logits, rows = [out], []
    for t in range(steps):
        out, cache, captured = step(case.params, tokens[:, t], cache)
        logits.append(out)
        rows.append(captured)
    return np.stack(logits), np.stack(rows)


def stepwise_errors(case_name: str, logits: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Largest relative error of any logits and of any row."""
    case = build_case(case_name)
    steps = len(rows)
    logit_error, row_error = 0.0, 0.0
    for b, prompt in enumerate(case.prompts):
        n = len(prompt)
        expected, expected_rows = case.reference[b]
        logit_error = max(logit_error, row_errors(logits[:, b], expected[n - 1 : n + steps]).max())
        row_error = max(
            row_error, row_errors(rows[:, :, b].swapaxes(0, 1), expected_rows[:, n : n + steps]).max()
        )
    return logit_error, row_error


@pytest.mark.parametrize("name", cases(MODELS))
def test_logits_of_prefill_and_of_every_decode_step_are_those_of_transformers(name: str):
    logits, rows = stepwise(name, sound_step(name), STEPS)
    assert max(stepwise_errors(name, logits, rows)) < TOLERANCE
    # Greedy, one sample of a prompt is what eight are.
    tokens = np.asarray(build_case(name).out.token_ids).reshape(len(LENGTHS), SAMPLES, STEPS)
    np.testing.assert_array_equal(logits[:-1].argmax(-1).T[:, None].repeat(SAMPLES, axis=1), tokens)


class TestPlantedFaults:
    """The comparison sees the faults that it is there for."""

    def assert_seen(self, step: Step) -> None:
        assert min(stepwise_errors(SMALL, *stepwise(SMALL, step, steps=4))) > 100 * TOLERANCE

    def test_finds_decode_positions_that_are_one_too_high(self, monkeypatch):
        def shifted(cache: KVCache):
            return cache.prefill.length + cache.ar.index + 1

        monkeypatch.setattr(KVCache, "positions", property(shifted))
        self.assert_seen(compile_step(SMALL))

    def test_finds_an_index_that_advances_twice_a_token(self):
        def step(*args: Any) -> tuple[Any, Any, Any]:
            logits, cache, rows = sound_step(SMALL)(*args)
            return logits, advance_ar_index(cache), rows

        self.assert_seen(step)

    def test_finds_a_decode_step_that_reads_one_position_of_padding(self, monkeypatch):
        def lengthened(q, cache, layer, window):
            prefill = dataclasses.replace(cache.prefill, length=cache.prefill.length + 1)
            return attend_two_part(q, dataclasses.replace(cache, prefill=prefill), layer, window)

        monkeypatch.setattr("qwen2_jax.attend_two_part", lengthened)
        self.assert_seen(compile_step(SMALL))


# --- Checkpoints on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        SMALL,
        "3 layers, 14 heads on 2, tied, layers out of order",
        "Qwen3, 3 layers, 6 heads on 2, untied, layers out of order",
    ],
)
@pytest.mark.parametrize("shards", ["one file", "sharded"])
def test_a_checkpoint_saved_by_transformers_loads_as_the_live_model(name: str, shards: str, tmp_path):
    case = build_case(name)
    case.torch.model.save_pretrained(tmp_path, max_shard_size="50KB" if shards == "sharded" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shards == "sharded")
    config, params = load_qwen2(tmp_path, scan_layers=case.model.config.scan_layers)
    # Transformers drops the width of a window that is not in use.
    assert config.replace(sliding_window=None) == case.model.config.replace(sliding_window=None)
    assert jax.tree.structure(params) == jax.tree.structure(case.params)
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
