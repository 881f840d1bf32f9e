"""Seeded lively Qwen2 and Qwen3 models for tests, made without torch, the same bytes on every machine.

Lively: greedy decoding gives a varied sequence. A model at the usual initialisation repeats one token for
ever, and so it does with a broken cache; a test on it shows nothing. ``assert_lively`` says so.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from qwen2_core.config import QwenConfig
from qwen2_core.weights import convert_hf_to_jax_weights
from qwen2_jax import stack_layers
from qwen2_jax_with_hooks import FIXED_EXTRACT_LAYERS, QwenModelWithActivations, create_model_with_hooks


def _load_writer() -> ModuleType:
    """The example checkpoints' writer, which owns the recipe for lively weights; examples is no package."""
    path = Path(__file__).parents[2] / "examples" / "checkpoint_writer.py"
    spec = importlib.util.spec_from_file_location("checkpoint_writer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


writer = _load_writer()


@dataclass(frozen=True)
class Lively:
    """One model: what decides its shape, its weights (``seed``) and what is captured from it."""

    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    tied: bool = True
    extract: tuple[int, ...] = (1, 3, 5)
    hidden: int = 64
    inner: int = 96
    vocab: int = 160
    seed: int = 0
    head_dim: int | None = None  # a number makes it a Qwen3
    biased: bool = False  # of a Qwen3: attention_bias
    settings: tuple[tuple[str, Any], ...] = ()  # further keys of config.json

    @property
    def hf_config(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        make = writer.qwen2_config
        if self.head_dim is not None:
            make = functools.partial(writer.qwen3_config, head_dim=self.head_dim, attention_bias=self.biased)
        written = make(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            dtype="float32",
            token_ids={"<|endoftext|>": 0, "<|im_end|>": 1},
        )
        return written | dict(self.settings)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Hugging Face names to float32 arrays, ``[out, in]`` for projections."""
        shapes = writer.tensor_shapes(self.hf_config)
        float32 = np.dtype(np.float32)
        return {name: writer.lively_tensor(name, shape, self.seed, float32) for name, shape in shapes.items()}

    def config(self, **changes: Any) -> QwenConfig:
        return QwenConfig.from_hf(self.hf_config).replace(**changes)

    def build(
        self, dtype: Any = jnp.float32, scan_layers: bool = False
    ) -> tuple[QwenModelWithActivations, dict[str, Any]]:
        """The model with hooks and its parameters."""
        config = self.config(dtype=dtype)
        params = convert_hf_to_jax_weights(self.state_dict(), config)
        if scan_layers:
            config, params = config.replace(scan_layers=True), stack_layers(params)
        return create_model_with_hooks(config, self.extract), params

    def save(self, directory: Path, max_shard_bytes: int = 1 << 30) -> Path:
        """Writes the checkpoint in Hugging Face layout; returns the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        writer.write_checkpoint(directory, self.hf_config, self.seed, max_shard_bytes)
        return directory

    def prompts(self, lengths: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
        """Random prompts of these lengths; a longer one starts with nothing that a shorter one has."""
        rng = np.random.default_rng([self.seed, seed])
        return [rng.integers(0, self.vocab, length, dtype=np.int32) for length in lengths]


# The depth of Qwen2.5-0.5B, so that the layers which the project is about exist.
DEEP = Lively(layers=24, extract=FIXED_EXTRACT_LAYERS)
SHALLOW = Lively()
# Qwen3 as its sizes are: heads wider than the stream has room for, two for each of keys and values.
THREE = Lively(layers=4, heads=4, kv_heads=2, head_dim=32, extract=(0, 3), seed=11)


def pad_right(
    prompts: list[np.ndarray], width: int | None = None, fill: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids [P, width], lengths [P]); what pads them is for the caller to choose."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.full((len(prompts), width or lengths.max()), fill, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


def row_errors(got: Any, expected: Any) -> np.ndarray:
    """Relative error ``||got - expected|| / ||expected||`` of every row (the last axis)."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def assert_lively(token_ids: Any, distinct: int = 16) -> None:
    """Every sequence of 64 tokens has at least this many different ones."""
    for row in token_ids:
        row = np.asarray(row).tolist()
        assert len(set(row)) >= distinct, f"a dead model: {row}"


def rewrite_safetensors(file: Path, change: Any) -> None:
    """Passes a file's tensors through ``change(dict)`` and writes them back."""
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def rewrite_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON object; None removes one."""
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))
