"""Every published size of the Qwen2 family: read as Transformers reads it, and compiled by its shape."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from published_configs import PUBLISHED, YARN
from real_shape import abstract_model
from transformers import Qwen2Config

from generate_jitted import GenerateShape, lower_generate
from qwen2_core.config import QwenConfig
from qwen2_core.errors import CheckpointError
from qwen2_core.requests import check_prompts

SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
# Of each shape one model, and its parameters in billions, as its card says them.
BILLIONS = {
    "Qwen2.5-0.5B": 0.49,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-7B": 7.61,
    "Qwen2.5-14B": 14.7,
    "QwQ-32B": 32.5,
    "Qwen2.5-72B": 72.7,
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("more", [{}, {"rope_scaling": YARN}], ids=["as published", "with YaRN"])
def test_each_published_config_reads_as_transformers_reads_it(name: str, more: dict[str, Any]):
    hf = PUBLISHED[name] | more
    config, theirs = QwenConfig.from_hf(hf), Qwen2Config(**{k: v for k, v in hf.items() if k != "model_type"})
    assert {n: getattr(config, n) for n in SAME_NAMES} == {n: getattr(theirs, n) for n in SAME_NAMES}
    assert config.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert config.windows == (None,) * theirs.num_hidden_layers
    assert theirs.layer_types == ["full_attention"] * theirs.num_hidden_layers
    assert config.dtype == "bfloat16"
    rope: Any = theirs.rope_parameters
    assert config.rope_theta == rope["rope_theta"]
    assert (config.rope_scaling is None) == (rope["rope_type"] == "default")
    if config.rope_scaling is not None:
        original = config.rope_scaling.original_max_position_embeddings
        assert (config.rope_scaling.factor, original) == (4.0, rope["original_max_position_embeddings"])


def test_yarn_makes_the_contexts_that_the_model_cards_promise():
    for name in ("Qwen2.5-7B-Instruct", "QwQ-32B"):
        assert QwenConfig.from_hf(PUBLISHED[name] | {"rope_scaling": YARN}).context_length == 131_072


def test_models_of_a_million_tokens_are_refused_longer_texts_than_one_chunk():
    """Their dual chunk attention is attention as usual up to there, and something else beyond."""
    config = QwenConfig.from_hf(PUBLISHED["Qwen2.5-7B-Instruct-1M"])
    assert config.max_position_embeddings == 1_010_000
    assert config.context_length == 256 * 1024 - 8 * 1024
    with pytest.raises(ValueError, match="exceed the model's context of 253952"):
        check_prompts(config, np.arange(253_953)[None] % 1000, [253_953], 0)
    for chunks in ({"chunk_size": 8}, {"chunk_size": 8, "local_size": 8}, 5):
        with pytest.raises(CheckpointError, match=r"dual_chunk_attention_config .* lacks chunk_size"):
            QwenConfig.from_hf(PUBLISHED["QwQ-32B"] | {"dual_chunk_attention_config": chunks})
    with pytest.raises(CheckpointError, match=r"use_mrope .* is not implemented"):
        QwenConfig.from_hf(PUBLISHED["QwQ-32B"] | {"use_mrope": True})


@pytest.mark.parametrize("name", BILLIONS)
def test_each_size_has_the_parameters_that_its_card_says(name: str):
    config = QwenConfig.from_hf(PUBLISHED[name]).replace(scan_layers=True)
    _, params = abstract_model(config)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", BILLIONS)
def test_the_programs_of_each_size_are_traced_by_its_shape(name: str):
    hf = PUBLISHED[name] | {"rope_scaling": YARN}
    model, params = abstract_model(QwenConfig.from_hf(hf).replace(scan_layers=True))
    prefill, decode = lower_generate(model, params, GenerateShape(2, 64, 16, samples_per_prompt=2))
    rows = decode.out_info.activations
    assert rows.shape == (14, 16, 4, model.config.hidden_size)
    assert prefill.out_info[0].cache.prefill.k.shape[2] == model.config.num_key_value_heads


@pytest.mark.slow
def test_the_large_sizes_compile_on_a_mesh_of_eight_devices():
    """By their shapes, without a weight; each device's arguments are its eighth of the weights."""
    script = Path(__file__).parents[1] / "support" / "compile_on_mesh.py"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    path = os.pathsep.join([str(script.parents[2]), str(script.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, "Qwen2.5-14B", "QwQ-32B", "Qwen2.5-72B"],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shares = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    for name, share in shares.items():
        assert float(share) == pytest.approx(1 / 8, rel=0.02), name
    assert len(shares) == 3
