"""A repetition penalty in the compiled call, the old loop and slots: of a sequence's own tokens alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from lively import Lively, assert_lively, pad_right, row_errors

import generate_jitted
from activation_store import FinishedSequence
from generate_jitted import GenerateShape, Sampling, generate_single_task_jitted, lower_generate
from qwen2_core.kernels.matmul import compiler_options
from qwen2_core.sampling import SamplingShape
from qwen2_core.sharding import Layout
from qwen2_engine import ContinuousEngine, SequenceRequest, decode_window, programs
from qwen2_engine.decode_window import SlotShape
from qwen2_engine.memory_plan import MemoryPlanner
from qwen2_engine.python_loop import generate_single_task_python

TINY = Lively(layers=2, extract=(0, 1), seed=5)
STEPS, PENALTY = 24, 1.5
PENALIZED = SamplingShape(repetition_penalty=True)
# Token 0, which pads, is in none of them.
PROMPTS = [np.maximum(prompt, 1) for prompt in TINY.prompts((3, 64, 20))]


@functools.cache
def built() -> tuple[Any, Any]:
    return TINY.build(scan_layers=True)


def generate(sampling: Sampling, **kwargs: Any) -> Any:
    ids, lengths = pad_right(PROMPTS)
    out = generate_single_task_jitted(
        *built(), ids, STEPS, prompt_lengths=lengths, sampling=sampling, samples_per_prompt=2, **kwargs
    )
    return jax.tree.map(np.asarray, out)


@functools.cache
def logits_of(tokens: tuple[int, ...]) -> np.ndarray:
    """The model's own logits [n, vocab] of a whole sequence, without a cache."""
    ids = np.zeros((1, 64 + STEPS), np.int32)  # one program for all; what follows is seen by nobody
    ids[0, : len(tokens)] = tokens
    return np.asarray(forward()({"params": built()[1]}, ids)[0][0, : len(tokens)], np.float64)


@functools.cache
def forward() -> Any:
    return jax.jit(built()[0].apply)


def penalized(logits: np.ndarray, seen: list[int], penalty: float) -> np.ndarray:
    """As Transformers' ``RepetitionPenaltyLogitsProcessor``, one row of logits."""
    changed = logits.copy()
    for token in set(seen):
        changed[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    return changed


def assert_chosen_with(penalty: float, prompt: np.ndarray, tokens: np.ndarray) -> None:
    """Every token is the likeliest after the penalty for all before it, the prompt's among them."""
    sequence = [*prompt.tolist(), *tokens.tolist()]
    logits = logits_of(tuple(sequence))
    for place in range(len(prompt), len(sequence)):
        after = penalized(logits[place - 1], sequence[:place], penalty)
        assert sequence[place] == after.argmax()


@pytest.mark.parametrize("penalty", [PENALTY, 0.8])
def test_a_greedy_token_is_the_likeliest_after_the_penalty_of_all_before_it(penalty: float):
    out, without = generate(Sampling(repetition_penalty=penalty)), generate(Sampling())
    for row, tokens in enumerate(out.token_ids):
        assert_chosen_with(penalty, PROMPTS[row // 2], tokens)
    assert (out.token_ids != without.token_ids).any(axis=1).all()
    if penalty > 1:
        assert_lively(out.token_ids)


def test_log_probabilities_are_the_models_own_without_the_penalty():
    out = generate(Sampling(temperature=0.9, min_p=0.01, repetition_penalty=PENALTY), seed=3)
    for row in (0, 3, 5):
        prompt, tokens = PROMPTS[row // 2], out.token_ids[row]
        logits = logits_of((*prompt.tolist(), *tokens.tolist()))[len(prompt) - 1 : -1]
        logits -= logits.max(-1, keepdims=True)
        own = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(out.logprobs[row], own[np.arange(STEPS), tokens], atol=1e-4)


@pytest.mark.slow
def test_the_old_loop_gives_the_same():
    ids, lengths = pad_right(PROMPTS)
    for sampling in (Sampling(repetition_penalty=PENALTY), Sampling(1.0, min_p=0.05, repetition_penalty=1.2)):
        kwargs: dict[str, Any] = {"prompt_lengths": lengths, "sampling": sampling, "samples_per_prompt": 2}
        old = generate_single_task_python(*built(), ids, 6, **kwargs)
        np.testing.assert_array_equal(old.token_ids, generate(sampling).token_ids[:, :6])


def requests() -> list[SequenceRequest]:
    return [
        SequenceRequest(PROMPTS[number // 2], 4 + 4 * number, sampling_id=number, id=number)
        for number in range(6)
    ]


def in_slots(items: list[SequenceRequest], slots: int, sampling: Sampling) -> dict[int, FinishedSequence]:
    engine = ContinuousEngine(*built(), slots=slots, max_tokens=STEPS, sampling=sampling, seed=3)
    return {one.id: one for one in engine.run(items)}  # pyright: ignore[reportReturnType]


MIXED = Sampling(0.8, top_p=0.95, min_p=0.01, repetition_penalty=PENALTY)


@pytest.mark.parametrize("sampling", [Sampling(repetition_penalty=PENALTY), MIXED], ids=["greedy", "drawn"])
def test_a_slot_forgets_the_tokens_of_the_sequence_before(sampling: Sampling):
    expected = generate(sampling, seed=3)
    together = in_slots(requests(), 2, sampling)
    for number, one in together.items():
        length = len(one.token_ids)
        assert length == 4 + 4 * number
        np.testing.assert_array_equal(one.token_ids, expected.token_ids[number, :length])
        np.testing.assert_allclose(one.logprobs, expected.logprobs[number, :length], atol=1e-4)
        assert one.rows is not None
        assert row_errors(one.rows, expected.activations[:, :length, number]).max() < 1e-4
    reordered = in_slots(requests()[::-1], 2, sampling)
    for number, one in reordered.items():
        for field in ("token_ids", "logprobs", "rows"):
            np.testing.assert_array_equal(getattr(one, field), getattr(together[number], field))


def test_a_slot_that_forgets_nothing_is_found(monkeypatch: pytest.MonkeyPatch):
    insert = decode_window.insert

    def forgetful(state: Any, *args: Any) -> Any:
        inserted = insert(state, *args)
        return dataclasses.replace(inserted, seen=inserted.seen | state.seen)

    monkeypatch.setattr(programs, "insert", forgetful)
    monkeypatch.setattr(programs, "compile_insert", programs.compile_insert.__wrapped__)
    with pytest.raises(AssertionError):
        test_a_slot_forgets_the_tokens_of_the_sequence_before(MIXED)


def test_values_are_traced_and_what_is_not_in_use_is_in_no_program():
    model, params = built()
    ids, lengths = pad_right(PROMPTS)
    for shape, carried in ((SamplingShape(), False), (PENALIZED, True)):
        decode = lower_generate(model, params, GenerateShape(3, 64, STEPS, sampling=shape))[1]
        described = [(one.shape, one.dtype) for one in jax.tree.leaves(decode.args_info)]
        assert (((3, TINY.vocab), np.dtype(bool)) in described) == carried

    def compiled() -> int:
        return generate_jitted._compile.cache_info().misses

    before = compiled()
    for sampling in (
        Sampling(repetition_penalty=1.1),
        Sampling(0.7, repetition_penalty=0.9),
        Sampling(0.7, top_k=3, repetition_penalty=2),
    ):
        generate_single_task_jitted(
            model, params, ids, STEPS, prompt_lengths=lengths, sampling=sampling, extract_activations=False
        )
    assert compiled() == before + 1
    for sampling in (Sampling(0.7, min_p=0.1), Sampling(min_p=1.0), Sampling(0.7, top_k=3, min_p=0.3)):
        generate_single_task_jitted(
            model, params, ids, STEPS, prompt_lengths=lengths, sampling=sampling, extract_activations=False
        )
    assert compiled() == before + 2


def test_the_tokens_seen_are_updated_in_place():
    model, params = built()
    shape = GenerateShape(2, 64, 64, samples_per_prompt=4, sampling=PENALIZED)
    decode = lower_generate(model, params, shape)[1].compile(compiler_options())
    memory: Any = decode.memory_analysis()
    assert shape.nbytes(model) == dataclasses.replace(shape, sampling=SamplingShape()).nbytes(model) + 8 * 160
    assert memory.output_size_in_bytes >= shape.nbytes(model)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096
    slots = SlotShape(8, 64, 64, sampling=PENALIZED)
    inserting: Any = programs.compile_insert(model, slots, Layout()).memory_analysis()
    assert inserting.output_size_in_bytes - inserting.alias_size_in_bytes < 4096
    assert inserting.temp_size_in_bytes < 10_000


def test_the_memory_of_the_tokens_seen_is_planned():
    planner = MemoryPlanner(*built(), Layout())
    shape = SlotShape(64, 64, 64)
    more = planner.estimate(dataclasses.replace(shape, sampling=PENALIZED)) - planner.estimate(shape)
    assert more >= 64 * TINY.vocab
