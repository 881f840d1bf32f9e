"""``draft_tokens``: the same tokens, log-probabilities and rows as the plain loop's, in fewer passes."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import Lively, assert_lively, row_errors
from transformers import AutoTokenizer

from arc_puzzles import build_messages, create_grid_encoder, load_tasks
from arc_puzzles.chat import encode_prompts
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS
from generate_jitted import (
    GenerateShape,
    Sampling,
    generate_single_task_jitted,
    run_decode,
    run_prefill,
)
from kvcache_utils import KVCache
from qwen2_core import drafts
from qwen2_core.interventions import Add
from qwen2_core.kernels.attention import attend_two_part
from qwen2_core.requests import PromptBatch
from qwen2_core.sampling import sampling_params
from qwen2_jax import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

TINY = Lively(layers=2, extract=(0, 1), seed=5)
WIDTH, STEPS, DRAFTED = 40, 40, 4
PROMPTS = TINY.prompts((3, 33, 40, 17))
POINTS = {"attn.hook_z": (1,)}
GREEDY, SAMPLED = Sampling(), Sampling(0.9, top_k=20, repetition_penalty=1.3)
NOBODY = np.zeros(1, np.uint32)


@functools.cache
def built(settings: str = "{}") -> tuple[Any, Any]:
    """Settings are keys of config.json, as JSON."""
    model, params = dataclasses.replace(TINY, settings=tuple(json.loads(settings).items())).build(
        scan_layers=True
    )
    return create_model_with_hooks(model.config, TINY.extract, points=POINTS), params


def generate(prompt: np.ndarray, draft_tokens: int = 0, max_tokens: int = STEPS, **kwargs: Any) -> Any:
    ids = np.zeros((1, WIDTH), np.int32)
    ids[0, : len(prompt)] = prompt
    model, params = built()
    kwargs |= {"prompt_lengths": [len(prompt)], "draft_tokens": draft_tokens}
    out = generate_single_task_jitted(model, params, ids, max_tokens, **kwargs)
    return jax.tree.map(np.asarray, out)


def assert_same(got: Any, plain: Any) -> None:
    """Tokens and lengths to the bit; log-probabilities and rows of every position as float32 rounds."""
    np.testing.assert_array_equal(got.token_ids, plain.token_ids)
    np.testing.assert_array_equal(got.lengths, plain.lengths)
    np.testing.assert_allclose(got.logprobs, plain.logprobs, atol=2e-5)
    for mine, expected in zip(
        jax.tree.leaves((got.activations, got.points)),
        jax.tree.leaves((plain.activations, plain.points)),
        strict=True,
    ):
        zero = ~np.asarray(expected).any(-1)
        np.testing.assert_array_equal(zero, ~np.asarray(mine).any(-1))
        assert not zero.all()
        assert row_errors(mine[~zero], expected[~zero]).max() < 1e-4


def assert_all_same(got: list[Any], plain: list[Any]) -> None:
    for mine, expected in zip(got, plain, strict=True):
        assert_same(mine, expected)


# --- Through the public call ---


@pytest.mark.parametrize("draft_tokens", [1, 8])
def test_greedy_answers_are_those_of_the_plain_loop(draft_tokens: int):
    for prompt in (*PROMPTS, np.tile(PROMPTS[0], 7)):
        plain = generate(prompt)
        assert_same(generate(prompt, draft_tokens), plain)
    assert_lively(generate(PROMPTS[1]).token_ids)


def test_sampled_answers_are_those_of_the_plain_loop_with_the_same_seed():
    answers = []
    for seed, prompt in enumerate(PROMPTS):
        plain = generate(prompt, sampling=SAMPLED, seed=seed, sequence_ids=[7])
        assert_same(generate(prompt, DRAFTED, sampling=SAMPLED, seed=seed, sequence_ids=[7]), plain)
        answers.append(plain.token_ids.tolist())
    assert answers[1] != generate(PROMPTS[1], sampling=SAMPLED, seed=9).token_ids.tolist()


def test_the_embedded_model_answers_its_puzzles_the_same_way():
    config, params = load_qwen2(EXAMPLE_MODEL, dtype="float32", scan_layers=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    encoder = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
    tasks = load_tasks(EXAMPLE_TASKS).tasks
    prompts = encode_prompts(
        tokenizer, [build_messages(task, 0, encoder, "output-from-examples-v0") for task in tasks]
    )
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    model = create_model_with_hooks(config)
    for row, prompt in zip(ids, prompts, strict=True):
        kwargs: Any = {"prompt_lengths": [len(prompt)], "eos_token_ids": tokenizer.eos_token_id}
        plain, drafted = (
            generate_single_task_jitted(model, params, row[None], 48, draft_tokens=n, **kwargs)
            for n in (0, DRAFTED)
        )
        assert_same(*jax.tree.map(np.asarray, (drafted, plain)))


def test_interventions_are_made_at_the_same_positions():
    vector = np.random.default_rng(0).normal(size=TINY.hidden).astype(np.float32)
    added = [
        Add("hook_resid_post", 0, 9 * vector, positions=[4, 35, 41, 50, 51]),
        Add("hook_resid_mid", 1, 4 * vector, positions="generated"),
    ]
    for prompt in PROMPTS[:2]:
        plain = generate(prompt, interventions=added)
        assert not np.array_equal(plain.token_ids, generate(prompt).token_ids)
        assert_same(generate(prompt, DRAFTED, interventions=added), plain)


def test_more_is_drafted_than_may_be_generated():
    plain = generate(PROMPTS[1], max_tokens=3)
    assert_same(generate(PROMPTS[1], 50, max_tokens=3), plain)
    assert generate(PROMPTS[1], 50, max_tokens=1).tokens(0) == plain.tokens(0)[:1]


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"samples_per_prompt": 2}, "draft_tokens is for a single sequence, not for 2: give one prompt with"),
        ({"draft_tokens": -1}, "draft_tokens must be"),
    ],
)
def test_drafts_for_several_sequences_are_refused(kwargs: Any, sentence: str):
    model, params = built()
    with pytest.raises(ValueError, match=sentence):
        generate_single_task_jitted(model, params, PROMPTS[1][None], 8, **({"draft_tokens": 2} | kwargs))


# --- With drafts that are right here and wrong there --------------------------------------------------------
# A random model does not repeat itself. So these drafts come from a list, which lies behind the text.


@functools.cache
def prefill_and_plain(settings: str, sampling: Sampling) -> tuple[Any, Any, Any]:
    """The compiled prefill and plain loop, and the shape of a drafted one."""
    model, _ = built(settings)
    shape = GenerateShape(1, WIDTH, STEPS, sampling=sampling_params(sampling, 0, (), TINY.vocab).shape)
    drafted = dataclasses.replace(shape, draft_tokens=DRAFTED)
    prefill, plain = (
        jax.jit(functools.partial(program, model, of_shape))
        for program, of_shape in ((run_prefill, drafted), (run_decode, shape))
    )
    return prefill, plain, drafted


class Listed:
    """The compiled loop, drafting what a list says is generated at each step; traced anew in each of them."""

    def __init__(self, sampling: Sampling = GREEDY, settings: str = "{}") -> None:
        self._sampling = sampling
        self._model, self._params = built(settings)
        self._prefill, self._plain, shape = prefill_and_plain(settings, sampling)
        self._drafted = jax.jit(functools.partial(run_decode, self._model, shape))

    def run(self, prompt: np.ndarray, answer: np.ndarray | None, eos: Any = ()) -> Any:
        """The last state, of the plain loop where there is no answer to draft."""
        sampling = sampling_params(self._sampling, 3, eos, TINY.vocab)
        ids = np.zeros((1, WIDTH), np.int32)
        ids[0, : len(prompt)] = prompt
        batch = PromptBatch(ids, np.array([len(prompt)], np.int32))
        state, _ = self._prefill(self._params, batch, sampling, NOBODY)
        if answer is None:
            return self._plain(self._params, dataclasses.replace(state, history=None), sampling, NOBODY)
        text = np.concatenate([prompt, answer, np.zeros(WIDTH, np.int32)])[: WIDTH + STEPS]
        listed = jnp.concatenate([state.history, jnp.asarray(text[None], jnp.int32)], axis=1)
        return self._drafted(self._params, dataclasses.replace(state, history=listed), sampling, NOBODY)


def from_list(history: Any, length: Any, draft_tokens: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(history, WIDTH + STEPS + DRAFTED + length, draft_tokens)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "find_draft", from_list)


@functools.cache
def shared(sampling: Sampling = GREEDY, settings: str = "{}") -> Listed:
    return Listed(sampling, settings)


def spoilt(answer: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The answer, some of its tokens wrong."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(answer.shape) < share, (answer + 1) % TINY.vocab, answer)


SHARES = (0.0, 0.1, 0.4, 1.0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_whatever_is_drafted_the_answer_is_the_plain_loops(listed: None, sampling: Sampling):
    for prompt in PROMPTS:
        plain = shared(sampling).run(prompt, None)
        for seed, share in enumerate(SHARES):
            answer = spoilt(np.asarray(plain.token_ids)[0], share, seed)
            assert_same(shared(sampling).run(prompt, answer), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
    ],
    ids=["sliding windows", "rope that follows the length"],
)
def test_also_with(listed: None, settings: dict[str, Any]):
    model = shared(settings=json.dumps(settings))
    plain = model.run(PROMPTS[1], None)
    assert not np.array_equal(plain.token_ids, shared().run(PROMPTS[1], None).token_ids)
    for share in SHARES:
        assert_same(model.run(PROMPTS[1], spoilt(np.asarray(plain.token_ids)[0], share, 1)), plain)


def test_a_right_draft_is_read_in_one_pass_and_a_wrong_one_costs_no_token(
    listed: None, monkeypatch: pytest.MonkeyPatch
):
    passes = []
    counted = drafts.tokens_that_stay

    def count(*args: Any) -> Any:
        stay = counted(*args)
        jax.debug.callback(lambda stay: passes.append(int(stay)), stay)
        return stay

    monkeypatch.setattr(drafts, "tokens_that_stay", count)
    loop = Listed()
    answer = np.asarray(loop.run(PROMPTS[1], None).token_ids)[0]
    for draft, expected in ((answer, [DRAFTED + 1] * 8), ((answer + 1) % TINY.vocab, [1] * STEPS)):
        passes.clear()
        jax.block_until_ready(loop.run(PROMPTS[1], draft))
        jax.effects_barrier()
        assert passes == expected


@pytest.mark.parametrize("end", range(8))
def test_an_eos_within_a_draft_ends_the_sequence_there(listed: None, end: int):
    answer = np.asarray(shared().run(PROMPTS[1], None).token_ids)[0]
    first = int(np.argmax(answer == answer[end]))
    plain = shared().run(PROMPTS[1], None, eos=int(answer[end]))
    assert int(plain.lengths[0]) == first + 1
    got = shared().run(PROMPTS[1], answer, eos=int(answer[end]))
    assert_same(got, plain)
    assert got.ended.all()


# --- Faults are found ---------------------------------------------------------------------------------------


def plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault in ("rows of rejected tokens are kept", "rows are one late"):
        write, late = drafts.write_columns, fault == "rows are one late"

        def wrong(buffer: Any, values: Any, axis: int, index: Any, stay: Any) -> Any:
            if late and buffer.ndim > 2:
                values = jnp.roll(values, 1, axis)
            return write(buffer, values, axis, index, stay if late else jnp.int32(values.shape[axis]))

        monkeypatch.setattr(drafts, "write_columns", wrong)
    elif fault == "positions are one too high":
        right: Any = KVCache.positions
        monkeypatch.setattr(KVCache, "positions", property(lambda cache: right.fget(cache) + 1))
    elif fault == "the index counts rejected tokens":
        monkeypatch.setattr(
            drafts, "dataclasses", type("_", (), {"replace": staticmethod(replace_but_the_index)})
        )
    else:  # keys after a token's own, or those of rejected tokens, are attended
        stale = 0 if fault == "tokens see their own draft" else 3

        def attend(q: Any, cache: KVCache, layer: Any, window: Any) -> Any:
            last = cache.ar.index + q.shape[1] - 1 + stale
            cache = KVCache(cache.prefill, dataclasses.replace(cache.ar, index=last))
            return jnp.stack([attend_two_part(one, cache, layer, window) for one in q.swapaxes(0, 1)], axis=1)

        monkeypatch.setattr("qwen2_jax.attend_tokens_two_part", attend)


def replace_but_the_index(value: Any, **changes: Any) -> Any:
    if "index" in changes:
        changes["index"] = jnp.minimum(value.index, STEPS)
    return dataclasses.replace(value, **changes)


@pytest.mark.parametrize(
    "fault",
    [
        "rows of rejected tokens are kept",
        "rows are one late",
        "positions are one too high",
        "the index counts rejected tokens",
        "tokens see their own draft",
        "keys past the index are seen",
    ],
)
def test_a_fault_is_found(listed: None, fault: str, monkeypatch: pytest.MonkeyPatch):
    """In answers of wrong drafts, or in one that ends within a right one."""
    answer = np.asarray(shared().run(PROMPTS[1], None).token_ids)[0]
    ended = int(answer[2])
    cases = ((), spoilt(answer, 0.3, 2)), (ended, answer)
    plain = [shared().run(PROMPTS[1], None, eos=eos) for eos, _ in cases]
    plant(fault, monkeypatch)
    loop = Listed()
    got = [loop.run(PROMPTS[1], draft, eos=eos) for eos, draft in cases]
    with pytest.raises(AssertionError):
        assert_all_same(got, plain)


# --- What the programs of others have of it -----------------------------------------------------------------


def test_without_drafts_there_is_no_trace_of_them():
    model, params = built()
    shape = GenerateShape(1, 8, 4)
    state, _ = jax.eval_shape(
        functools.partial(run_prefill, model, shape),
        params,
        PromptBatch(np.zeros((1, 8), np.int32), np.ones(1, np.int32)),
        sampling_params(GREEDY, 0, (), TINY.vocab),
        NOBODY,
    )
    assert state.history is None
    assert shape.cache_config(model.config).max_decode_length == 4
