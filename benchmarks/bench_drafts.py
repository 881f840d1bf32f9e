"""What drafts copied from the text gain at batch 1: the plain loop and drafted ones, prompt by prompt.

    python -m benchmarks.bench_drafts                                       # the embedded model, its puzzles
    python -m benchmarks.bench_drafts --checkpoint CHECKPOINT --tasks training.json --prompts copies
    python -m benchmarks.bench_drafts --checkpoint CHECKPOINT --prompts questions

Greedy, layers captured, up to an EOS. Prefill and loop are timed apart; each prompt by turns, in one process.
Seconds are of the wall clock and of the processor (``process_time``): on a busy machine compare the latter.
Where rounding decides between two tokens, an answer may go another way; those are counted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import AutoTokenizer

from arc_puzzles import build_messages, create_grid_encoder, load_tasks
from arc_puzzles.chat import encode_prompts
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS
from benchmarks.machine import describe
from generate_jitted import GenerateShape, compile_generate, pad_prompts
from qwen2_core.generation_config import eos_token_ids
from qwen2_core.requests import check_prompts, check_sequence_ids
from qwen2_core.sampling import Sampling, sampling_params
from qwen2_core.weights import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

QUESTIONS = (
    "Why is the sky blue?",
    "How do plants make food?",
    "Write a Python function that adds two numbers.",
    "Explain what a variable is in programming.",
    "Write a short story about a lost key.",
    "List ten animals and say one thing about each.",
    "How do I boil an egg?",
    "What should I pack for a day at the beach?",
)
CELLS = range(20, 101)  # of the grids to copy
LONGEST = 700  # tokens of a puzzle's prompt


def make_prompts(kind: str, tokenizer: Any, tasks: list[Any], limit: int) -> list[np.ndarray]:
    """Puzzles as the runner puts them; grids to copy; questions, which have little to copy."""
    shaped = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
    plain = create_grid_encoder("MinimalGridEncoder()")
    order = np.random.default_rng(0).permutation(len(tasks))
    if kind == "puzzles":
        chats = [build_messages(tasks[i], 0, shaped, "output-from-examples-v0") for i in order]
    elif kind == "copies":
        grids = [tasks[i].test[0].input for i in order]
        grids = [plain.encode(grid) for grid in grids if len(grid) * len(grid[0]) in CELLS]
        ask = "Copy this grid exactly, and write nothing else:"
        chats = [[{"role": "user", "content": f"{ask}\n\n{grid}"}] for grid in grids[:limit]]
    else:
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [prompt for prompt in encode_prompts(tokenizer, chats) if len(prompt) <= LONGEST][:limit]


class Timed:
    """Both programs of one number of drafts."""

    def __init__(self, model: Any, params: Any, width: int, max_tokens: int, draft_tokens: int, eos: Any):
        shape = GenerateShape(1, width, max_tokens, draft_tokens=draft_tokens)
        self._compiled = compile_generate(model, params, shape)
        self._params, self._eos, self._config = params, eos, model.config
        self.seconds: list[tuple[float, float]] = []  # of the loop: wall clock and processor
        self.prefill: list[float] = []
        self.answers: list[list[int]] = []

    def __call__(self, ids: np.ndarray, length: np.ndarray) -> None:
        max_tokens = self._compiled.shape.max_tokens
        prompts = check_prompts(self._config, ids, length, max_tokens, None)
        sampling = sampling_params(Sampling(), 0, self._eos, self._config.vocab_size)
        sequence = check_sequence_ids(1, 1, None)
        started = time.perf_counter()
        state, _ = jax.block_until_ready(self._compiled.prefill(self._params, prompts, sampling, sequence))
        self.prefill.append(time.perf_counter() - started)
        wall, processor = time.perf_counter(), time.process_time()
        state = jax.block_until_ready(self._compiled.decode(self._params, state, sampling, sequence))
        self.seconds.append((time.perf_counter() - wall, time.process_time() - processor))
        self.answers.append(np.asarray(state.token_ids)[0, : int(state.lengths[0])].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description="Time drafts copied from the text at batch 1.")
    parser.add_argument("--checkpoint", default=str(EXAMPLE_MODEL))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", default=str(EXAMPLE_TASKS))
    parser.add_argument("--prompts", choices=("puzzles", "copies", "questions"), default="puzzles")
    parser.add_argument("--limit", type=int, default=16, help="prompts at most")
    parser.add_argument("--draft_tokens", type=int, nargs="+", default=[3, 7, 15])
    parser.add_argument("--max_tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    config, params = load_qwen2(options.checkpoint, dtype=options.dtype, scan_layers=True)
    layers = tuple(range(config.num_hidden_layers * 10 // 24, config.num_hidden_layers))
    eos = eos_token_ids(options.checkpoint, tokenizer, config.vocab_size)
    model = create_model_with_hooks(config, layers)
    tasks = list(load_tasks(options.tasks).tasks)
    prompts = make_prompts(options.prompts, tokenizer, tasks, options.limit)
    ids, lengths = pad_prompts(prompts)
    drafts = [0, *options.draft_tokens]
    timed = {n: Timed(model, params, ids.shape[1], options.max_tokens, n, eos) for n in drafts}
    for round_number in range(options.rounds):
        for row in range(len(ids)):
            for n in drafts if row % 2 else reversed(drafts):
                timed[n](ids[row : row + 1], lengths[row : row + 1])
        if not round_number:
            print(f"{len(prompts)} prompts of {lengths.mean():.0f} tokens, one round done", flush=True)

    figures = []
    plain = timed[0]
    best = {n: np.array(one.seconds).reshape(options.rounds, -1, 2).min(0).sum(0) for n, one in timed.items()}
    for n, one in timed.items():
        answers = one.answers[: len(prompts)]
        tokens = sum(map(len, answers))
        rates = tokens / best[n]
        base = sum(map(len, plain.answers[: len(prompts)])) / best[0]
        figures.append(
            {
                "draft_tokens": n,
                "tokens": tokens,
                "tokens_per_second": float(rates[0]),
                "faster_by_wall_clock": float(rates[0] / base[0]),
                "faster_by_processor_time": float(rates[1] / base[1]),
                "prefill_seconds": float(np.median(one.prefill)),
                "other_answers": sum(a != b for a, b in zip(answers, plain.answers, strict=False)),
            }
        )
        print(json.dumps(figures[-1]), flush=True)
    if options.output:
        head = {"machine": describe(), "options": {k: str(v) for k, v in vars(options).items()}}
        options.output.write_text(json.dumps(head | {"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
