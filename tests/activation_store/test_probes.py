"""Numbers along directions and of SAE features: what files are read, and what is computed of a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from activation_store import StoreError
from activation_store.probes import Probe, load_directions, load_features

HIDDEN, FEATURES = 8, 6
ROWS = np.random.default_rng(0).standard_normal((20, HIDDEN)).astype(np.float32)


def save(path: Path, metadata: dict[str, str] | None = None, **tensors: Any) -> Path:
    named = {name.replace("__", "."): np.asarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(named, path, metadata)
    return path


def test_a_row_s_number_is_its_part_along_the_direction(tmp_path: Path):
    direction = np.arange(HIDDEN, dtype=np.float32)
    file = save(tmp_path / "d.safetensors", {"layer": "12"}, up=direction)
    (probe,) = load_directions(file, HIDDEN)
    assert (probe.label, probe.kind, probe.layer) == ("d: up", "direction", 12)
    expected = ROWS @ (direction / np.linalg.norm(direction))
    np.testing.assert_allclose(probe.measure(ROWS), expected, rtol=1e-5, atol=1e-6)


def test_several_directions_of_a_file_are_numbered(tmp_path: Path):
    both = np.eye(2, HIDDEN, dtype=ml_dtypes.bfloat16)
    probes = load_directions(save(tmp_path / "d.safetensors", up=both), HIDDEN, layer=7)
    assert [(probe.label, probe.layer) for probe in probes] == [("d: up 0", 7), ("d: up 1", 7)]
    np.testing.assert_array_equal(probes[1].measure(ROWS), ROWS[:, 1])


def test_the_name_of_a_tensor_may_be_its_layer(tmp_path: Path):
    file = save(tmp_path / "d.safetensors", {"layer": "9"}, blocks__12__hook_resid_post=np.ones(HIDDEN))
    assert load_directions(file, HIDDEN)[0].layer == 12


@pytest.mark.parametrize(
    ("tensor", "metadata", "message"),
    [
        (np.ones(HIDDEN + 1), {"layer": "1"}, r"tensor up is \[9\]; a direction of this store is \[8\]"),
        (np.ones((2, 2, HIDDEN)), {"layer": "1"}, r"tensor up is \[2, 2, 8\]"),
        (np.zeros(HIDDEN), {"layer": "1"}, "has the length 0.0"),
        (np.full(HIDDEN, np.nan), {"layer": "1"}, "has the length nan"),
        (np.ones((65, HIDDEN)), {"layer": "1"}, "has 65 directions; at most 64"),
        (np.ones(HIDDEN), None, "does not say which layer up is of: give --layer"),
        (np.ones(HIDDEN), {"layer": "twelve"}, "does not say which layer"),
    ],
)
def test_what_is_no_direction_is_refused(tmp_path: Path, tensor: Any, metadata: Any, message: str):
    file = save(tmp_path / "d.safetensors", metadata, up=tensor.astype(np.float32))
    with pytest.raises(StoreError, match=message):
        load_directions(file, HIDDEN)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "d.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match="cannot be read as safetensors"):
        load_directions(tmp_path / "d.safetensors", HIDDEN)


# --- SAE features -------------------------------------------------------------------------------------------


def make_sae(folder: Path, **changes: Any) -> dict[str, np.ndarray]:
    """Writes an SAE as SAELens does; a change of None removes an entry."""
    rng = np.random.default_rng(1)
    tensors = {
        "W_enc": rng.standard_normal((HIDDEN, FEATURES)).astype(np.float32),
        "b_enc": rng.standard_normal(FEATURES).astype(np.float32),
        "W_dec": 3 * rng.standard_normal((FEATURES, HIDDEN)).astype(np.float32),
        "b_dec": rng.standard_normal(HIDDEN).astype(np.float32),
        "threshold": np.array([0.5, -1, 2, 0.1, 0.2, 0.3], np.float32),
    }
    configuration = {
        "architecture": "standard",
        "d_in": HIDDEN,
        "d_sae": FEATURES,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.12.hook_resid_post"},
    } | changes
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "sae_weights.safetensors")
    kept = {name: value for name, value in configuration.items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(kept))
    return tensors


def before_activation(of: dict[str, np.ndarray], centred: bool = True) -> np.ndarray:
    return (ROWS - (of["b_dec"] if centred else 0)) @ of["W_enc"] + of["b_enc"]


def measured(folder: Path) -> np.ndarray:
    """All features of all rows, [rows, features]."""
    probes = load_features(folder, range(FEATURES), HIDDEN)
    return np.stack([probe.measure(ROWS) for probe in probes], axis=1)


@pytest.mark.parametrize("centred", [True, False])
def test_a_standard_feature_is_the_positive_part(tmp_path: Path, centred: bool):
    of = make_sae(tmp_path / "sae", apply_b_dec_to_input=centred)
    expected = np.maximum(before_activation(of, centred), 0)
    np.testing.assert_allclose(measured(tmp_path / "sae"), expected, rtol=1e-5, atol=1e-5)


def test_a_jumprelu_feature_is_zero_up_to_its_threshold(tmp_path: Path):
    of = make_sae(tmp_path / "sae", architecture="jumprelu")
    before = before_activation(of)
    expected = np.where(before > np.maximum(of["threshold"], 0), before, 0)
    assert ((before > 0) & (expected == 0)).any()
    np.testing.assert_allclose(measured(tmp_path / "sae"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rescaled", [True, False])
def test_only_the_k_largest_features_of_a_topk_sae_are_active(tmp_path: Path, rescaled: bool):
    of = make_sae(tmp_path / "sae", architecture="topk", k=2, rescale_acts_by_decoder_norm=rescaled)
    before = before_activation(of) * (np.linalg.norm(of["W_dec"], axis=1) if rescaled else 1)
    least = np.sort(before, axis=1)[:, -2:-1]
    expected = np.where(before >= least, np.maximum(before, 0), 0)
    np.testing.assert_allclose(measured(tmp_path / "sae"), expected, rtol=1e-5, atol=1e-5)


def test_the_layer_is_that_of_the_configuration_s_hook(tmp_path: Path):
    def layer(**changes: Any) -> int:
        make_sae(tmp_path / "sae", **changes)
        (probe,) = load_features(tmp_path / "sae" / "sae_weights.safetensors", [3], HIDDEN, layer=5)
        assert isinstance(probe, Probe)
        assert (probe.label, probe.kind) == ("sae: feature 3", "feature")
        return probe.layer

    assert layer() == 12
    assert layer(metadata=None, hook_name="blocks.7.hook_resid_post") == 7  # SAELens before version 6
    assert layer(metadata=None) == 5


@pytest.mark.parametrize(
    ("changes", "feature", "message"),
    [
        ({}, FEATURES, "has 6 features: there is no 6"),
        ({"architecture": "gated"}, 0, "'gated' with normalize_activations 'none'; standard, jumprelu, topk"),
        ({"normalize_activations": "layer_norm"}, 0, "normalize_activations 'layer_norm'"),
        ({"architecture": "topk"}, 0, "'k' is missing"),
        ({"architecture": "topk", "k": 0}, 0, "is not the SAE of its cfg.json"),
        ({"metadata": None}, 0, "does not name a layer: give --layer"),
    ],
)
def test_an_sae_that_cannot_be_shown_is_refused(tmp_path: Path, changes: Any, feature: int, message: str):
    make_sae(tmp_path / "sae", **changes)
    with pytest.raises(StoreError, match=message):
        load_features(tmp_path / "sae", [feature], HIDDEN)


def test_an_sae_of_another_width_or_without_its_files_is_refused(tmp_path: Path):
    make_sae(tmp_path / "sae")
    with pytest.raises(StoreError, match="for rows of width 9"):
        load_features(tmp_path / "sae", [0], 9)
    (tmp_path / "sae" / "cfg.json").write_text("[1]")
    with pytest.raises(StoreError, match="it is no JSON object"):
        load_features(tmp_path / "sae", [0], HIDDEN)
    with pytest.raises(StoreError, match=r"cfg\.json cannot be read"):
        load_features(tmp_path, [0], HIDDEN)
