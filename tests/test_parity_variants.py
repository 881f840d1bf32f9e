"""Live parity with Transformers for every kind of RoPE and for sliding windows, against float64.

Transformers runs each sequence by itself: a prefill, then one forward pass a token, with its own cache. So
RoPE that follows the length of the text is compared at each step. Ours runs them all in one batch. In float64
the angles are exact too: Transformers' model has them in float32, as ours has. The error of a row is that of
its float64 reference, and ours may be twice Transformers' own in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from lively import assert_lively, pad_right, row_errors
from variants import SETTINGS, exact_rope, variant

from activation_store.replay import plain_forward
from generate_jitted import Generation, generate_single_task_jitted
from qwen2_core.hook_points import RESID_POST, full_name
from qwen2_core.kernels.cpu.library import is_available, unavailable_reason
from qwen2_engine import ContinuousEngine, SequenceRequest
from qwen2_engine.python_loop import generate_single_task_python

STEPS = 64
FEW_STEPS = 6  # of the old Python loop, which compiles nothing
# Within the original context and past its end; shorter than the window, and as long, and longer.
LENGTHS = (3, 24, 31, 32, 45)
NAMES = pytest.mark.parametrize("name", SETTINGS)
WINDOWS_AND_YARN = "windows in every second layer, yarn"
UNROLLED = [(name, False) for name in ("dynamic", WINDOWS_AND_YARN)]


@functools.cache
def generated(name: str, scan_layers: bool = True, dtype: str = "float32") -> Generation:
    lively = variant(name)
    ids, lengths = pad_right(lively.prompts(LENGTHS), fill=lively.vocab - 1)
    model, params = lively.build(dtype, scan_layers)
    return generate_single_task_jitted(model, params, ids, STEPS, prompt_lengths=lengths, extract_prompt=True)


def rows_of(out: Generation, b: int) -> np.ndarray:
    """Rows [layers, n, hidden] of one sequence, its prompt's first."""
    prompt = np.asarray(out.prompt_activations)[:, : LENGTHS[b], b]
    return np.concatenate([prompt, np.asarray(out.activations)[:, :, b]], axis=1).astype(np.float32)


@functools.cache
def reference(name: str, double: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each prompt and what was generated from it: logits [n, vocab], rows [layers, n, hidden]."""
    torch_reference = pytest.importorskip("torch_reference", reason="pip install '.[parity]'")
    lively = variant(name)
    theta = lively.hf_config["rope_theta"]
    exact = functools.partial(exact_rope, name, theta) if double else None
    model = torch_reference.TorchReference(lively, exact_rope=exact)
    tokens = np.asarray(generated(name).token_ids)
    return [
        model.step_by_step(np.concatenate([prompt, own]), len(prompt))
        for prompt, own in zip(lively.prompts(LENGTHS), tokens, strict=True)
    ]


@pytest.mark.slow
@NAMES
def test_greedy_tokens_are_those_of_transformers_over_64_steps(name: str):
    out = generated(name)
    assert_lively(out.token_ids, distinct=12)
    for b, (logits, _) in enumerate(reference(name, double=False)):
        np.testing.assert_array_equal(out.token_ids[b], logits[LENGTHS[b] - 1 : -1].argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scan_layers"), [*((name, True) for name in SETTINGS), *UNROLLED])
def test_rows_are_as_near_to_float64_as_those_of_transformers(name: str, scan_layers: bool):
    out, theirs, ours = generated(name, scan_layers), [], []
    np.testing.assert_array_equal(out.token_ids, generated(name).token_ids)
    pairs = zip(reference(name, double=False), reference(name, double=True), strict=True)
    for b, ((_, in_float32), (_, exact)) in enumerate(pairs):
        theirs.append(row_errors(in_float32, exact).T)
        ours.append(row_errors(rows_of(out, b), exact).T)
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)  # [rows, layers]
    # The worst row of a layer depends on the order of sums, and that on the processor.
    assert (ours.max(0) <= 3 * theirs.max(0)).all(), (ours.max(0), theirs.max(0))
    assert (np.median(ours, 0) <= 2 * np.median(theirs, 0)).all()
    assert ours.max() < 1e-4


@functools.cache
def without_variants() -> Any:
    """Rows by the same weights without any variant, in one pass. It is the same model for all of them."""
    model, params = variant("yarn").build(scan_layers=True)
    config = model.config.replace(rope_scaling=None, use_sliding_window=False)
    apply = jax.jit(model.clone(config=config).apply)
    return lambda token_ids: np.asarray(apply({"params": params}, token_ids[None])[2])[:, :, 0]


@pytest.mark.slow
@NAMES
def test_the_variant_is_another_model_than_the_plain_one(name: str):
    """So that what is compared above is not what every variant has in common."""
    prompt, own = variant(name).prompts(LENGTHS)[-1], np.asarray(generated(name).token_ids[-1])
    plain = without_variants()(np.concatenate([prompt, own]))
    assert row_errors(plain, rows_of(generated(name), len(LENGTHS) - 1)).max() > 0.05


def requests(name: str) -> list[SequenceRequest]:
    prompts = variant(name).prompts(LENGTHS)
    return [
        SequenceRequest(prompt, STEPS, sampling_id=b, id=b, capture_prompt=True)
        for b, prompt in enumerate(prompts)
    ]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dynamic", "windows above layer 0")]


@pytest.mark.parametrize("name", [WINDOWS_AND_YARN, *SLOW])
def test_in_slots_each_sequence_is_as_alone_and_has_the_same_bits_in_any_slot(name: str):
    model, params = variant(name).build(scan_layers=True)
    settings: dict[str, Any] = {"slots": 2, "capture_prompt": True}
    runs: list[dict[Any, Any]] = [
        {one.id: one for one in ContinuousEngine(model, params, **settings).run(items)}
        for items in (requests(name), requests(name)[::-1])
    ]
    for b in range(len(LENGTHS)):
        one, other = runs[0][b], runs[1][b]
        np.testing.assert_array_equal(one.token_ids, generated(name, True).token_ids[b])
        assert one.rows is not None
        assert row_errors(one.rows, rows_of(generated(name, True), b)).max() < 1e-4
        for field in ("token_ids", "logprobs", "rows"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("name", ["dynamic", pytest.param("longrope", marks=pytest.mark.slow)])
def test_one_plain_pass_over_a_whole_sequence_gives_its_rows_again(name: str):
    """As replay does it: RoPE that follows the length is told where the prompt ended."""
    model, params = variant(name).build(scan_layers=True)
    hooks = [full_name(RESID_POST, layer) for layer in range(3)]
    forward, out = plain_forward(model.config, params, hooks), generated(name, True)
    for b, prompt in enumerate(variant(name).prompts(LENGTHS)):
        tokens = np.concatenate([prompt, np.asarray(out.token_ids[b])])
        rows, logprobs = forward(tokens, len(prompt), ())
        assert row_errors(np.stack([rows[hook] for hook in hooks]), rows_of(out, b)).max() < 1e-4
        np.testing.assert_allclose(logprobs[len(prompt) - 1 :], out.logprobs[b], atol=1e-3)


@pytest.mark.parametrize("name", SLOW)
def test_the_growing_cache_gives_the_same(name: str):
    model, params = variant(name).build(scan_layers=True)
    ids, lengths = pad_right(variant(name).prompts(LENGTHS), fill=variant(name).vocab - 1)
    old = generate_single_task_python(
        model, params, ids, FEW_STEPS, prompt_lengths=lengths, extract_prompt=True
    )
    new = generated(name, True)
    np.testing.assert_array_equal(old.token_ids, np.asarray(new.token_ids)[:, :FEW_STEPS])
    for b in range(len(LENGTHS)):
        rows = rows_of(old, b)
        assert row_errors(rows, rows_of(new, b)[:, : rows.shape[1]]).max() < 1e-4


@pytest.mark.skipif(not is_available(), reason=f"no CPU kernels: {unavailable_reason()}")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "scan_layers"), [*UNROLLED, (WINDOWS_AND_YARN, True)])
def test_bfloat16_rows_by_our_own_kernels_are_within_known_bounds(name: str, scan_layers: bool):
    """As long as both runs have chosen the same tokens: 16 bits choose others sooner or later."""
    out, exact = generated(name, scan_layers, "bfloat16"), reference(name, double=True)
    for b, (_, rows) in enumerate(exact):
        same = np.asarray(out.token_ids[b]) == np.asarray(generated(name).token_ids[b])
        n = LENGTHS[b] + (len(same) if same.all() else int(np.argmin(same)))
        errors = row_errors(rows_of(out, b)[:, :n], rows[:, :n])
        assert np.median(errors) < 0.02
        assert errors.max() < 0.15
