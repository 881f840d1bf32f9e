"""Train the tiny Qwen2 that the runner uses when no model is named: 24 layers, 2 MB in bfloat16.

    python examples/train_tiny_model.py            # writes arc_runner/data/tiny-qwen2
    python examples/train_tiny_model.py OUT_DIR

It learns eight rules of small puzzles from their prompts alone (see tiny_model). The seed decides everything
but rounding: on another processor or with another JAX the weights differ, not what the model can do.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from checkpoint_writer import qwen2_config, write_tensors
from tiny_model.puzzles import draw_puzzle
from tiny_model.rules import SEEN_RULES, Dice
from tiny_model.tokenizer import VOCAB_SIZE, write_tokenizer
from tiny_model.training import (
    RECIPE,
    WIDTH,
    Params,
    encode,
    grow,
    init_params,
    solved,
    state_dict,
    train,
    training_batches,
)
from transformers import AutoTokenizer

from arc_runner.data import EXAMPLE_MODEL
from qwen2_jax import QwenConfig

SEED = 8
CHECKED = 32  # held-out puzzles of each rule


def model_config(token_ids: dict[str, int]) -> dict:
    return qwen2_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=24,  # so that layers 10 to 23 exist
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
        token_ids=token_ids,
        rope_theta=100.0,  # all eight frequencies of a head turn within a prompt, and tell its places apart
    )


def print_accuracy(params: Params, config: QwenConfig, tokenizer: Any) -> None:
    """Print which share of held-out puzzles is solved, by rule."""
    shares = []
    for name in SEEN_RULES:
        dice = Dice(f"{SEED} check {name}")
        puzzles = [draw_puzzle(name, dice, held_out=True) for _ in range(CHECKED)]
        shares.append(solved(params, config, encode(tokenizer, puzzles)).mean())
        print(f"  {name:16} {shares[-1]:4.0%}")
    print(f"  {'mean':16} {np.mean(shares):4.0%} of {CHECKED} held-out puzzles of each rule", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Qwen2 checkpoint.")
    parser.add_argument("out", nargs="?", type=Path, default=EXAMPLE_MODEL)
    parser.add_argument("--steps", type=int, help="most steps of each phase (default: the whole recipe)")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps is {options.steps}; it has to be 1 or more")
    recipe = [replace(phase, steps=min(phase.steps, options.steps or phase.steps)) for phase in RECIPE]
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    hf_config = model_config(write_tokenizer(options.out))
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    whole = QwenConfig.from_hf(hf_config).replace(dtype="float32", scan_layers=True)

    params: Params = {}
    tokens = 0
    for number, phase in enumerate(recipe):
        config = whole.replace(num_hidden_layers=phase.layers)
        params = grow(params, config, SEED + number) if params else init_params(config, SEED)
        batches = training_batches(tokenizer, phase.batch, f"{SEED} train {number}")
        params = train(params, config, phase, batches)
        tokens += phase.steps * phase.batch * WIDTH
        print_accuracy(params, config, tokenizer)

    state = state_dict(params)
    for file in write_tensors(
        options.out, hf_config, lambda name, _, dtype: state[name].astype(dtype), 1 << 30
    ):
        print(file)
    steps, seconds = sum(phase.steps for phase in recipe), time.perf_counter() - started
    print(f"{steps} steps, {tokens} tokens with padding, {seconds:.0f} s")
    rounded = jax.tree.map(lambda array: array.astype("bfloat16").astype("float32"), params)
    print("With the weights as they are written:")
    print_accuracy(rounded, whole, tokenizer)


if __name__ == "__main__":
    main()
