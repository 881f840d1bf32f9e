"""Logit lens and direct logit attribution of the embedded model on one held-out puzzle.

    python examples/logit_lens.py
    python examples/logit_lens.py --rule copy-beside --token 6

The first table has the likeliest token after each layer, as if the layer were the last one. The second says
how much the embedding, each attention and each MLP add to the logit of one token of the answer.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tiny_model.asking import answers_of, held_out_puzzles, load_tiny_model, prompts_of
from tiny_model.rules import SEEN_RULES

from qwen2_core.config import QwenConfig
from qwen2_jax_with_hooks import create_model_with_hooks

SHOWN = 8  # parts of a logit


def logit_lens(config: QwenConfig, params: Any, token_ids: np.ndarray) -> Array:
    """Returns the logits [layers, tokens, vocab] that the stream after each layer would give."""
    model = create_model_with_hooks(config, extract_layers=range(config.num_hidden_layers))
    _, _, resid_post = jax.jit(model.apply)({"params": params}, token_ids[None])
    resid = resid_post[:, :, 0]
    normalized = resid / jnp.sqrt((resid**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    return normalized * params["norm"]["weight"] @ params["embed_tokens"]["embedding"].T


def attribution(
    config: QwenConfig, params: Any, ids: np.ndarray, token: int
) -> tuple[dict[str, float], float]:
    """Returns what each part adds to the logit of ``token`` after the last of ``ids``, and that logit."""
    points = {"hook_attn_out": True, "hook_mlp_out": True, "hook_resid_pre": 0}
    model = create_model_with_hooks(config, config.num_hidden_layers - 1, points=points)
    logits, _, resid_post, kept = jax.jit(model.apply)({"params": params}, ids[None])
    rms = jnp.sqrt((resid_post[0, -1, 0] ** 2).mean() + config.rms_norm_eps)
    direction = params["norm"]["weight"] * params["embed_tokens"]["embedding"][token] / rms
    parts = {"embedding": float(kept["hook_resid_pre"][0, -1, 0] @ direction)}
    for point in ("hook_attn_out", "hook_mlp_out"):
        added = kept[point][:, -1, 0] @ direction
        parts |= {f"blocks.{layer}.{point}": float(value) for layer, value in enumerate(added)}
    return parts, float(logits[0, -1, token])


def word(tokenizer: Any, token: int) -> str:
    """Returns what a token begins with, in one line."""
    return tokenizer.decode([token]).strip(" ").replace("\n", "\\n")[:5]


def main() -> None:
    parser = argparse.ArgumentParser(description="Show how an answer forms, layer by layer.")
    parser.add_argument("--rule", choices=SEEN_RULES, default="flip-left-right")
    parser.add_argument("--token", type=int, default=5, help="which token of the answer is attributed")
    options = parser.parse_args()
    config, params, tokenizer = load_tiny_model()
    puzzles = held_out_puzzles(options.rule, 1, "lens")
    (prompt,), (answer,) = prompts_of(tokenizer, puzzles), answers_of(tokenizer, puzzles, options.rule)
    if not 0 <= options.token < len(answer):
        parser.error(f"--token is {options.token}; the answer has tokens 0 to {len(answer) - 1}")
    ids = np.concatenate([prompt, answer])

    likeliest = np.asarray(logit_lens(config, params, ids)[:, -len(answer) - 1 : -1].argmax(-1))
    print("The likeliest next token after each layer; in [ ] where it is the answer's.\n")
    print("answer      ", *(f"{word(tokenizer, token):^7}" for token in answer))
    shown = [layer for layer in range(len(likeliest)) if not (likeliest[layer] == likeliest[layer - 1]).all()]
    for layer, following in zip(shown, [*shown[1:], len(likeliest)], strict=True):
        words = [word(tokenizer, token) for token in likeliest[layer]]
        right = likeliest[layer] == answer
        cells = (f"[{one}]" if same else one for one, same in zip(words, right, strict=True))
        layers = f"{layer}-{following - 1}" if following > layer + 1 else f"{layer}"
        print(f"layers {layers:5}", *(f"{cell:^7}" for cell in cells))

    end = len(prompt) + options.token
    parts, logit = attribution(config, params, ids[:end], answer[options.token])
    name = word(tokenizer, answer[options.token])
    print(f"\nWhat adds most to the logit of token {options.token} of the answer, {name}:\n")
    for name, value in sorted(parts.items(), key=lambda part: -abs(part[1]))[:SHOWN]:
        print(f"{name:26} {value:+8.3f}")
    print(f"{'sum of all parts':26} {sum(parts.values()):+8.3f}\n{'logit of the model':26} {logit:+8.3f}")


if __name__ == "__main__":
    main()
