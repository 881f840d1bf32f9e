"""Write a checkpoint in Hugging Face layout as GGUF, for llama.cpp; needs the packages gguf and numpy.

The tokenizer stays behind: tokens go in and come out as ids. Qwen2 with tied embeddings, as the random
checkpoint is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def checkpoint_parameters(checkpoint: str) -> int:
    """How many numbers the checkpoint's weights are."""
    return sum(
        math.prod(tensor["shape"])
        for file in Path(checkpoint).glob("*.safetensors")
        for tensor in _header(file)[0].values()
    )


def write_gguf(checkpoint: str, path: Path, dtype: str) -> None:
    """Writes ``path`` with matrices in ``dtype`` (bf16, f16 or f32) and vectors in float32.

    Raises:
        ValueError: for another architecture, an untied head, or weights that are not stored in bfloat16.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    config = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen2" or not config["tie_word_embeddings"]:
        raise ValueError(f"{checkpoint} is not a Qwen2 with tied embeddings.")
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        tensors, start = _header(file)
        stored = np.memmap(file, np.uint8, "r")
        for name, tensor in tensors.items():
            if tensor["dtype"] != "BF16":
                raise ValueError(f"{name} is stored as {tensor['dtype']}, not as BF16.")
            begin, end = (start + offset for offset in tensor["data_offsets"])
            bits = stored[begin:end].view(np.uint16).reshape(tensor["shape"])
            if dtype == "bf16" and bits.ndim > 1:
                writer.add_tensor(_name(name), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
                continue
            values = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(
                _name(name), values.astype(np.float16) if dtype == "f16" and bits.ndim > 1 else values
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name in _NAMES:
        return _NAMES[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_OF_LAYER[module]}.{kind}"


def _rope_theta(config: dict[str, Any]) -> float:
    return config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file, and where their bytes begin."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        tensors = json.loads(content.read(length))
    tensors.pop("__metadata__", None)
    return tensors, 8 + length
