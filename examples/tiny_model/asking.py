"""The embedded model, its puzzles as the runner puts them to it, and its answers as grids' texts."""

from typing import Any

import numpy as np
from transformers import AutoTokenizer

from arc_puzzles import ArcTask, build_messages, create_grid_encoder
from arc_puzzles.chat import encode_prompts
from arc_runner.data import EXAMPLE_MODEL
from qwen2_jax import load_qwen2
from tiny_model.puzzles import draw_puzzle
from tiny_model.rules import Dice, copy_beside, fall_down, flip, rotate

PROMPT_VERSION = "output-from-examples-v0"  # the runner's defaults
ENCODER = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")

# What rules do to a grid that have no colours of their own.
APPLY = {
    "turn-clockwise": rotate,
    "flip-left-right": flip,
    "copy-beside": copy_beside,
    "fall-down": fall_down,
}


def load_tiny_model() -> tuple[Any, Any, Any]:
    """Returns the embedded model's config and weights in float32, and its tokenizer."""
    config, params = load_qwen2(EXAMPLE_MODEL, dtype="float32", scan_layers=True)
    return config, params, AutoTokenizer.from_pretrained(EXAMPLE_MODEL)


def held_out_puzzles(rule: str, n: int, seed: str) -> list[ArcTask]:
    """Returns n different puzzles of a rule, none of whose grids the model has been trained on."""
    dice, found = Dice(f"{seed} {rule}"), dict[str, ArcTask]()
    while len(found) < n:
        puzzle = draw_puzzle(rule, dice, held_out=True)
        found.setdefault(repr((puzzle.train, puzzle.test)), puzzle)
    return list(found.values())


def prompts_of(tokenizer: Any, puzzles: list[ArcTask]) -> np.ndarray:
    """Returns prompts [puzzles, tokens] of puzzles whose grids are of one size."""
    messages = [build_messages(one, 0, ENCODER, PROMPT_VERSION) for one in puzzles]
    return np.stack(encode_prompts(tokenizer, messages))


def answers_of(tokenizer: Any, puzzles: list[ArcTask], rule: str) -> list[list[int]]:
    """Returns the tokens of answers by a rule, which need not be the puzzles' own, each with the EOS."""
    outputs: list[Any] = [
        puzzle.outputs[0] if puzzle.task_id == rule else APPLY[rule](puzzle.test[0].input)
        for puzzle in puzzles
    ]
    texts = [ENCODER.encode(output) for output in outputs]
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
