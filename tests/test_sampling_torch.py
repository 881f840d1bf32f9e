"""Live parity with Transformers' own logits processors and generation, on torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import Lively, assert_lively, pad_right

from generate_jitted import Sampling, generate_single_task_jitted
from qwen2_core.sampling import sample_tokens, sampling_params, sequence_keys, tokens_in
from qwen2_engine import ContinuousEngine, SequenceRequest

pytest.importorskip("torch", reason="live parity needs torch: pip install '.[parity]'")
import torch
from torch_reference import TorchReference
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

pytestmark = pytest.mark.slow

VOCAB, DRAWS, STEPS = 40, 20_000, 64
MODEL = Lively(layers=3, extract=(0, 2), seed=5)


def probabilities(sampling: Sampling, logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """What Transformers would draw from after ``tokens``, its processors in its own order."""
    steps = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
        TopPLogitsWarper(sampling.top_p),
        MinPLogitsWarper(sampling.min_p),
    ]
    if sampling.top_k:
        steps.insert(2, TopKLogitsWarper(sampling.top_k))
    seen: Any = torch.tensor([tokens])
    scores: Any = LogitsProcessorList(steps)(seen, torch.from_numpy(logits[None]).double())
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, min_p=0.05),
        Sampling(1.7, min_p=0.2),
        Sampling(0.8, repetition_penalty=1.3),
        Sampling(0.8, repetition_penalty=0.7),
        Sampling(1.3, top_k=12, top_p=0.9, min_p=0.03, repetition_penalty=1.2),
        Sampling(0.7, top_k=20, top_p=0.8, repetition_penalty=1.1),  # Qwen2.5's generation_config.json
    ],
    ids=Sampling.describe,
)
def test_tokens_come_as_often_as_after_transformers_processors(sampling: Sampling):
    logits = np.random.default_rng(6).normal(scale=2, size=VOCAB).astype(np.float32)
    tokens = [3, 9, 9, 31, *np.argsort(logits)[-3:].tolist(), int(logits.argmin())]
    expected = probabilities(sampling, logits, tokens)
    prompts = jnp.array([[*tokens, 0, 0]], jnp.int32)  # padded
    seen = np.asarray(tokens_in(prompts, jnp.array([len(tokens)], jnp.int32), VOCAB))
    keys = jax.jit(sequence_keys)(np.uint32(1), np.arange(DRAWS, dtype=np.uint32))
    traced = sampling_params(sampling, 0, (), VOCAB)
    rows = np.tile(logits, (DRAWS, 1))
    drawn, _ = jax.jit(sample_tokens)(rows, traced, keys, 0, np.tile(seen, (DRAWS, 1)))
    counts = np.bincount(drawn, minlength=VOCAB)
    assert not counts[expected == 0].any()
    deviation = np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(counts - DRAWS * expected) / np.maximum(deviation, 1)).max() < 4.5
    assert counts[expected > 0.001].all()


def test_greedy_tokens_with_a_penalty_are_those_of_transformers_generation():
    reference = TorchReference(MODEL)
    model, params = MODEL.build(scan_layers=True)
    prompts = MODEL.prompts((1, 17, 64))
    ids, lengths = pad_right(prompts, fill=7)
    for penalty in (1.1, 1.5, 0.8):
        sampling = Sampling(repetition_penalty=penalty)
        # One by one: in a batch Transformers takes its padding for tokens of the prompts.
        expected = [reference.greedy([one], STEPS, repetition_penalty=penalty)[0] for one in prompts]
        if penalty > 1:
            assert_lively(expected)
        out = generate_single_task_jitted(
            model, params, ids, STEPS, prompt_lengths=lengths, sampling=sampling
        )
        np.testing.assert_array_equal(out.token_ids, expected)
        engine = ContinuousEngine(model, params, slots=2, max_tokens=STEPS, sampling=sampling)
        requests = [SequenceRequest(one, STEPS, sampling_id=i, id=i) for i, one in enumerate(prompts)]
        for one in engine.run(requests):
            np.testing.assert_array_equal(one.token_ids, expected[one.id])  # pyright: ignore
