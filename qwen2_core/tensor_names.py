"""Finds each tensor of a model among those that a checkpoint stores, by the rules of Transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from qwen2_core.checkpoint_files import FLOATS, StoredTensors
from qwen2_core.config import QwenConfig
from qwen2_core.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LISTED = 20  # tensors that an error names of each kind; a wrong checkpoint differs in hundreds
_ROWS = 4096  # of the embedding, compared at a time


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Says where one Hugging Face tensor goes: its path in the tree, and its shape as stored."""

    path: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Returns whether the tree holds the transpose."""
        return self.path[-1] == "kernel"

    @property
    def tree_shape(self) -> tuple[int, ...]:
        """Returns the shape in the tree."""
        return self.shape[::-1] if self.transposed else self.shape


def tensor_specs(config: QwenConfig) -> dict[str, TensorSpec]:
    """Returns every tensor that a checkpoint of this config has, by its Hugging Face name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    biased = ("q_proj", "k_proj", "v_proj") * config.qkv_bias + ("o_proj",) * config.output_bias
    specs = {EMBEDDING: TensorSpec(("embed_tokens", "embedding"), (config.vocab_size, hidden))}
    projections = {
        ("self_attn", "q_proj"): (heads, hidden),
        ("self_attn", "k_proj"): (kv, hidden),
        ("self_attn", "v_proj"): (kv, hidden),
        ("self_attn", "o_proj"): (hidden, heads),
        ("mlp", "gate_proj"): (inner, hidden),
        ("mlp", "up_proj"): (inner, hidden),
        ("mlp", "down_proj"): (hidden, inner),
    }
    for layer in range(config.num_hidden_layers):
        tree, name = f"layers_{layer}", f"model.layers.{layer}"
        for (block, projection), shape in projections.items():
            specs[f"{name}.{block}.{projection}.weight"] = TensorSpec(
                (tree, block, projection, "kernel"), shape
            )
            if projection in biased:
                bias = TensorSpec((tree, block, projection, "bias"), shape[:1])
                specs[f"{name}.{block}.{projection}.bias"] = bias
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs[f"{name}.{norm}.weight"] = TensorSpec((tree, norm, "weight"), (hidden,))
        for norm in ("q_norm", "k_norm") * config.qk_norm:
            path = (tree, "self_attn", norm, "weight")
            specs[f"{name}.self_attn.{norm}.weight"] = TensorSpec(path, (config.head_dim,))
    specs["model.norm.weight"] = TensorSpec(("norm", "weight"), (hidden,))
    if not config.tie_word_embeddings:
        specs[HEAD] = TensorSpec(("lm_head", "kernel"), (config.vocab_size, hidden))
    return specs


def locate_stored(stored: StoredTensors, config: QwenConfig) -> dict[str, str]:
    """Finds each of the config's tensors in open weight files; see ``locate``."""
    dtypes = {name: FLOATS.get(dtype, dtype) for name, dtype in stored.dtypes().items()}
    return locate(stored.shapes(), dtypes, config, f"The checkpoint in {stored.directory}")


def locate(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], config: QwenConfig, where: str
) -> dict[str, str]:
    """Finds each of the config's tensors; returns the name that it has in the file, by its Hugging Face name.

    As for Transformers the prefix ``model.`` may be left out, a tied checkpoint may store the embedding, the
    head or both (then both are returned), and tables of rotary frequencies are passed over.

    Raises:
        CheckpointError: listing every missing, unexpected, doubled, mis-shaped and mis-typed tensor.
    """
    specs = tensor_specs(config)
    wanted = specs | {HEAD: TensorSpec(("lm_head", "kernel"), specs[EMBEDDING].shape)}
    found: dict[str, str] = {}
    unexpected, doubled = [], []
    for name in shapes:
        bare, full = name.removeprefix("model."), f"model.{name}"
        known = next((one for one in (name, full, bare) if one in wanted), None)
        if known in found:
            doubled.append(f"{name} and {found[known]}")
        elif known is not None:
            found[known] = name
        elif "rotary_emb.inv_freq" not in name:
            unexpected.append(name)
    if config.tie_word_embeddings and HEAD in found:
        found.setdefault(EMBEDDING, found[HEAD])
    problems = [
        ("missing", [name for name in specs if name not in found]),
        ("unexpected", unexpected),
        ("given twice", doubled),
        (
            "mis-shaped",
            [
                f"{stored} {list(shapes[stored])} instead of {list(wanted[name].shape)}"
                for name, stored in found.items()
                if shapes[stored] != wanted[name].shape
            ],
        ),
        (
            "not of floats",
            [f"{one} {dtypes[one]}" for one in found.values() if dtypes[one] not in FLOATS.values()],
        ),
    ]
    listed = []
    for kind, names in problems:
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            listed.append(f"{kind}: {', '.join(names[:_LISTED])}{more}")
    if listed:
        raise CheckpointError(
            f"{where} does not fit its config ({config.num_hidden_layers} layers"
            f"{', a head of its own' if HEAD in specs and HEAD not in found else ''}): {'; '.join(listed)}."
        )
    return found


def is_tied(read: Callable[[str], np.ndarray], names: Mapping[str, str], config: QwenConfig) -> bool:
    """Tells whether the embedding serves as the head, for a config that says so: no other head is stored."""
    if HEAD not in names or names[HEAD] == names[EMBEDDING]:
        return True
    head, embedding = read(HEAD), read(EMBEDDING)
    return all(
        np.array_equal(head[rows].astype(config.dtype), embedding[rows].astype(config.dtype))
        for rows in (slice(start, start + _ROWS) for start in range(0, config.vocab_size, _ROWS))
    )
