"""Checkpoints as people have them, each loaded by Transformers and by us: the same logits, or our refusal.

There is no third outcome. Where Transformers makes a tensor up or passes over one with a warning, we refuse.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import SHALLOW, THREE, Lively, rewrite_json, rewrite_safetensors

from qwen2_core.errors import CheckpointError
from qwen2_core.weights import load_qwen2
from qwen2_jax import QwenModel

torch = pytest.importorskip("torch", reason="live parity needs torch: pip install '.[parity]'")
safetensors_torch = pytest.importorskip("safetensors.torch")
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

BASE = replace(SHALLOW, layers=2, tied=True, extract=(0,))
OTHER_HEAD = replace(BASE, seed=9).state_dict()["model.embed_tokens.weight"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOLERANCE = 1e-4
Make = Callable[[Path], object]
Tensors = dict[str, np.ndarray]


def saved(lively: Lively = BASE, *makes: Make, **changes: Any) -> Make:
    """Writes a lively model; ``changes`` of its config (None removes a key), then other changes."""

    def make(folder: Path) -> None:
        lively.save(folder)
        rewrite_json(folder / "config.json", **changes)
        for one in makes:
            one(folder)

    return make


def config_is(**values: Any) -> Make:
    """Sets keys of the config, null included."""

    def make(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return make


def tensors(change: Callable[[Tensors], object]) -> Make:
    return lambda folder: rewrite_safetensors(folder / "model.safetensors", change)


def with_tensor(name: str, value: Any) -> Make:
    return tensors(lambda t: t.update({name: np.asarray(value)}))


def without(*names: str) -> Make:
    return tensors(lambda t: [t.pop(name) for name in names])


def renamed(change: Callable[[str], str]) -> Make:
    def rename(t: Tensors) -> None:
        items = {change(name): array for name, array in t.items()}
        t.clear()
        t.update(items)

    return tensors(rename)


def cast(dtype: Any, only: str = "") -> Make:
    return tensors(lambda t: t.update({n: a.astype(dtype) for n, a in t.items() if only in n}))


def torch_model(folder: Path, lively: Lively = BASE) -> Any:
    model = Qwen2ForCausalLM(Qwen2Config(**lively.hf_config))
    model.load_state_dict({n: torch.from_numpy(a) for n, a in lively.state_dict().items()}, strict=False)
    model.tie_weights()
    folder.mkdir()
    return model


def by_save_model(folder: Path) -> None:
    model = torch_model(folder)
    model.config.save_pretrained(folder)
    safetensors_torch.save_model(model, str(folder / "model.safetensors"))


def by_base_model(lively: Lively) -> Make:
    return lambda folder: torch_model(folder, lively).model.save_pretrained(folder)


def sharded(lively: Lively = BASE, *makes: Make) -> Make:
    def make(folder: Path) -> None:
        lively.save(folder, max_shard_bytes=60_000)
        for one in makes:
            one(folder)

    return make


def index(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))

    return make


def remove(pattern: str) -> Make:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def single_beside_another_index(folder: Path) -> None:
    replace(BASE, seed=5).save(folder, max_shard_bytes=60_000)
    BASE.save(folder.parent / "single")
    shutil.copy(folder.parent / "single" / "model.safetensors", folder)


def links_to_weights_elsewhere(folder: Path) -> None:
    BASE.save(folder)
    elsewhere = folder.parent / "weights.bin"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)


def whole_folder_is_a_link(folder: Path) -> None:
    folder.symlink_to(BASE.save(folder.parent / "real"))


def wider(name: str, array: np.ndarray) -> np.ndarray:
    """Returns a tensor of attention for heads twice as wide."""
    axis = 1 if "o_proj" in name else 0
    return np.concatenate([array, np.flip(array, axis)], axis)


INV_FREQ = np.zeros(8, np.float32)  # not what our own is: the file's is passed over
UNTIED = replace(BASE, tied=False)
MQA, MHA = replace(BASE, kv_heads=1), replace(BASE, kv_heads=4)
Q_BIAS = "model.layers.1.self_attn.q_proj.bias"
QWEN3 = replace(THREE, layers=2, extract=(0,))
BIASED = replace(QWEN3, biased=True)
Q_NORM = "model.layers.1.self_attn.q_norm.weight"
WIDE_HEADS = replace(QWEN3, head_dim=128, heads=32, kv_heads=32, hidden=32, inner=32)  # Transformers' own
LOADED: dict[str, Make] = {
    "tied": saved(),
    "untied": saved(UNTIED),
    "multi-query attention": saved(MQA),
    "tied, the same head stored": saved(BASE, tensors(lambda t: t.update({HEAD: t[EMBEDDING]}))),
    "tied, another head stored": saved(BASE, with_tensor(HEAD, OTHER_HEAD)),
    "tied, another head stored, in shards": sharded(UNTIED, config_is(tie_word_embeddings=True)),
    "tied, only the head stored": saved(BASE, renamed(lambda n: HEAD if n == EMBEDDING else n)),
    "tied, a head that differs beyond the model's dtype": saved(
        BASE,
        with_tensor(HEAD, BASE.state_dict()[EMBEDDING] * np.float32(1 + 1e-7)),
        torch_dtype="float16",
    ),
    "untied, a head that is the embedding": saved(UNTIED, tensors(lambda t: t.update({HEAD: t[EMBEDDING]}))),
    "safetensors.torch.save_model": by_save_model,
    "Qwen2Model.save_pretrained": by_base_model(BASE),
    "the prefix missing here and there": saved(
        UNTIED, renamed(lambda n: n.removeprefix("model.") if "layers.1" in n else n)
    ),
    "the prefix before the head": saved(UNTIED, renamed(lambda n: f"model.{n}" if n == HEAD else n)),
    "num_key_value_heads null": saved(MHA, config_is(num_key_value_heads=None)),
    "num_key_value_heads all": saved(MHA),
    "head_dim as it would be": saved(head_dim=16),
    "another head_dim, which Qwen2 has too": saved(
        BASE,
        tensors(lambda t: t.update({n: wider(n, a) for n, a in t.items() if "self_attn" in n})),
        head_dim=32,
    ),
    "no rope_theta": saved(rope_theta=None),
    "rope_theta an integer": saved(rope_theta=500),
    "rope_theta in rope_parameters": saved(
        rope_theta=None, rope_parameters={"rope_theta": 5e4, "rope_type": "default"}
    ),
    "rope_theta twice, contradicting": saved(rope_theta=1e6, rope_parameters={"rope_theta": 100.0}),
    "rope_parameters without a theta": saved(rope_theta=3e3, rope_parameters={"rope_type": "default"}),
    "rope_scaling default with a theta of its own": saved(
        rope_theta=1e6, rope_scaling={"type": "default", "rope_theta": 200.0}
    ),
    "rope_scaling before rope_parameters": saved(
        rope_scaling={"rope_theta": 200.0}, rope_parameters={"rope_theta": 3e3}
    ),
    "rope_scaling null": saved(BASE, config_is(rope_scaling=None)),
    "partial_rotary_factor, which Qwen2 passes over": saved(partial_rotary_factor=0.5),
    "no rms_norm_eps": saved(rms_norm_eps=None),
    "a large rms_norm_eps": saved(rms_norm_eps=0.1),
    "no hidden_act": saved(hidden_act=None),
    "no max_position_embeddings": saved(max_position_embeddings=None),
    "frequencies in the file": saved(
        BASE,
        with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", INV_FREQ),
        with_tensor("model.rotary_emb.inv_freq", INV_FREQ),
    ),
    "attention_bias false, which Qwen2 passes over": saved(attention_bias=False, mlp_bias=True),
    "linear scaling": saved(rope_scaling={"type": "linear", "factor": 2.0}),
    "dynamic scaling": saved(
        max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "yarn": saved(
        max_position_embeddings=16,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "mscale": 0.7,
            "mscale_all_dim": 2,
        },
    ),
    "yarn, its original context beside it": saved(
        original_max_position_embeddings=8, rope_scaling={"type": "yarn", "factor": 4.0, "beta_slow": 0.5}
    ),
    "yarn without a factor": saved(
        max_position_embeddings=32,
        rope_scaling={
            "type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 8,
            "truncate": False,
        },
    ),
    "llama3": saved(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "longrope": saved(
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [1.0, 2.0] * 4},
    ),
    "longrope within its original context": saved(
        rope_scaling={"type": "longrope", "factor": 2.0, "short_factor": [1.5] * 8, "long_factor": [2] * 8}
    ),
    "proportional": saved(
        rope_parameters={"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4}
    ),
    "window below the depth": saved(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "window of one token": saved(use_sliding_window=True, sliding_window=1, max_window_layers=0),
    "window in layer_types": saved(
        use_sliding_window=True, sliding_window=9, layer_types=["sliding_attention", "full_attention"]
    ),
    "window from past the depth on": saved(use_sliding_window=True, max_window_layers=3),
    "window from the depth on": saved(use_sliding_window=True, max_window_layers=2),
    "window, max_window_layers left out": saved(use_sliding_window=True, max_window_layers=None),
    "window null": saved(BASE, config_is(use_sliding_window=True, sliding_window=None, max_window_layers=0)),
    "a small window not in use": saved(sliding_window=2, max_window_layers=0),
    "all layers full": saved(
        use_sliding_window=True, max_window_layers=0, layer_types=["full_attention"] * 2
    ),
    "dropout": saved(attention_dropout=0.5),
    "causal, and said to be": saved(is_causal=True),
    "no architectures": saved(architectures=None),
    "architectures of a classifier": saved(architectures=["Qwen2ForSequenceClassification"]),
    "dtype float32": saved(torch_dtype=None, dtype="float32"),
    "dtype before torch_dtype": saved(torch_dtype="bfloat16", dtype="float32"),
    "no dtype, float32 weights": saved(torch_dtype=None),
    "no dtype, the index names one": sharded(
        BASE, config_is(torch_dtype=None), index(lambda i: i["metadata"].update(dtype="float32"))
    ),
    "float32 said, bfloat16 stored": saved(BASE, cast(jnp.bfloat16)),
    "float32 said, float16 stored": saved(BASE, cast(np.float16)),
    "float32 said, float64 stored": saved(BASE, cast(np.float64)),
    "float32 said, mixed": saved(BASE, cast(jnp.bfloat16, "mlp"), cast(np.float16, "norm")),
    "in shards": sharded(),
    "in shards, untied": sharded(UNTIED),
    "an index that has tensors in the wrong files": sharded(
        BASE,
        index(
            lambda i: i["weight_map"].update(
                dict(zip(i["weight_map"], sorted(i["weight_map"].values()), strict=True))
            )
        ),
    ),
    "one file beside the index of another model": single_beside_another_index,
    "weights that are a link": links_to_weights_elsewhere,
    "a folder that is a link": whole_folder_is_a_link,
    "files of no concern": saved(
        BASE, lambda folder: (folder / "pytorch_model.bin").write_bytes(b"old"), auto_map={"AutoModel": "x.Y"}
    ),
}
LOADED |= {
    "Qwen3": saved(QWEN3),
    "Qwen3, untied": saved(replace(QWEN3, tied=False)),
    "Qwen3, heads that are no part of the stream": saved(replace(QWEN3, heads=6)),
    "Qwen3, heads as wide as their part of the stream": saved(replace(QWEN3, head_dim=16)),
    "Qwen3, multi-query attention": saved(replace(QWEN3, kv_heads=1)),
    "Qwen3, num_key_value_heads null": saved(replace(QWEN3, kv_heads=4), config_is(num_key_value_heads=None)),
    "Qwen3, no num_key_value_heads": saved(WIDE_HEADS, num_key_value_heads=None),
    "Qwen3, no head_dim": saved(replace(QWEN3, head_dim=128), head_dim=None),
    "Qwen3, attention_bias": saved(BIASED),
    "Qwen3, no attention_bias": saved(QWEN3, attention_bias=None),
    "Qwen3, no rope_theta": saved(QWEN3, rope_theta=None),
    "Qwen3, rope_theta in rope_parameters": saved(
        QWEN3, rope_theta=None, rope_parameters={"rope_theta": 5e4, "rope_type": "default"}
    ),
    "Qwen3, a large rms_norm_eps": saved(QWEN3, rms_norm_eps=0.1),
    "Qwen3, tied, another head stored": saved(QWEN3, with_tensor(HEAD, OTHER_HEAD)),
    "Qwen3, Qwen3Model.save_pretrained": saved(QWEN3, renamed(lambda n: n.removeprefix("model."))),
    "Qwen3, a small window not in use": saved(QWEN3, sliding_window=2, max_window_layers=0),
}
# Nothing says what a model in bfloat16 or float16 rounds to: its dtype is compared, and its logits roughly.
COARSE: dict[str, Make] = {
    "bfloat16": saved(BASE, cast(jnp.bfloat16), torch_dtype="bfloat16"),
    "float16": saved(BASE, cast(np.float16), torch_dtype="float16"),
    "bfloat16 said, float32 stored": saved(torch_dtype="bfloat16"),
    "Qwen3 in bfloat16": saved(QWEN3, cast(jnp.bfloat16), torch_dtype="bfloat16"),
    "no dtype, bfloat16 weights": saved(BASE, cast(jnp.bfloat16), torch_dtype=None),
    "no dtype, float16 weights": saved(BASE, cast(np.float16), torch_dtype=None),
    "dtype null, bfloat16 weights": saved(BASE, cast(jnp.bfloat16), config_is(torch_dtype=None, dtype=None)),
    "no dtype, mixed": saved(BASE, cast(jnp.bfloat16, "layers.0.input"), torch_dtype=None),
    "no dtype, bfloat16 weights in shards": sharded(
        BASE,
        lambda folder: [cast_file(file) for file in folder.glob("*.safetensors")],
        config_is(torch_dtype=None),
    ),
}


def cast_file(file: Path) -> None:
    rewrite_safetensors(file, lambda t: t.update({n: a.astype(jnp.bfloat16) for n, a in t.items()}))


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Make, str]] = {
    "untied without a head": (saved(UNTIED, without(HEAD)), r"missing: lm_head\.weight"),
    "no tie_word_embeddings": (saved(tie_word_embeddings=None), r"missing: lm_head\.weight"),
    "untied without an embedding": (
        saved(UNTIED, without(EMBEDDING)),
        r"missing: model\.embed_tokens\.weight",
    ),
    "neither embedding nor head": (saved(BASE, without(EMBEDDING)), r"missing: model\.embed_tokens\.weight"),
    "Qwen2Model.save_pretrained, untied": (by_base_model(UNTIED), r"missing: lm_head\.weight"),
    "a tensor with and without prefix": (
        saved(BASE, with_tensor("norm.weight", np.ones(64, np.float32))),
        r"given twice: .*norm\.weight",
    ),
    "a missing bias": (saved(BASE, without(Q_BIAS)), f"missing: {Q_BIAS}"),
    "a missing norm": (saved(BASE, without(NORM)), f"missing: {NORM}"),
    "a bias of the output projection": (
        saved(BASE, with_tensor("model.layers.0.self_attn.o_proj.bias", np.ones(64, np.float32))),
        r"unexpected: model\.layers\.0\.self_attn\.o_proj\.bias",
    ),
    "a classifier's head": (
        saved(BASE, with_tensor("score.weight", np.ones((2, 64), np.float32))),
        r"unexpected: score\.weight",
    ),
    "a layer more than the config has": (saved(replace(BASE, layers=3), num_hidden_layers=2), "unexpected"),
    "a layer less than the config has": (saved(num_hidden_layers=3), "missing"),
    "names of another code base": (
        saved(BASE, renamed(lambda n: n.replace("model.layers", "transformer.h"))),
        r"missing: .*unexpected: transformer\.h",
    ),
    "no num_key_value_heads": (
        saved(MHA, num_key_value_heads=None),
        "num_key_value_heads 32.* does not give num_key_value_heads",
    ),
    "no vocab_size": (saved(vocab_size=None), "lacks vocab_size"),
    "no hidden_size": (saved(hidden_size=None), "lacks hidden_size"),
    "no intermediate_size": (saved(intermediate_size=None), "lacks intermediate_size"),
    "no num_hidden_layers": (saved(num_hidden_layers=None), "lacks num_hidden_layers"),
    "no num_attention_heads": (saved(num_attention_heads=None), "lacks num_attention_heads"),
    "another head_dim": (
        saved(head_dim=32),
        r"mis-shaped: .*q_proj\.weight \[64, 64\] instead of \[128, 64\]",
    ),
    "Qwen3 without a norm of the queries": (saved(QWEN3, without(Q_NORM)), f"missing: {Q_NORM}"),
    "Qwen3 with a norm as wide as all heads": (
        saved(QWEN3, with_tensor(Q_NORM, np.ones(128, np.float32))),
        r"mis-shaped: .*q_norm\.weight \[128\] instead of \[32\]",
    ),
    "Qwen3 with biases that its config denies": (
        saved(BIASED, attention_bias=False),
        r"unexpected: .*q_proj\.bias.*o_proj\.bias",
    ),
    "Qwen3 without the biases that its config has": (
        saved(QWEN3, attention_bias=True),
        r"missing: .*q_proj\.bias.*o_proj\.bias",
    ),
    "Qwen2 with norms of its heads": (
        saved(BASE, with_tensor(Q_NORM, np.ones(16, np.float32))),
        f"unexpected: {Q_NORM}",
    ),
    "Qwen3, head_dim null": (saved(QWEN3, config_is(head_dim=None)), "head_dim must be a positive integer"),
    "Qwen3, an odd head_dim": (saved(QWEN3, head_dim=31), "head_dim 31 is odd"),
    "Qwen3, attention_bias null": (
        saved(QWEN3, config_is(attention_bias=None)),
        "attention_bias must be true or false",
    ),
    "Qwen3 with experts": (saved(QWEN3, model_type="qwen3_moe"), "'qwen3_moe' model"),
    "rope_scaling without a type": (saved(rope_scaling={"factor": 4.0}), "'default' has no 'factor'"),
    "llama3 without its factors": (
        saved(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "needs low_freq",
    ),
    "rope type before type": (saved(rope_scaling={"type": "default", "rope_type": "yarn"}), "'yarn' needs"),
    "RoPE by kind of layer": (
        saved(rope_parameters={"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}),
        "for each kind of layer",
    ),
    "rope_theta null": (saved(BASE, config_is(rope_theta=None)), "rope_theta must be a positive number"),
    "gelu": (saved(hidden_act="gelu"), "hidden_act 'gelu'"),
    "window in layer_types, and not in use": (
        saved(layer_types=["full_attention", "sliding_attention"]),
        "use_sliding_window is not true",
    ),
    "window in layer_types, null": (
        saved(
            BASE,
            config_is(use_sliding_window=True, sliding_window=None, layer_types=["sliding_attention"] * 2),
        ),
        "sliding_window must be a positive integer, not None",
    ),
    "layer_types of another depth": (
        saved(layer_types=["full_attention"]),
        "layer_types must be a list of 2",
    ),
    "settings of single layers": (saved(per_layer_config={"0": {"hidden_act": "gelu"}}), "per_layer_config"),
    "weights of another name": (saved(transformers_weights="model.safetensors"), "transformers_weights"),
    "not causal": (saved(is_causal=False), "is_causal False is not implemented"),
    "causal, but as a number": (saved(is_causal=1), "is_causal 1 is not implemented"),
    "quantized": (
        saved(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config is not implemented",
    ),
    "an index of another dtype": (
        sharded(BASE, config_is(torch_dtype=None), index(lambda i: i["metadata"].update(dtype="junk"))),
        r"index\.json says the dtype 'junk', which is not one of",
    ),
    "dtype float64": (saved(torch_dtype="float64"), "dtype float64 is not one of"),
    "dtype auto": (saved(torch_dtype="auto"), "dtype auto is not one of"),
    "dtype float8": (saved(torch_dtype="float8_e4m3fn"), "dtype float8_e4m3fn is not one of"),
    "a norm of integers": (
        saved(BASE, cast(np.int32, "model.norm")),
        r"not of floats: model\.norm\.weight I32",
    ),
    "a norm of bytes": (saved(BASE, cast(np.uint8, "model.norm")), r"not of floats: model\.norm\.weight U8"),
    "a norm of truth values": (saved(BASE, cast(np.bool_, "model.norm")), "weight BOOL"),
    "a norm of eight bits": (saved(BASE, cast(jnp.float8_e4m3fn, "model.norm")), r"norm\.weight F8_E4M3"),
    "all of eight bits": (saved(BASE, cast(jnp.float8_e5m2)), r"not of floats: .*q_proj\.weight F8_E5M2"),
    "fewer rows than the vocabulary": (saved(vocab_size=161), r"embed_tokens\.weight \[160, 64\] instead of"),
    "a transposed projection": (
        saved(
            BASE,
            tensors(lambda t: t.update({n: np.ascontiguousarray(a.T) for n, a in t.items() if "up" in n})),
        ),
        "mis-shaped: .*up_proj",
    ),
    "a tied head of another shape": (
        saved(BASE, with_tensor(HEAD, OTHER_HEAD[:100].copy())),
        r"mis-shaped: lm_head\.weight \[100, 64\]",
    ),
    "another architecture": (saved(model_type="llama"), "'llama' model"),
    "the next generation": (saved(model_type="qwen3_5"), "'qwen3_5' model"),
    "no model_type": (saved(model_type=None), "None model"),
    "shards without their index": (
        sharded(BASE, remove("*.index.json")),
        r"model-00001-of-.*no model\.safetensors\.index\.json",
    ),
    "an index without one of its shards": (sharded(BASE, remove("model-00002*")), "has no model-00002-of-"),
    "a variant": (
        saved(BASE, lambda f: (f / "model.safetensors").rename(f / "model.fp16.safetensors")),
        r"only model\.fp16\.safetensors: rename or save it as model\.safetensors",
    ),
    "weights for torch.load": (
        saved(BASE, lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")),
        r"only pytorch_model\.bin: convert it",
    ),
    "an adapter": (
        saved(BASE, remove("model*"), lambda f: (f / "adapter_config.json").write_text("{}")),
        "PEFT adapter",
    ),
    "an adapter beside a model": (
        saved(BASE, lambda f: (f / "adapter_config.json").write_text("{}")),
        "PEFT adapter",
    ),
    "an adapter alone": (
        saved(
            BASE,
            remove("*.json"),
            remove("*.safetensors"),
            lambda f: (f / "adapter_config.json").write_text("{}"),
        ),
        r"no config\.json; it is a PEFT adapter",
    ),
    "shards of a distributed checkpoint": (
        saved(BASE, lambda f: (f / "shard-00000-model-00001-of-00001.safetensors").touch()),
        "distributed checkpoint",
    ),
}


@functools.cache
def token_ids() -> np.ndarray:
    return np.stack(BASE.prompts((24, 24)))


@functools.cache
def compiled(config: Any) -> Any:
    return jax.jit(QwenModel(config).apply)


def ours(folder: Path) -> tuple[str, np.ndarray]:
    config, params = load_qwen2(folder, scan_layers=True)  # soon compiled
    if not config.use_sliding_window:
        config = config.replace(sliding_window=None)  # so that fewer programs are compiled
    logits = compiled(config)({"params": params}, token_ids())[0]
    return config.dtype.name, np.asarray(logits, np.float32)


@torch.no_grad()
def theirs(folder: Path) -> tuple[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits = model(torch.from_numpy(token_ids().astype(np.int64)), use_cache=False).logits
    return str(model.dtype).removeprefix("torch."), logits.float().numpy()


def error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# The others, of which each needs a program of its own or a second model, are for the slow tier.
QUICK = ("Qwen3", "tied", "tied, another head stored", "safetensors.torch.save_model", "no rope_theta")


def tiers(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", tiers(LOADED))
def test_what_transformers_loads_has_the_same_logits(name: str, tmp_path: Path):
    LOADED[name](tmp_path / "model")
    (dtype, got), (expected_dtype, expected) = ours(tmp_path / "model"), theirs(tmp_path / "model")
    assert dtype == expected_dtype
    assert error(got, expected) < (TOLERANCE if dtype == "float32" else 0.02)


@pytest.mark.parametrize("name", tiers(COARSE))
def test_a_model_has_the_dtype_that_transformers_gives_it(name: str, tmp_path: Path):
    COARSE[name](tmp_path / "model")
    (dtype, got), (expected_dtype, expected) = ours(tmp_path / "model"), theirs(tmp_path / "model")
    assert dtype == expected_dtype
    assert error(got, expected) < 0.1


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_loaded_is_refused_by_name(name: str, tmp_path: Path):
    make, words = REFUSED[name]
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=words):
        load_qwen2(tmp_path / "model")


def test_the_variants_differ_so_that_a_wrong_one_shows(tmp_path: Path):
    """A theta or head that is passed over moves the logits far more than the tolerance."""
    saved()(tmp_path / "plain")
    _, plain = ours(tmp_path / "plain")
    for name in ("tied, another head stored", "no rope_theta"):
        LOADED[name](tmp_path / name)
        assert error(ours(tmp_path / name)[1], plain) > 100 * TOLERANCE
