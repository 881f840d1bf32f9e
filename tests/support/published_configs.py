"""What config.json of the published Qwen2 family says: facts that the shapes and the reading depend on.

All are ``model_type: qwen2`` with SiLU, initialised by Transformers 4. The 7B models and larger ones pad
the vocabulary to 152,064 and have a head of their own. No published model uses its sliding window, so that
``sliding_window`` and ``max_window_layers``, which differ from file to file, are not as published here.
"""

from __future__ import annotations

from typing import Any

_K = 1024
# hidden, intermediate, layers, heads, KV heads, vocabulary, tied
_SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "2-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "2-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "2-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "2-72B": (8192, 29568, 80, 64, 8, 152064, False),
    "2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
    "2.5-32B": (5120, 27648, 64, 40, 8, 152064, False),
}
_SHAPES |= {f"2.5-{size}": _SHAPES[f"2-{size}"] for size in ("0.5B", "1.5B", "7B")}
_SHAPES["2.5-72B"] = _SHAPES["2-72B"]
_CHUNKS = {"chunk_size": 256 * _K, "local_size": 8 * _K, "original_max_position_embeddings": 256 * _K}
_UNTIED, _DISTILLED = {"tie_word_embeddings": False}, {"tie_word_embeddings": False, "use_mrope": False}

# Shape, context in units of 1,024, rope_theta, rms_norm_eps, and what else is its own.
_MODELS: dict[str, tuple[str, int, float, float, dict[str, Any]]] = {
    "Qwen2-0.5B": ("2-0.5B", 128, 1e6, 1e-6, {}),
    "Qwen2-0.5B-Instruct": ("2-0.5B", 32, 1e6, 1e-6, {}),
    "Qwen2-1.5B": ("2-1.5B", 128, 1e6, 1e-6, {}),
    "Qwen2-1.5B-Instruct": ("2-1.5B", 32, 1e6, 1e-6, {}),
    "Qwen2-7B": ("2-7B", 128, 1e6, 1e-6, {}),
    "Qwen2-7B-Instruct": ("2-7B", 32, 1e6, 1e-6, {}),
    "Qwen2-72B": ("2-72B", 128, 1e6, 1e-5, {}),
    "Qwen2-72B-Instruct": ("2-72B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-0.5B": ("2.5-0.5B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-1.5B": ("2.5-1.5B", 128, 1e6, 1e-6, {}),
    "Qwen2.5-1.5B-Instruct": ("2.5-1.5B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-3B": ("2.5-3B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-7B": ("2.5-7B", 128, 1e6, 1e-6, {}),
    "Qwen2.5-7B-Instruct": ("2.5-7B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-14B": ("2.5-14B", 128, 1e6, 1e-5, {}),
    "Qwen2.5-14B-Instruct": ("2.5-14B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-32B": ("2.5-32B", 128, 1e6, 1e-5, {}),
    "Qwen2.5-32B-Instruct": ("2.5-32B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-72B": ("2.5-72B", 128, 1e6, 1e-5, {}),
    "Qwen2.5-72B-Instruct": ("2.5-72B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-Coder-0.5B": ("2.5-0.5B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-Coder-1.5B": ("2.5-1.5B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-Coder-3B": ("2.5-3B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-Coder-7B": ("2.5-7B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-Coder-14B": ("2.5-14B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-Coder-32B": ("2.5-32B", 32, 1e6, 1e-6, {}),
    "Qwen2.5-Math-1.5B": ("2.5-1.5B", 4, 1e4, 1e-6, {}),
    "Qwen2.5-Math-7B": ("2.5-7B", 4, 1e4, 1e-6, {}),
    "Qwen2.5-Math-72B": ("2.5-72B", 4, 1e4, 1e-5, {}),
    "Qwen2.5-7B-Instruct-1M": ("2.5-7B", 0, 1e7, 1e-5, {"dual_chunk_attention_config": _CHUNKS}),
    "Qwen2.5-14B-Instruct-1M": ("2.5-14B", 0, 1e7, 1e-5, {"dual_chunk_attention_config": _CHUNKS}),
    "QwQ-32B-Preview": ("2.5-32B", 32, 1e6, 1e-5, {"sliding_window": None, "rope_scaling": None}),
    "QwQ-32B": ("2.5-32B", 40, 1e6, 1e-5, {"sliding_window": 32 * _K}),
    "DeepSeek-R1-Distill-Qwen-1.5B": ("2.5-1.5B", 128, 1e4, 1e-6, _DISTILLED | {"sliding_window": 4 * _K}),
    "DeepSeek-R1-Distill-Qwen-7B": ("2.5-7B", 128, 1e4, 1e-6, _DISTILLED | {"sliding_window": 4 * _K}),
    "DeepSeek-R1-Distill-Qwen-14B": ("2.5-14B", 128, 1e6, 1e-5, _UNTIED),
    "DeepSeek-R1-Distill-Qwen-32B": ("2.5-32B", 128, 1e6, 1e-5, _UNTIED),
}


def _config(name: str) -> dict[str, Any]:
    shape, context, theta, epsilon, own = _MODELS[name]
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = _SHAPES[shape]
    positions = context * _K or 1_010_000
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": epsilon,
        "rope_theta": theta,
        "sliding_window": positions,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    } | own


PUBLISHED = {name: _config(name) for name in _MODELS}
# What Qwen's model cards say to add for texts longer than 32,768 tokens.
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
