"""Models of the shape of Qwen2.5-0.5B: as shapes alone, or with random weights made in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_core.config import QwenConfig
from qwen2_jax_with_hooks import FIXED_EXTRACT_LAYERS, QwenModelWithActivations, create_model_with_hooks


def abstract_model(
    config: QwenConfig, extract: Sequence[int] = FIXED_EXTRACT_LAYERS
) -> tuple[QwenModelWithActivations, Any]:
    """Returns a model and its parameters' shapes; no memory is taken."""
    model = create_model_with_hooks(config, tuple(extract))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    return model, params


def random_model(config: QwenConfig) -> tuple[QwenModelWithActivations, Any]:
    """Returns a model with weights for timing: one block of random numbers, repeated.

    Making half a billion different ones would take longer than what is timed.
    """
    model, shapes = abstract_model(config)
    block = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(config.dtype)
    return model, jax.tree.map(lambda leaf: jnp.asarray(np.resize(block, leaf.shape), leaf.dtype), shapes)
