"""Describes a Qwen2 or Qwen3 model: its shape and numerics, read from a Hugging Face ``config.json``.

What this project does not implement is refused by name here, before any weight is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from kvcache_utils import KVCacheConfig
from qwen2_core.checkpoint_files import read_json_object, resolve_file
from qwen2_core.errors import CheckpointError
from qwen2_core.inputs import as_dtype
from qwen2_core.messages import shown as _shown
from qwen2_core.rope import RopeScaling
from qwen2_core.rope_config import read_rope_scaling, rope_settings
from qwen2_core.windows import Windows, check_layer_types, read_layer_types, windows_of

_DTYPES = ("float32", "bfloat16", "float16")
# The largest values that are believed: far above every model, far below what would take minutes to refuse.
_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 21,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "max_position_embeddings": 1 << 30,
}
_NUMBERS = {"rope_theta": 1e15, "rms_norm_eps": 1.0}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What Transformers takes where a config does not say; the other defaults are those of QwenConfig.
_UNSAID: dict[str, Any] = {
    "num_key_value_heads": 32,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_UNSAID_OF: dict[str, dict[str, Any]] = {  # besides, by model_type; all that are implemented
    "qwen2": {"head_dim": None},
    "qwen3": {"head_dim": 128, "attention_bias": False},
}


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Describes the shape and numerics of a Qwen2, Qwen2.5 or dense Qwen3 decoder; by default Qwen2.5-0.5B.

    ``dtype`` is the type of weights, of what they are multiplied by, of captured rows and of the KV cache.
    Norms, RoPE angles, softmax and logits are always computed in float32.

    ``residual_dtype`` is the type of the residual stream and of what lies between products: float32, or
    ``dtype``, which rounds where Transformers does (docs/numerics.md).

    ``use_fixed_cache`` says what a forward pass does that is given no cache: start a growing one
    (False), or keep none (True: the caller creates fixed caches).

    ``scan_layers`` runs the layers as one ``lax.scan`` over stacked weights
    (``qwen2_core.weights.stack_layers``) instead of unrolled. The results are the same but for last bits.

    ``head_dim`` is hidden_size / num_attention_heads where it is not given. ``qk_norm`` gives each head's
    queries and keys an RMSNorm of their own before RoPE. Projections to queries, keys and values have biases
    with ``qkv_bias``, the one of attention's output with ``output_bias``. Qwen2 has ``qkv_bias`` alone, Qwen3
    ``qk_norm`` alone.

    The other names and their meaning are those of Hugging Face's ``Qwen2Config``. ``rope_scaling`` is one of
    the classes of ``qwen2_core.rope``. With ``use_sliding_window``, ``layer_types`` says of each layer
    whether it is "full_attention" or "sliding_attention". ``chunk_length`` is the longest text that dual
    chunk attention, which is not implemented, would read as usual.

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
    layer_types: tuple[str, ...] | None = None
    rope_scaling: RopeScaling | None = None
    use_fixed_cache: bool = False
    scan_layers: bool = False
    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    head_dim: int = None  # pyright: ignore[reportAssignmentType] - a number from __post_init__ on
    qk_norm: bool = False
    qkv_bias: bool = True
    output_bias: bool = False
    chunk_length: int | None = None

    def __post_init__(self) -> None:
        dtype = as_dtype(self.dtype)
        if dtype is None or dtype.name not in _DTYPES:
            shown = _shown(self.dtype) if dtype is None else dtype.name
            raise CheckpointError(f"dtype {shown} is not one of {', '.join(_DTYPES)}.")
        object.__setattr__(self, "dtype", dtype)
        residual = as_dtype(self.residual_dtype)
        if residual not in (jnp.float32, dtype):
            shown = _shown(self.residual_dtype) if residual is None else residual.name
            raise CheckpointError(
                f"residual_dtype {shown} is neither float32 nor that of the weights, {dtype.name}."
            )
        object.__setattr__(self, "residual_dtype", residual)
        for name, most in _SIZES.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise CheckpointError(
                    f"{name} must be a positive integer, not {_shown(value)} (the most is {most})."
                )
        for name, most in _NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
                raise CheckpointError(
                    f"{name} must be a positive number, not {_shown(value)} (the most is {most:g})."
                )
            object.__setattr__(self, name, float(value))
        if self.sliding_window is not None and type(self.sliding_window) is not int:
            raise CheckpointError(
                f"sliding_window must be an integer or null, not {_shown(self.sliding_window)}."
            )
        flags = ("tie_word_embeddings", "scan_layers", "use_fixed_cache", "use_sliding_window")
        for name in (*flags, "qk_norm", "qkv_bias", "output_bias"):
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"{name} must be true or false, not {_shown(getattr(self, name))}.")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise CheckpointError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if type(self.head_dim) is not int or not 1 <= self.head_dim <= _SIZES["hidden_size"]:
            raise CheckpointError(
                f"head_dim must be a positive integer, not {_shown(self.head_dim)} (the most is "
                f"{_SIZES['hidden_size']})."
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise CheckpointError(
                "rope_scaling must be one of the classes of qwen2_core.rope, such as Yarn, not "
                f"{_shown(self.rope_scaling)}."
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rope_theta, self.head_dim)
        layer_types = None
        if self.use_sliding_window:
            check_layer_types(self.layer_types, self.num_hidden_layers)
            layer_types = tuple(self.layer_types or ())
        object.__setattr__(self, "layer_types", layer_types)
        windows_of(layer_types, self.sliding_window, self.num_hidden_layers)

    @property
    def q_heads_per_kv_head(self) -> int:
        """Returns how many query heads share one head of keys and values (grouped-query attention)."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def windows(self) -> Windows:
        """Returns how many positions each layer sees, the token's own included; None for all."""
        return windows_of(self.layer_types, self.sliding_window, self.num_hidden_layers)

    @property
    def context_length(self) -> int:
        """Returns how many tokens a text may have: ``max_position_embeddings``, or what RoPE is scaled to."""
        scaled = 0 if self.rope_scaling is None else self.rope_scaling.context_length
        context = max(self.max_position_embeddings, scaled)
        return context if self.chunk_length is None else min(context, self.chunk_length)

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
        """Returns a copy with some fields changed; checked like a new one.

        A ``head_dim`` that is hidden_size / num_attention_heads stays so.
        """
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            changes = {"head_dim": None} | changes
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any] | Any) -> QwenConfig:
        """Reads a Hugging Face config: of a local directory or hub id, a dict, or a config object.

        Understands the spellings of transformers 4 (``rope_theta``, ``torch_dtype``) and 5
        (``rope_parameters``, ``dtype``). What the config does not say is as Transformers has it: float32,
        for one. ``qwen2_core.weights.read_config`` also asks the weights, as loading does.

        Raises:
            CheckpointError: no such model, not a Qwen model, or a feature that is not implemented.
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
        said, rope = _UNSAID | _UNSAID_OF[hf["model_type"]] | dict(hf), rope_settings(hf)
        said["rope_theta"] = rope.get("rope_theta", said["rope_theta"])
        if said["num_key_value_heads"] is None:
            said["num_key_value_heads"] = said["num_attention_heads"]
        names = [*_SIZES, *_NUMBERS, "tie_word_embeddings", "sliding_window", "head_dim"]
        kwargs = {name: said[name] for name in names if name in said}
        if hf["model_type"] == "qwen3":
            kwargs |= _of_qwen3(said)
        dtype = said_dtype(hf) or "float32"
        if dtype not in _DTYPES:
            raise CheckpointError(f"The checkpoint's dtype {dtype} is not one of {', '.join(_DTYPES)}.")
        try:
            config = cls(dtype=jnp.dtype(dtype), **kwargs)
            layer_types = read_layer_types(said)
            return config.replace(
                use_sliding_window=layer_types is not None,
                layer_types=layer_types,
                rope_scaling=read_rope_scaling(rope, config.max_position_embeddings),
                chunk_length=_chunk_length(hf.get("dual_chunk_attention_config")),
            )
        except CheckpointError as error:
            unsaid = [name for name in _UNSAID if name not in hf and f"{name} {_UNSAID[name]}" in str(error)]
            if not unsaid:
                raise
            raise CheckpointError(
                f"{error} (The config does not give {', '.join(unsaid)}; this is Transformers' default.)"
            ) from error


def said_dtype(hf: Mapping[str, Any]) -> str | None:
    """Returns the dtype that a Hugging Face config names, without the prefix of torch, or None."""
    dtype = hf.get("dtype")
    if dtype is None:
        dtype = hf.get("torch_dtype")
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _of_qwen3(said: Mapping[str, Any]) -> dict[str, bool]:
    """Returns what attention of Qwen3 has beside that of Qwen2."""
    head_dim, bias = said["head_dim"], said["attention_bias"]
    if head_dim is None:
        raise CheckpointError("head_dim must be a positive integer, not None.")
    if not isinstance(bias, bool):
        raise CheckpointError(f"attention_bias must be true or false, not {_shown(bias)}.")
    return {"qk_norm": True, "qkv_bias": bias, "output_bias": bias}


def _chunk_length(given: Any) -> int | None:
    """Returns how many tokens dual chunk attention takes at once; it is plain attention up to there."""
    if given is None:
        return None
    sizes = given if isinstance(given, Mapping) else {}
    chunk, local = sizes.get("chunk_size"), sizes.get("local_size")
    if type(chunk) is not int or type(local) is not int or not 0 <= local < chunk:
        raise CheckpointError(f"dual_chunk_attention_config {_shown(given)} lacks chunk_size or local_size.")
    return chunk - local


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    model_type = hf.get("model_type")
    if model_type not in list(_UNSAID_OF):
        raise CheckpointError(
            f"This is a {_shown(model_type)} model; only model_type 'qwen2' (Qwen2, Qwen2.5) and 'qwen3' "
            "(dense Qwen3) are implemented."
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {_shown(hf['hidden_act'])} is not implemented; Qwen2 uses 'silu'.")
    if hf.get("quantization_config") is not None:
        raise CheckpointError("quantization_config is not implemented; use the unquantized checkpoint.")
    if hf.get("use_mrope"):
        raise CheckpointError("use_mrope (RoPE in several dimensions) is not implemented; it is for images.")
    causal = hf.get("is_causal")
    if causal is not None and causal is not True:
        raise CheckpointError(
            f"is_causal {_shown(causal)} is not implemented: attention here is always causal. Use a "
            "checkpoint that generates text."
        )
    for name in ("per_layer_config", "transformers_weights"):
        if hf.get(name) is not None:
            raise CheckpointError(f"{name} is not implemented; use a checkpoint without it.")


def _as_dict(source: Any) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if hasattr(source, "to_dict"):
        return source.to_dict()
    return read_json_object(resolve_file(source, "config.json"))
