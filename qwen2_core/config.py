"""Describes a Qwen2 model: its shape and numerics, read from a Hugging Face ``config.json``.

What this project does not implement (sliding windows, scaled RoPE, other architectures) is refused
by name here, before any weight is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvcache_utils import KVCacheConfig
from qwen2_core.checkpoint_files import CheckpointError, read_json_object, resolve_file

_DTYPES = ("float32", "bfloat16", "float16")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Describes the shape and numerics of a Qwen2/Qwen2.5 decoder. The defaults are Qwen2.5-0.5B.

    ``dtype`` is the type of weights, residual stream and KV cache. Norms, RoPE angles, softmax and
    logits are always computed in float32.

    ``use_fixed_cache`` says what a forward pass does that is given no cache: start a growing one
    (False), or keep none (True: the caller creates fixed caches).

    ``scan_layers`` runs the layers as one ``lax.scan`` over stacked weights
    (``qwen2_core.weights.stack_layers``) instead of unrolled. The results are the same.

    The names and their meaning are those of Hugging Face's ``Qwen2Config``.

    Raises:
        CheckpointError: for sizes that do not fit each other and for features not implemented.
    """

    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = 32768
    use_fixed_cache: bool = False
    scan_layers: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if self.dtype.name not in _DTYPES:
            raise CheckpointError(f"dtype {self.dtype.name} is not one of {', '.join(_DTYPES)}.")
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name} must be a positive integer, not {value!r}.")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise CheckpointError(f"{name} must be a positive number, not {getattr(self, name)}.")
        if not isinstance(self.tie_word_embeddings, bool):
            raise CheckpointError(
                f"tie_word_embeddings must be true or false, not {self.tie_word_embeddings!r}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if self.use_sliding_window:
            raise CheckpointError(
                "use_sliding_window=true is not implemented: attention here is always over the whole "
                "context. Use a checkpoint without a sliding window."
            )

    @property
    def head_dim(self) -> int:
        """Returns the size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def q_heads_per_kv_head(self) -> int:
        """Returns how many query heads share one head of keys and values (grouped-query attention)."""
        return self.num_attention_heads // self.num_key_value_heads

    def kv_cache(
        self,
        max_prefill_length: int,
        max_decode_length: int,
        *,
        num_prompts: int = 1,
        samples_per_prompt: int = 1,
        dtype: Any = None,
        step_alignment: int | None = None,
    ) -> KVCacheConfig:
        """Returns the sizes of a KV cache for this model; its dtype is the model's by default."""
        return KVCacheConfig(
            num_layers=self.num_hidden_layers,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_prefill_length=max_prefill_length,
            max_decode_length=max_decode_length,
            num_prompts=num_prompts,
            samples_per_prompt=samples_per_prompt,
            dtype=self.dtype if dtype is None else dtype,
            stacked=self.scan_layers,
            step_alignment=step_alignment,
        )

    def replace(self, **changes: Any) -> QwenConfig:
        """Returns a copy with some fields changed; checked like a new one."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any] | Any) -> QwenConfig:
        """Reads a Hugging Face config: of a local directory or hub id, a dict, or a config object.

        Understands the spellings of transformers 4 (``rope_theta``, ``torch_dtype``) and 5
        (``rope_parameters``, ``dtype``). Keeps the checkpoint's own dtype.

        Raises:
            CheckpointError: no such model, not a Qwen2 model, or a feature that is not implemented.
        """
        hf = _as_dict(source)
        try:
            return cls._from_dict(hf)
        except CheckpointError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"The model config has a value of the wrong type ({error}).") from error

    @classmethod
    def _from_dict(cls, hf: Mapping[str, Any]) -> QwenConfig:
        _refuse_unsupported(hf)
        missing = [name for name in _REQUIRED if name not in hf]
        if missing:
            raise CheckpointError(f"The model config lacks {', '.join(missing)}; is it a Qwen2 config.json?")
        kwargs = {f.name: hf[f.name] for f in dataclasses.fields(cls) if f.name in hf and f.name != "dtype"}
        rope = hf.get("rope_parameters") or {}
        if "rope_theta" in rope:
            kwargs["rope_theta"] = rope["rope_theta"]
        kwargs.setdefault("num_key_value_heads", hf["num_attention_heads"])
        kwargs.setdefault("tie_word_embeddings", False)
        for name in ("rope_theta", "rms_norm_eps"):
            if name in kwargs:
                kwargs[name] = float(kwargs[name])
        dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
        if dtype not in _DTYPES:
            raise CheckpointError(f"The checkpoint's dtype {dtype} is not one of {', '.join(_DTYPES)}.")
        return cls(dtype=jnp.dtype(dtype), **kwargs)


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    model_type = hf.get("model_type")
    if model_type != "qwen2":
        raise CheckpointError(
            f"This is a {model_type!r} model; only model_type 'qwen2' (Qwen2, Qwen2.5) is implemented."
        )
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(
                f"{name} of type {kind!r} is not implemented. Use a checkpoint without RoPE scaling "
                f"(or remove {name} from config.json if the context stays within the unscaled length)."
            )
    if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ()):
        raise CheckpointError(
            "use_sliding_window (sliding_attention layers) is not implemented: attention here is always "
            "over the whole context. Use a checkpoint without a sliding window."
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {hf['hidden_act']!r} is not implemented; Qwen2 uses 'silu'.")
    head_dim = hf.get("head_dim")
    if head_dim is not None and head_dim * hf.get("num_attention_heads", 0) != hf.get("hidden_size"):
        raise CheckpointError(
            f"head_dim {head_dim} is not hidden_size / num_attention_heads; not implemented."
        )
    if hf.get("quantization_config"):
        raise CheckpointError("quantization_config is not implemented; use the unquantized checkpoint.")


def _as_dict(source: Any) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | Path):
        return source.to_dict()
    return read_json_object(resolve_file(source, "config.json"))
