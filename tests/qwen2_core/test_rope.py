"""Rotary frequencies and angles: those of Transformers bit for bit, also at far positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_core.config import QwenConfig
from qwen2_core.rope import plain_frequencies, rope_angles

HALF = 32
BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
LONG = {
    "short_factor": [1 + i / 50 for i in range(HALF)],
    "long_factor": [1 + i / 5 for i in range(HALF)],
    "original_max_position_embeddings": 4096,
}
LLAMA = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn, its factor the ratio": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.25,
    },
    "yarn, every setting": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 20,
        "beta_slow": 2,
        "truncate": False,
    },
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA},
    "longrope": {"rope_type": "longrope", **LONG},
    "longrope, its factor given": {"rope_type": "longrope", **LONG, "factor": 2.5},
    "proportional": {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
}
FAR = (100, 32_768, 131_072, 1_000_000)


def frequencies(config: QwenConfig, length: int) -> np.ndarray:
    if config.rope_scaling is None:
        return plain_frequencies(config.rope_theta, 2 * HALF)
    lengths = jnp.full((1, 1), length, jnp.int32)
    found = config.rope_scaling.frequencies_at(config.rope_theta, 2 * HALF, lengths)
    return np.broadcast_to(found, (1, 1, HALF))[0, 0]


@pytest.mark.parametrize("theta", [500.0, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_angles_are_those_of_transformers(name: str, theta: float):
    torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    hf = BASE | {"rope_scaling": dict(ROPES[name]), "rope_theta": theta}
    config = QwenConfig.from_hf(hf | {"model_type": "qwen2"})
    rope = config.rope_scaling
    for length in FAR:
        said: Any = hf | {"rope_scaling": dict(ROPES[name])}
        theirs = Qwen2RotaryEmbedding(Qwen2Config(**said))
        positions = np.array([[0, 1, length // 2, length - 1]], np.int32)
        cos, sin = theirs(torch.zeros(1), torch.from_numpy(positions.astype(np.int64)))
        got, expected = frequencies(config, length), theirs.inv_freq.numpy()
        if name == "dynamic" and length > 32_768:
            grown = theta * (4.0 * length / 32_768 - 3) ** (HALF / (HALF - 1))
            exact = grown ** -(np.arange(HALF) / HALF)
            assert np.abs(got / exact - 1).max() <= max(1.2e-7, 2 * np.abs(expected / exact - 1).max())
            continue
        np.testing.assert_array_equal(got, expected)
        ours = rope_angles(
            jnp.asarray(positions), 2 * HALF, theta, rope, jnp.full(positions.shape, length, jnp.int32)
        )
        for mine, their in zip(ours, (cos, sin), strict=True):
            np.testing.assert_allclose(mine, their.numpy()[..., :HALF], rtol=0, atol=3e-7)
        if rope is not None:
            assert rope.attention_factor == theirs.attention_scaling


@pytest.mark.parametrize(("first", "most"), [(31_768, 0.0024), (130_072, 0.0096), (999_000, 0.065)])
def test_far_angles_are_off_by_no_more_than_float32_frequencies_make_them(first: int, most: float):
    positions = np.arange(first, first + 1000)
    cos, sin = jax.jit(lambda p: rope_angles(p, 128, 1e6))(jnp.asarray(positions[None], jnp.int32))
    exact = positions[:, None] * 1e6 ** -(np.arange(64) / 64)
    difference = np.angle(np.exp(1j * exact) / (np.asarray(cos[0]) + 1j * np.asarray(sin[0])))
    assert most / 2 < np.abs(difference).max() < most
    # Of the angles as they are, cosine and sine are exact.
    angles = (positions[:, None].astype(np.float32) * plain_frequencies(1e6, 128)).astype(np.float64)
    np.testing.assert_allclose(cos[0], np.cos(angles), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin(angles), rtol=0, atol=1e-6)
