"""The published sizes of dense Qwen3, as their ``config.json`` gives them."""

from __future__ import annotations

from typing import Any, NamedTuple

from qwen2_core.config import QwenConfig


class Size(NamedTuple):
    """What differs between the sizes, and the billions of parameters that the model card counts."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool
    billions: float
    without_embeddings: float


SIZES = {
    "0.6B": Size(1024, 3072, 28, 16, True, 0.6, 0.44),
    "1.7B": Size(2048, 6144, 28, 16, True, 1.7, 1.4),
    "4B": Size(2560, 9728, 36, 32, True, 4.0, 3.6),
    "8B": Size(4096, 12288, 36, 32, False, 8.2, 6.95),
    "14B": Size(5120, 17408, 40, 40, False, 14.8, 13.2),
    "32B": Size(5120, 25600, 64, 64, False, 32.8, 31.2),
}


def hf_config(name: str) -> dict[str, Any]:
    """The contents of ``config.json``."""
    fields = SIZES[name]._asdict()
    del fields["billions"], fields["without_embeddings"]
    return fields | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "max_window_layers": fields["num_hidden_layers"],
        "model_type": "qwen3",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def qwen3(name: str) -> QwenConfig:
    """The config with its layers scanned, as on TPUs."""
    return QwenConfig.from_hf(hf_config(name)).replace(scan_layers=True)
