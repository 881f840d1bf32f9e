"""Runs a Qwen2 or Qwen3 in TransformerLens and writes each hook point's value; its own process, as it warns.

python transformer_lens_values.py CHECKPOINT TOKENS.npy OUT.npz NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


def lens_model(checkpoint: str, context: int) -> Any:
    """Returns the checkpoint as a ``HookedTransformer``, in float32 and with its weights as they are."""
    from transformer_lens import (  # pyright: ignore[reportMissingImports]
        HookedTransformer,
        HookedTransformerConfig,
    )
    from transformer_lens.pretrained.weight_conversions import (  # pyright: ignore[reportMissingImports]
        convert_qwen2_weights,
        convert_qwen3_weights,
    )

    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config, is_qwen3 = hf.config, hf.config.model_type == "qwen3"
    heads, convert = config.num_attention_heads, convert_qwen3_weights if is_qwen3 else convert_qwen2_weights
    head_dim = config.head_dim if is_qwen3 else config.hidden_size // heads
    of_lens = HookedTransformerConfig(
        d_model=config.hidden_size,
        d_head=head_dim,
        n_heads=heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=context,
        eps=config.rms_norm_eps,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_base=int(config.rope_parameters["rope_theta"]),
        rotary_dim=head_dim,
        use_qk_norm=is_qwen3,
        rotary_adjacent_pairs=False,
        final_rms=True,
        gated_mlp=True,
        dtype=torch.float32,
        device="cpu",
    )
    model = HookedTransformer(of_lens)
    model.load_state_dict(convert(hf, of_lens), strict=False)
    return model


def main() -> None:
    checkpoint, tokens, out, *names = sys.argv[1:]
    ids = torch.from_numpy(np.load(tokens).astype(np.int64))
    with torch.no_grad():
        logits, cache = lens_model(checkpoint, ids.shape[1]).run_with_cache(ids)
    values = {name: cache[name].flatten(2).numpy() for name in names}
    np.savez(Path(out), logits=logits.numpy(), **values)


if __name__ == "__main__":
    main()
