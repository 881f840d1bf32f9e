"""Every hook point, read and written, beside torch's hooks on Transformers' model, in float32."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from lively import SHALLOW, THREE, Lively, assert_lively, pad_right, row_errors

from generate_jitted import Generation, generate_single_task_jitted
from qwen2_core.hook_points import LN_FINAL, RESID_POST, full_name, parse_name, point_names
from qwen2_core.interventions import (
    AblateHeads,
    Add,
    ClampFeature,
    Custom,
    Intervention,
    ProjectOut,
    Replace,
    ScaleFeature,
)
from qwen2_core.requests import SequenceRequest
from qwen2_engine.continuous_batching import ContinuousEngine
from qwen2_engine.python_loop import generate_single_task_python
from qwen2_jax import convert_hf_to_jax_weights, stack_layers
from qwen2_jax_with_hooks import create_model_with_hooks

pytest.importorskip("torch", reason="live parity needs torch: pip install '.[parity]'")
import torch
from torch_hooks import TorchHooks
from torch_reference import TorchReference

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
STEPS = 8
LENGTHS = (1, 7, 20)
LAYERS = (1, 0)  # captured at every point
OTHERS = tuple(point for point in point_names() if point != RESID_POST)
MODELS = {
    "GQA": dataclasses.replace(SHALLOW, layers=2, tied=False, seed=5, extract=(1, 0)),
    "Qwen3": dataclasses.replace(THREE, layers=2, extract=(1, 0)),
    "MHA, scanned": dataclasses.replace(SHALLOW, layers=2, kv_heads=4, tied=False, seed=1, extract=(1, 0)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    lively: Lively
    torch: TorchHooks
    model: Any
    params: Any

    @property
    def prompts(self) -> list[np.ndarray]:
        return self.lively.prompts(LENGTHS)

    def generate(self, loop: Any = generate_single_task_jitted, **kwargs: Any) -> Generation:
        ids, lengths = pad_right(self.prompts, fill=self.lively.vocab - 1)
        return loop(
            self.model, self.params, ids, STEPS, prompt_lengths=lengths, extract_prompt=True, **kwargs
        )


@functools.cache
def case_of(name: str) -> Case:
    lively = MODELS[name]
    reference = TorchReference(lively).model
    config = lively.config()
    params = convert_hf_to_jax_weights(reference, config)
    if "scanned" in name:
        config, params = config.replace(scan_layers=True), stack_layers(params)
    points = {point: True if point == LN_FINAL else LAYERS for point in OTHERS}
    model = create_model_with_hooks(config, lively.extract, points=points)
    return Case(lively, TorchHooks(reference), model, params)


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def rows_by_name(model: Any, activations: Any, points: Any) -> dict[str, np.ndarray]:
    """All captured rows [tokens, ...] by full name."""
    by_point = {RESID_POST: (model.capture_layers, activations)}
    by_point |= {point: (layers, points[point]) for point, layers in model.capture_points}
    return {
        full_name(point, layer): np.asarray(rows[number])
        for point, (layers, rows) in by_point.items()
        for number, layer in enumerate(layers)
    }


def assert_rows_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Rows [n, width] by name, beside those of the reference, which has all layers."""
    assert len(got) == 11 * len(LAYERS) + 1 + 2
    for name, rows in got.items():
        assert row_errors(rows, expected[name]).max() < TOLERANCE, name


def reference(case: Case, prompt: np.ndarray, tokens: np.ndarray, **kwargs: Any) -> dict[str, np.ndarray]:
    """The reference's rows [n, width] of a sequence, and its choice after each token but the last."""
    logits, rows = case.torch.run(np.concatenate([prompt, tokens])[None], **kwargs)
    np.testing.assert_array_equal(tokens, logits[0].argmax(-1)[len(prompt) - 1 : -1])
    return {name: value[0] for name, value in rows.items()}


def test_every_point_at_every_token_is_that_of_torchs_hooks(case: Case):
    out = case.generate()
    assert_lively(out.token_ids, distinct=3)
    generated = rows_by_name(case.model, out.activations, out.points)
    prompts = rows_by_name(case.model, out.prompt_activations, out.prompt_points)
    for b, prompt in enumerate(case.prompts):
        n = len(prompt)
        expected = reference(case, prompt, np.asarray(out.token_ids[b]))
        assert_rows_equal({k: v[:, b] for k, v in generated.items()}, {k: v[n:] for k, v in expected.items()})
        assert_rows_equal({k: v[:n, b] for k, v in prompts.items()}, {k: v[:n] for k, v in expected.items()})
        assert not any(v[n:, b].any() for v in prompts.values())


# --- Interventions ------------------------------------------------------------------------------------------

EVERY_POSITION = ("all", "prompt", "generated", [0, 2, 4, 7, 8])
LISTED = [1, 3, 7, 9]  # two of the prompt, two of what is generated


def interventions_of(case: Case, positions: tuple[Any, ...], strengths: np.ndarray) -> list[Intervention]:
    """One of each kind, and one at each point, with the strengths [rows, interventions]."""
    rng = np.random.default_rng(7)

    def vector(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) * scale

    config = case.model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    feature = {"encoder": vector(hidden), "decoder": vector(hidden), "decoder_bias": vector(hidden)}
    found = [
        Add("hook_resid_post", [1, 0], vector(2, hidden)),
        Add("attn.hook_q", 0, vector(heads)),
        Add("attn.hook_k", 1, vector(keys)),
        Add("attn.hook_v", True, vector(keys)),
        Add(LN_FINAL, None, vector(hidden)),
        ProjectOut("hook_resid_mid", True, vector(hidden, scale=5)),
        ProjectOut("ln1.hook_normalized", [1, 0], vector(2, hidden)),
        Replace("hook_attn_out", 1, vector(hidden)),
        Replace("hook_resid_pre", [1, 0], vector(2, len(LISTED), hidden), positions=LISTED),
        Replace("ln2.hook_normalized", 0, vector(3, hidden), positions=[0, 6, 8]),
        ScaleFeature("hook_resid_post", 1, scale=3.0, encoder_bias=0.5, **feature),
        ClampFeature("hook_mlp_out", 0, value=2.0, **feature),
        AblateHeads([0, 1], [1, 3]),
        AblateHeads(1, 0, vector(heads)),
        Custom("mlp.hook_post", True, lambda x: jnp.tanh(x[::-1]) * inner**0.5),
    ]
    return [
        dataclasses.replace(
            one,
            strength=strengths[:, i],
            **({} if one.positions != "all" else {"positions": positions[i % len(positions)]}),
        )
        for i, one in enumerate(found)
    ]


def torch_edit(chosen: list[Intervention], row: int, prompt_length: int, head_dim: int) -> Any:
    """The same interventions on the values of one row [1, n, width]."""

    def target(one: Any, x: Any, slot: int) -> Any:
        def of_layer(value: Any, axes: int = 1) -> Any:
            value = torch.as_tensor(np.asarray(value, np.float32))
            return value[slot] if value.ndim > axes else value

        match one:
            case Add():
                return x + of_layer(one.vector)
            case ProjectOut():
                direction = of_layer(one.direction) / of_layer(one.direction).norm()
                return x - torch.outer(x[0] @ direction, direction)
            case Replace() if isinstance(one.positions, str):
                return of_layer(one.value).expand_as(x)
            case Replace() if np.ndim(one.value) == 1:
                return of_layer(one.value).expand_as(x)
            case Replace():
                y = x.clone()
                rows = [position for position in one.positions if position < x.shape[1]]
                y[0, rows] = of_layer(one.value, axes=2)[: len(rows)]
                return y
            case ScaleFeature() | ClampFeature():
                a = torch.relu((x - of_layer(one.decoder_bias)) @ of_layer(one.encoder) + one.encoder_bias)
                wanted = one.scale * a if isinstance(one, ScaleFeature) else torch.full_like(a, one.value)
                return x + (wanted - a)[..., None] * of_layer(one.decoder)
            case AblateHeads():
                y = x.clone()
                for head in one.heads:
                    columns = slice(head * head_dim, (head + 1) * head_dim)
                    y[..., columns] = of_layer(one.value)[columns] if np.ndim(one.value) else one.value
                return y
            case Custom():
                return torch.tanh(x.flip(-1)) * x.shape[-1] ** 0.5

    def edit(name: str, x: Any) -> Any:
        point, layer = parse_name(name)
        for one in chosen:
            layers = (
                [0, 1]
                if one.layers is True
                else [None]
                if one.layers is None
                else np.atleast_1d(one.layers).tolist()
            )
            if one.point != point or layer not in layers:
                continue
            at = torch.arange(x.shape[1])
            where = {"all": at >= 0, "prompt": at < prompt_length, "generated": at >= prompt_length}
            listed = isinstance(one.positions, tuple)
            mask = torch.isin(at, torch.tensor(one.positions)) if listed else where[one.positions]
            s = float(one.strength[row]) * mask[None, :, None]
            x = x + s * (target(one, x, layers.index(layer)) - x)  # pyright: ignore[reportArgumentType]
        return x

    return edit


@pytest.mark.parametrize("turn", range(4))
def test_every_intervention_in_a_row_of_its_own_is_that_of_torchs_hooks(case: Case, turn: int):
    """Row 0 is clean, the last has all interventions, and row i + 1 has intervention i alone."""
    count, length = 15, 6
    strengths = np.zeros((count + 2, count), np.float32)
    strengths[1:-1] = np.diag(np.where(np.arange(count) % 2, 0.7, 1.0))
    strengths[-1] = 0.3
    positions = (*EVERY_POSITION[turn:], *EVERY_POSITION[:turn])
    chosen = interventions_of(case, positions, strengths)
    prompts = case.lively.prompts((length,) * len(strengths), seed=1)
    model = case.model
    args = model, case.params, np.stack(prompts), STEPS
    out: Any = generate_single_task_jitted(*args, interventions=chosen, extract_prompt=True)
    generated = rows_by_name(model, out.activations, out.points)
    prompt_rows = rows_by_name(model, out.prompt_activations, out.prompt_points)
    clean: Any = generate_single_task_jitted(*args)
    changed = [
        b for b in range(len(prompts)) if (out.activations[:, :, b] != clean.activations[:, :, b]).any()
    ]
    assert 0 not in changed  # to the last bit
    assert len(changed) > count - 4  # at a last layer, positions of the prompt change nothing but its logits
    np.testing.assert_array_equal(out.token_ids[0], clean.token_ids[0])
    for b, prompt in enumerate(prompts):
        edit = torch_edit(chosen, b, length, model.config.head_dim)
        expected = reference(case, prompt, np.asarray(out.token_ids[b]), edit=edit)
        got = {k: np.concatenate([prompt_rows[k][:, b], v[:, b]]) for k, v in generated.items()}
        assert_rows_equal(got, expected)


def test_the_engines_sequences_with_strengths_of_their_own_are_those_of_torchs_hooks():
    case = case_of("MHA, scanned")
    count = 15
    chosen: list[Any] = list(interventions_of(case, EVERY_POSITION, np.ones((1, count), np.float32)))
    chosen = [dataclasses.replace(one, strength=1.0) for one in chosen]
    strengths = np.stack([np.zeros(count), *(np.eye(count)[[1, 5, 8, 13]]), np.full(count, 0.3)])
    engine = ContinuousEngine(
        case.model, case.params, slots=2, capture_prompt=True, interventions=chosen, max_tokens=STEPS
    )
    prompt = case.lively.prompts((6,), seed=1)[0]
    requests = [
        SequenceRequest(prompt, STEPS - b, b, id=b, capture_prompt=True, strengths=of_row)
        for b, of_row in enumerate(strengths)
    ]
    finished: dict[Any, Any] = {one.id: one for one in engine.run(requests)}
    assert len(finished) == len(strengths)
    for b, one in finished.items():
        of_row = [dataclasses.replace(c, strength=strengths[b, i : i + 1]) for i, c in enumerate(chosen)]
        edit = torch_edit(of_row, 0, len(prompt), case.model.config.head_dim)
        assert_rows_equal(
            rows_by_name(case.model, one.rows, one.points), reference(case, prompt, one.token_ids, edit=edit)
        )


@pytest.mark.parametrize("before", [False, True])
def test_captured_is_what_later_layers_read_or_on_request_what_was_there_before(before: bool):
    case = case_of("GQA")
    points = {"hook_attn_out": 1, LN_FINAL: True}
    model = create_model_with_hooks(case.model.config, [0, 1], points=points, capture_before=before)
    vector = np.full(case.lively.hidden, 0.5, np.float32)
    chosen = [
        Add("hook_attn_out", 1, vector),
        Add("hook_resid_post", [0, 1], vector),
        Add(LN_FINAL, None, vector),
    ]
    ids = case.prompts[1][None]
    output: Any = model.apply({"params": case.params}, ids, interventions=chosen)
    _, _, rows, points = output
    edit = torch_edit([dataclasses.replace(one, strength=[1.0]) for one in chosen], 0, ids.shape[1], 1)
    _, expected = case.torch.run(ids, edit)
    got = rows_by_name(model, rows, points)
    assert set(got) == {
        full_name(RESID_POST, 0),
        full_name(RESID_POST, 1),
        full_name("hook_attn_out", 1),
        LN_FINAL,
    }
    for name, values in got.items():
        assert row_errors(values[:, 0] + before * vector, expected[name][0]).max() < TOLERANCE


def test_the_growing_cache_gives_the_same_points_and_interventions():
    case = case_of("GQA")
    chosen = interventions_of(case, EVERY_POSITION, np.ones((3, 15), np.float32) * [[0.0], [0.3], [1.0]])
    kwargs: dict[str, Any] = {"interventions": chosen}
    case = dataclasses.replace(case)
    fixed, growing = case.generate(**kwargs), case.generate(generate_single_task_python, **kwargs)
    np.testing.assert_array_equal(fixed.token_ids, growing.token_ids)
    for one in ("points", "prompt_points"):
        for name, rows in getattr(fixed, one).items():
            np.testing.assert_allclose(rows, getattr(growing, one)[name], atol=1e-3, err_msg=name)
