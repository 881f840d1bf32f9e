"""Write Qwen2 and Qwen3 checkpoints in Hugging Face layout, with trained or with seeded weights.

The seeded random weights are *lively*: greedy decoding from them gives a varied sequence, so that a broken
cache shows. (At the usual initialisation, normal with deviation 0.02, a random model repeats one token for
ever, and with a broken cache it repeats it just as well.)

Every such tensor has its own random stream, derived from the seed and the tensor's name, and uses only raw
bits of PCG64, whose stream numpy never changes: the same arguments give the same bytes everywhere.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

# A projection's output has this deviation for an input of deviation 1. Near 1, the model soon repeats itself;
# well above 2, rounding errors grow from layer to layer until nothing can be compared.
GAIN = 1.6
BIAS_DEVIATION = 0.3
NORM_WEIGHT_DEVIATION = 0.3  # around 1
_BIASED = ("q_proj", "k_proj", "v_proj")  # of Qwen2
BLOCK = 1 << 24  # elements made at a time, to bound the float32 temporaries

Shapes = dict[str, tuple[int, ...]]
MakeTensor = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]


def qwen2_config(  # noqa: PLR0913 - one keyword for each field of config.json
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    tie_word_embeddings: bool,
    dtype: str,
    token_ids: dict[str, int],
    rope_theta: float = 1000000.0,
) -> dict:
    """The contents of `config.json`; `token_ids` maps the ChatML special tokens to their ids."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": num_hidden_layers,
        "model_type": "qwen2",
        "num_attention_heads": num_attention_heads,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "pad_token_id": token_ids["<|endoftext|>"],
        "rms_norm_eps": 1e-6,
        "rope_theta": rope_theta,
        "sliding_window": 32768,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def qwen3_config(*, head_dim: int, attention_bias: bool = False, **fields: Any) -> dict:
    """The contents of `config.json` of a dense Qwen3; `fields` are those of `qwen2_config`."""
    return qwen2_config(**fields) | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": attention_bias,
        "head_dim": head_dim,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "sliding_window": None,
    }


def tensor_shapes(config: dict) -> Shapes:
    """Hugging Face names and shapes (`[out, in]` for projections) of every tensor in the checkpoint."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    heads, kv = (config[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    is_qwen3 = config.get("model_type") == "qwen3"  # sizes alone are those of a Qwen2
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") * config["attention_bias"] if is_qwen3 else _BIASED
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for name, width in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (width, heads if name == "o_proj" else hidden)
            if name in biased:
                shapes[f"{prefix}.self_attn.{name}.bias"] = (width,)
        for name in ("q_norm", "k_norm") if is_qwen3 else ():
            shapes[f"{prefix}.self_attn.{name}.weight"] = (head_dim,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def lively_tensor(name: str, shape: tuple[int, ...], seed: int, dtype: np.dtype) -> np.ndarray:
    """One tensor: uniform values of mean 0 (norm weights: 1), with the deviation that its role asks for."""
    mean = 0.0
    if name.endswith("norm.weight"):
        mean, deviation = 1.0, NORM_WEIGHT_DEVIATION
    elif name.endswith(".bias"):
        deviation = BIAS_DEVIATION
    else:
        deviation = GAIN / np.sqrt(shape[1])
    # Uniform over the 65536 values of 16 random bits: scale * (u - middle) + mean.
    scale, middle = np.float32(deviation * np.sqrt(12) / 65536), np.float32(32767.5)
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    out = np.empty(shape, dtype)
    flat = out.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        count = min(BLOCK, flat.size - start)
        raw = bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
        values = raw.astype(np.float32)
        values -= middle
        values *= scale
        values += np.float32(mean)
        flat[start : start + count] = values
    return out


def plan_shards(shapes: Shapes, itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    """Tensor names by shard, in order; a shard holds one tensor at least and otherwise keeps to the limit."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one shard with the file mode that the umask asks for (safetensors itself always makes 0600)."""
    path.unlink(missing_ok=True)  # its mode and its links are not ours
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_checkpoint(out: Path, config: dict, seed: int, max_shard_bytes: int) -> list[Path]:
    """Write `config.json`, `generation_config.json` and lively weights into `out`; returns their files."""

    def make(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return lively_tensor(name, shape, seed, dtype)

    return write_tensors(out, config, make, max_shard_bytes)


def write_tensors(out: Path, config: dict, make: MakeTensor, max_shard_bytes: int) -> list[Path]:
    """Write the two configs into `out`, and the weights that `make(name, shape, dtype)` returns.

    Holds one shard in memory at a time. One shard is `model.safetensors`; several are numbered and indexed.
    """
    write_json(out / "config.json", config)
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "do_sample": False,
            "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
            "pad_token_id": config["pad_token_id"],
        },
    )
    dtype = DTYPES[config["torch_dtype"]]
    shapes = tensor_shapes(config)
    shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    files = {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors": names
        for i, names in enumerate(shards, start=1)
    }
    for file, names in files.items():
        write_safetensors(out / file, {name: make(name, shapes[name], dtype) for name in names})
    if len(files) > 1:
        total = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    return [out / file for file in files]
