"""Interventions: rows, what recompiles, what is refused. ``tests/test_hooks_torch.py``: those of torch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import Lively

import generate_jitted
from generate_jitted import Generation, generate_single_task_jitted
from qwen2_core.hook_points import LN_FINAL, point_names
from qwen2_core.interventions import AblateHeads, Add, ClampFeature, Custom, ProjectOut, Replace, ScaleFeature
from qwen2_jax_with_hooks import create_model_with_hooks

TINY = Lively(layers=2, extract=(0, 1), hidden=32, inner=48, vocab=96)
IDS = np.stack(TINY.prompts((5, 5, 5)))
RNG = np.random.default_rng(3)
VECTOR, OTHER = RNG.normal(size=(2, 32)).astype(np.float32) * 3
POINTS = {"attn.hook_z": 1, "mlp.hook_post": [1, 0], LN_FINAL: True}


@functools.cache
def built(dtype: str = "float32", scan_layers: bool = True) -> tuple[Any, Any]:
    model, params = TINY.build(dtype, scan_layers)
    return create_model_with_hooks(model.config, TINY.extract, points=POINTS), params


def run(*interventions: Any, ids: np.ndarray = IDS, of: Any = (), **kwargs: Any) -> Generation:
    model, params = of or built()
    return generate_single_task_jitted(model, params, ids, 6, interventions=interventions, **kwargs)


def leaves(out: Generation, row: int) -> list[np.ndarray]:
    """All of a row: tokens, log-probabilities and everything captured."""
    return [
        np.asarray(leaf[:, :, row] if np.ndim(leaf) == 4 else leaf[row], np.float32)
        for leaf in jax.tree.leaves(out)
    ]


def assert_rows_equal(out: Generation, row: int, other: Generation, other_row: int, **kwargs: Any) -> None:
    for got, expected in zip(leaves(out, row), leaves(other, other_row), strict=True):
        np.testing.assert_allclose(got, expected, **{"rtol": 0, "atol": 0, **kwargs})


# --- Rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scan_layers"),
    [("float32", True), ("bfloat16", True), pytest.param("bfloat16", False, marks=pytest.mark.slow)],
)
def test_a_row_of_strength_0_is_the_clean_run_and_others_are_as_if_alone(dtype: str, scan_layers: bool):
    of = built(dtype, scan_layers)
    strengths = np.array([0.0, 1.0, 2.0])
    everywhere = [
        Add(point, True, VECTOR, strengths)
        for point in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    ]
    steered = run(*everywhere, Add(LN_FINAL, None, VECTOR, strengths), of=of)
    clean = run(of=of)
    assert_rows_equal(steered, 0, clean, 0)
    for row in (1, 2):
        assert (np.asarray(steered.logprobs[row]) != clean.logprobs[row]).any()
    alone = run(
        *(dataclasses.replace(one, strength=strengths[2]) for one in everywhere),
        Add(LN_FINAL, None, VECTOR, strengths[2]),
        ids=IDS[2:],
        of=of,
    )
    assert_rows_equal(steered, 2, alone, 0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["scanned", "unrolled"]
)
def test_reading_every_point_changes_no_bit_of_a_run(scan_layers: bool):
    model, params = built("bfloat16", scan_layers)
    points = {point: True for point in point_names() if point != "hook_resid_post"}
    reader = create_model_with_hooks(model.config, TINY.extract, points=points)
    plain = create_model_with_hooks(model.config, TINY.extract)
    read, out = (run(of=(one, params), extract_prompt=True) for one in (reader, plain))
    for name in ("token_ids", "logprobs", "activations", "prompt_activations"):
        np.testing.assert_array_equal(getattr(read, name), getattr(out, name))
    assert len(read.points) == len(read.prompt_points) == 12


def test_scanned_layers_give_what_unrolled_ones_give():
    chosen = (Add("attn.hook_v", 1, VECTOR[:16]), Replace(LN_FINAL, None, VECTOR, 0.5, "generated"))
    unrolled, scanned = (run(*chosen, of=built(scan_layers=scan)) for scan in (False, True))
    for row in range(len(IDS)):
        assert_rows_equal(unrolled, row, scanned, row, rtol=1e-4, atol=1e-4)


def test_several_interventions_at_one_point_are_done_in_their_order():
    zero, add = Replace("hook_resid_post", 1, np.zeros(32)), Add("hook_resid_post", 1, VECTOR)
    out: Any = run(zero, add)
    assert np.ptp(np.asarray(out.activations[1]), axis=(0, 1)).max() == 0
    np.testing.assert_array_equal(out.layer(1, 0)[0], VECTOR)
    np.testing.assert_array_equal(run(add, zero).layer(1, 0)[0], 0)


def test_samples_of_one_prompt_may_differ_in_what_is_done_to_generated_tokens():
    strengths = np.array([0.0, 3.0] * 3)
    out = run(Add("hook_resid_mid", 0, VECTOR, strengths, "generated"), samples_per_prompt=2)
    clean = run()
    for row in range(3):
        assert_rows_equal(out, 2 * row, clean, row)
        # The prompt chose the first token; reading it is the first thing that is steered.
        assert out.token_ids[2 * row + 1, 0] == clean.token_ids[row, 0]
        assert (out.layer(0, 2 * row + 1)[0] != clean.layer(0, row)[0]).all()


def test_a_pass_inside_the_callers_jit_takes_traced_values_and_has_gradients():
    model, params = built()

    def loss(add: Add) -> Any:
        logits, *_ = model.apply({"params": params}, IDS, interventions=[add])  # pyright: ignore[reportGeneralTypeIssues, reportAssignmentType]
        return logits[:, -1, 7].sum()

    add = Add("hook_resid_post", 0, VECTOR)
    gradient = jax.jit(jax.grad(loss))(add).vector
    step = 1e-2 * OTHER
    change = [loss(dataclasses.replace(add, vector=VECTOR + sign * step)) for sign in (1, -1)]
    np.testing.assert_allclose((change[0] - change[1]) / 2, gradient @ step, rtol=0.02)


# --- What is compiled ---------------------------------------------------------------------------------------


def test_other_values_strengths_and_positions_are_the_same_program():
    def chosen(vector: Any, strength: Any, positions: Any, listed: list[int]) -> list[Any]:
        where = {"strength": strength, "positions": positions}
        return [
            Add("hook_resid_mid", 0, vector, **where),
            Replace("hook_resid_pre", 1, np.stack([vector] * len(listed)), strength, listed),
            ScaleFeature("hook_resid_post", 0, vector, vector, 2.0, 0.1, **where),
            AblateHeads(1, [0, 1], **where),
        ]

    run(*chosen(VECTOR, 1.0, "all", [1, 2, 3]))
    compiled = generate_jitted._compile.cache_info().misses
    for strength, positions, listed in (
        (0.0, "prompt", [4, 9, 0, 1]),
        ([1, 2, 3], "generated", [0, 1, 2]),
        (2, [3, 7], [5, 3, 1]),
    ):
        run(*chosen(OTHER * 2, strength, positions, listed))
    assert generate_jitted._compile.cache_info().misses == compiled
    run(*chosen(OTHER, 1.0, "all", [1, 2, 3])[::-1])
    assert generate_jitted._compile.cache_info().misses == compiled + 1


def test_a_users_function_is_known_by_what_it_computes():
    factor = 2.0
    table = np.arange(32, dtype=np.float32)

    def times(x: Any) -> Any:
        return x * factor + table

    first = run(Custom("hook_mlp_out", 0, times))
    compiled = generate_jitted._compile.cache_info().misses
    again = run(Custom("hook_mlp_out", 0, lambda x: times(x)))
    assert generate_jitted._compile.cache_info().misses == compiled
    for row in range(len(IDS)):
        assert_rows_equal(first, row, again, row)
    table[3] = 7  # a constant that the function reads
    changed = run(Custom("hook_mlp_out", 0, times))
    factor = 3.0
    changed_again = run(Custom("hook_mlp_out", 0, times))
    assert generate_jitted._compile.cache_info().misses == compiled + 2
    assert not np.array_equal(first.logprobs, changed.logprobs)
    assert not np.array_equal(changed.logprobs, changed_again.logprobs)


def test_a_users_function_that_calls_flax_cannot_be_changed_by_interceptors():
    dense = nn.Dense(32)
    weights = dense.init(jax.random.key(0), jnp.zeros(32))
    custom = Custom("hook_mlp_out", 0, lambda x: dense.apply(weights, x))

    def doubled(method, args, kwargs, context):
        return 2 * method(*args, **kwargs)

    with nn.intercept_methods(doubled), pytest.raises(ValueError, match="cannot be called inside flax"):
        run(custom)


# --- What is refused ----------------------------------------------------------------------------------------

_POST, _ONES = "hook_resid_post", np.ones(32)


def _shouts(x: Any) -> Any:
    jax.debug.print("x")
    return x


def _calls_back(x: Any) -> Any:
    return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((32,), jnp.float32), x)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("steer", "interventions must be a list of Add, .* and str is none"),
        (3, "and int is none"),
        (Add("hook_z", 0, _ONES), "there is no hook point 'hook_z'; there are hook_resid_pre"),
        (Add(None, 0, _ONES), "there is no hook point None"),
        (Add(_POST, 2, _ONES), r"Add.layers \[2\] are out of range: the model has 2 layers, 0 to 1"),
        (Add(_POST, "0", _ONES), r"Add.layers must be layer numbers such as \(10, 11\), not '0'"),
        (Add(_POST, [], _ONES), "Add.layers must name at least one layer and none twice"),
        (Add(_POST, None, _ONES), "Add.layers must be layer numbers"),
        (Add(LN_FINAL, 0, _ONES), "Add.layers: ln_final.hook_normalized has no layers: give True"),
        (Add(_POST, 0, np.ones(31)), r"Add.vector must be \[32\] or \[1, 32\], not of shape \[31\]"),
        (Add(_POST, [0, 1], np.ones((3, 32))), r"must be \[32\] or \[2, 32\], not of shape \[3, 32\]"),
        (Add("mlp.hook_post", 0, _ONES), r"Add.vector must be \[48\]"),
        (Add(_POST, 0, "x"), "Add.vector must be finite numbers, and is not"),
        (Add(_POST, 0, _ONES * np.nan), "Add.vector must be finite numbers, and is not"),
        (Add(_POST, 0, _ONES, np.ones(2)), "Add.strength must be one number, or one for each of the 3 rows"),
        (Add(_POST, 0, _ONES, np.inf), "Add.strength must be finite numbers"),
        (Add(_POST, 0, _ONES, positions="end"), 'Add.positions must be "all", "prompt", "generated" or a'),
        (Add(_POST, 0, _ONES, positions=[-1]), "a list of positions from 0, not"),
        (Add(_POST, 0, _ONES, positions=[]), "a list of positions from 0, not"),
        (Add(_POST, 0, _ONES, positions=[2, 2]), "Add.positions names a position twice"),
        (Add(_POST, 0, _ONES, positions=[1 << 20]), "positions holds 1048576, and the model's context has"),
        (ProjectOut(_POST, 0, np.zeros(32)), "ProjectOut.direction is zero: it must point somewhere"),
        (Replace(_POST, 0, np.ones((3, 32)), positions=[1, 2]), r"Replace.value must be \[2, 32\] or \[1, 2"),
        (Replace(_POST, 0, np.ones((3, 32))), r"Replace.value must be \[32\] or \[1, 32\]"),
        (ScaleFeature(_POST, 0, _ONES, _ONES, _ONES), r"ScaleFeature.scale must be one number or \[1\]"),
        (ClampFeature(_POST, 0, _ONES, np.ones(3), 1.0), r"ClampFeature.decoder must be \[32\]"),
        (AblateHeads(0, 4), r"AblateHeads.heads \[4\] are out of range: the model has heads 0 to 3"),
        (AblateHeads(0, 0, np.ones(8)), r"AblateHeads.value must be \[32\]"),
        (Custom(_POST, 0, "x"), "Custom.fn must be a function in JAX, not str"),  # pyright: ignore[reportArgumentType]
        (Custom(_POST, 0, lambda x: x[:3]), r"Custom.fn must return \[32\] float32, as it is given"),
        (Custom(_POST, 0, lambda x: x @ jnp.ones(3)), r"Custom.fn cannot be traced as a function in JAX of"),
        (Custom(_POST, 0, lambda x: x if x[0] > 0 else -x), "cannot be traced"),
        (Custom(_POST, 0, _shouts), "Custom.fn must be pure JAX"),
        (Custom(_POST, 0, _calls_back), "Custom.fn must be pure JAX"),
    ],
    ids=range(34),
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_sentence_before_anything_is_compiled(
    chosen: Any, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generate_jitted, "_compile", pytest.fail)
    model, params = built()
    with pytest.raises(ValueError, match=message) as caught:
        generate_single_task_jitted(model, params, IDS, 6, interventions=chosen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("heads", ["x", [], None, [0.5]])
def test_heads_that_are_none_are_refused(heads: Any):
    with pytest.raises(ValueError, match=r"AblateHeads.heads must be head numbers such as \[0, 3\], not"):
        AblateHeads(0, heads)


@pytest.mark.parametrize("positions", ["all", "prompt", [7, 2]])
def test_samples_of_one_prompt_cannot_differ_in_what_is_done_to_it(positions: Any):
    add = Add(_POST, 0, _ONES, [1, 1, 1, 2, 1, 1], positions)
    with pytest.raises(ValueError, match=r"Add.strength differs among the samples of a prompt, .* choose"):
        run(add, samples_per_prompt=2)


def test_samples_of_one_prompt_may_differ_where_no_position_of_it_is_chosen():
    run(Add(_POST, 0, _ONES, [1, 1, 1, 2, 1, 1], [7, 5]), samples_per_prompt=2)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (["attn.hook_z"], r"points must be layers by point, such as \{\"attn.hook_z\": \[10\]\}, not"),
        ({"hook_z": 0}, "there is no hook point 'hook_z'"),
        ({"attn.hook_z": 2}, r"points\['attn.hook_z'\] \[2\] are out of range"),
        ({"attn.hook_z": []}, r"points\['attn.hook_z'\] must name at least one layer"),
        ({LN_FINAL: 0}, r"has no layers: give True, not 0"),
        ({_POST: 0}, r"The layers of hook_resid_post are extract_layers: name no points for it"),
    ],
)
def test_points_that_cannot_be_captured_are_refused(points: Any, message: str):
    with pytest.raises(ValueError, match=message):
        create_model_with_hooks(TINY.config(), [0], points=points)
    with pytest.raises(ValueError, match="extract_layers must name at least one layer"):
        create_model_with_hooks(TINY.config(), [])


def test_a_model_may_capture_other_points_alone():
    model = create_model_with_hooks(TINY.config(scan_layers=True), (), points={"attn.hook_k": True})
    out = generate_single_task_jitted(model, built()[1], IDS, 2, extract_prompt=True)
    assert out.activations is None
    assert out.prompt_activations is None
    assert {name: rows.shape for name, rows in out.points.items()} == {"attn.hook_k": (2, 2, 3, 16)}
    assert out.prompt_points["attn.hook_k"].shape == (2, 5, 3, 16)
    np.testing.assert_array_equal(
        out.layer(1, row=2, point="attn.hook_k"), np.asarray(out.points["attn.hook_k"])[1, :, 2]
    )
    with pytest.raises(IndexError, match=r"layer 3 of attn\.hook_k was not captured; captured are: 0, 1"):
        out.layer(3, row=0, point="attn.hook_k")
    with pytest.raises(IndexError, match="layer 1 was not captured; captured are: none"):
        out.layer(1, row=0)
    with pytest.raises(IndexError, match=r"layer 1 of attn\.hook_q was not captured; captured are: none"):
        out.layer(1, row=0, point="attn.hook_q")
    none = generate_single_task_jitted(model, built()[1], IDS, 2, extract_activations=False)
    assert none.points == {}
