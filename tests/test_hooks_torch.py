"""Every hook point, read and written, beside torch's hooks on Transformers' model, in float32."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from lively import SHALLOW, Lively, assert_lively, pad_right, row_errors

from generate_jitted import Generation, generate_single_task_jitted
from qwen2_core.hook_points import LN_FINAL, RESID_POST, full_name, point_names
from qwen2_engine.python_loop import generate_single_task_python
from qwen2_jax import convert_hf_to_jax_weights, stack_layers
from qwen2_jax_with_hooks import create_model_with_hooks

pytest.importorskip("torch", reason="live parity needs torch: pip install '.[parity]'")
from torch_hooks import TorchHooks
from torch_reference import TorchReference

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
STEPS = 12
LENGTHS = (1, 7, 40)
LAYERS = (0, 2)  # captured at every point
OTHERS = tuple(point for point in point_names() if point != RESID_POST)
MODELS = {
    "GQA": dataclasses.replace(SHALLOW, layers=3, tied=False, seed=5, extract=(2, 0)),
    "MHA, scanned": dataclasses.replace(SHALLOW, layers=3, kv_heads=4, tied=False, seed=1, extract=(2, 0)),
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


@pytest.mark.parametrize("loop", [generate_single_task_jitted, generate_single_task_python])
def test_every_point_at_every_token_is_that_of_torchs_hooks(case: Case, loop: Any):
    out = case.generate(loop)
    assert_lively(out.token_ids, distinct=6)
    generated = rows_by_name(case.model, out.activations, out.points)
    prompts = rows_by_name(case.model, out.prompt_activations, out.prompt_points)
    for b, prompt in enumerate(case.prompts):
        n = len(prompt)
        expected = reference(case, prompt, np.asarray(out.token_ids[b]))
        assert_rows_equal({k: v[:, b] for k, v in generated.items()}, {k: v[n:] for k, v in expected.items()})
        assert_rows_equal({k: v[:n, b] for k, v in prompts.items()}, {k: v[:n] for k, v in expected.items()})
        assert not any(v[n:, b].any() for v in prompts.values())
