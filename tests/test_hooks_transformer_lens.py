"""Hook points have TransformerLens' names and values: the same weights in both, live."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lively import SHALLOW, THREE, Lively

from qwen2_core.hook_points import full_name, parse_name, point_names
from qwen2_jax import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

OTHER_PROCESS = Path(__file__).parent / "support" / "transformer_lens_values.py"
LAYERS = 2
TOLERANCE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "lively",
    [SHALLOW, dataclasses.replace(SHALLOW, kv_heads=4), THREE],
    ids=["GQA", "MHA", "Qwen3"],
)
def test_every_point_has_the_value_of_transformer_lens(lively: Lively, tmp_path: Path):
    if importlib.util.find_spec("transformer_lens") is None:
        pytest.skip("transformer-lens is not installed")
    lively = dataclasses.replace(lively, layers=LAYERS, tied=False, seed=3)
    checkpoint = lively.save(tmp_path / "checkpoint")
    tokens = np.random.default_rng(0).integers(0, lively.vocab, (2, 12), dtype=np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    names = [
        full_name(point, layer)
        for point in point_names()
        for layer in ((None,) if "final" in point else range(LAYERS))
    ]
    done = subprocess.run(
        [sys.executable, OTHER_PROCESS, checkpoint, tmp_path / "tokens.npy", tmp_path / "values.npz", *names],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "values.npz")

    config, params = load_qwen2(checkpoint)
    others = {point: True for point in point_names() if point != "hook_resid_post"}
    model = create_model_with_hooks(config, range(LAYERS), points=others)
    output: Any = model.apply({"params": params}, tokens)
    logits, _, stream, points = output
    np.testing.assert_allclose(logits, theirs["logits"], atol=TOLERANCE * np.abs(theirs["logits"]).max())
    assert len(names) == 12 * LAYERS + 1
    for name in names:
        point, layer = parse_name(name)
        stacked = stream if point == "hook_resid_post" else points[point]
        ours = np.asarray(stacked[layer or 0]).swapaxes(0, 1)  # [batch, tokens, width]
        expected = theirs[name]
        assert np.linalg.norm(ours - expected) < TOLERANCE * np.linalg.norm(expected), name
