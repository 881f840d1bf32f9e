"""How far captured rows are from the truth, ours and Transformers', by dtype.

    python examples/make_real_checkpoint.py OUT_DIR
    python -m benchmarks.row_errors OUT_DIR               # a trained model
    python -m benchmarks.row_errors                       # a seeded random one

The truth is the model in float64, with the weights of the dtype in question: one pass of torch over each
sequence, every layer's output hooked. Only the rotary angles are float32, as Transformers computes them.
Theirs is such a pass in the dtype itself. Ours is what generation runs: a prefill, then one compiled decode
step after another on the fixed cache, with and without a float32 residual stream. All read the same tokens.

A row's error is ``|row - truth| / |truth|``. The table has the rows of all layers. The first token's are by
themselves: in a trained model they are a hundred times as long as others.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, Qwen2ForCausalLM

from benchmarks.machine import describe
from examples.checkpoint_writer import qwen2_config, write_checkpoint
from generate_jitted import (
    GenerateShape,
    decode_step_with_cache,
    generate_single_task_jitted,
    pad_prompts,
    prefill_with_cache,
)
from kvcache_utils import create_kv_cache_buffers
from qwen2_jax import QwenModel, load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write one sentence about a dog on a boat.",
    "Which number comes next: 2, 4, 8, 16?",
    "Translate 'good morning' to Spanish.",
    "def add(a, b): explain this line of Python.",
    "Name three colours of a rainbow.",
    "How do I boil an egg?",
)
ANSWER_TOKENS = 32
RANDOM_VOCABULARY, RANDOM_LENGTH = 512, 48


class Tokens(NamedTuple):
    """Sequences: prompts, padded on the right, and what follows them."""

    prompts: np.ndarray  # [B, width] int32
    lengths: np.ndarray  # [B] int32
    following: np.ndarray  # [B, n] int32

    def sequences(self) -> Iterator[np.ndarray]:
        """Yields each sequence as a whole."""
        for prompt, length, tokens in zip(*self, strict=True):
            yield np.concatenate([prompt[:length], tokens])


def our_rows(path: Path, tokens: Tokens, dtype: str, residual_dtype: str) -> list[np.ndarray]:
    """Returns the rows [layers, n, hidden] of each sequence, as generation computes them."""
    config, params = load_qwen2(path, dtype=dtype, scan_layers=True)  # soon compiled
    config = config.replace(residual_dtype=residual_dtype)
    model = create_model_with_hooks(config, range(config.num_hidden_layers))
    shape = GenerateShape(len(tokens.prompts), tokens.prompts.shape[1], tokens.following.shape[1])
    cache = create_kv_cache_buffers(shape.cache_config(config))
    prefill = jax.jit(functools.partial(prefill_with_cache, model))
    step = jax.jit(functools.partial(decode_step_with_cache, model), donate_argnums=2)
    _, cache, of_prompts = prefill(params, tokens.prompts, tokens.lengths, cache)
    steps = []
    for token in tokens.following.T:
        _, cache, rows = step(params, token, cache)
        steps.append(np.asarray(rows, np.float64))
    of_prompts, generated = np.asarray(of_prompts, np.float64), np.stack(steps, axis=1)
    return [
        np.concatenate([of_prompts[:, :length, b], generated[:, :, b]], axis=1)
        for b, length in enumerate(tokens.lengths)
    ]


@torch.no_grad()
def their_rows(path: Path, tokens: Tokens, dtype: str, *, exact: bool = False) -> list[np.ndarray]:
    """Returns the same rows as Transformers computes them in ``dtype``; exact: in float64, of its weights."""
    model = Qwen2ForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    if exact:
        model = model.double()
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):  # Transformers' own norm computes in float32
                module.forward = functools.partial(_norm, module)
    kept: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    found = []
    for sequence in tokens.sequences():
        kept.clear()
        model(torch.from_numpy(sequence[None].astype(np.int64)), use_cache=False)
        found.append(torch.stack(kept)[:, 0].double().numpy())
    return found


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def row_errors(rows: list[np.ndarray], truth: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the relative errors of the first token's rows, and those of all others."""
    errors = [
        np.linalg.norm(mine - right, axis=-1) / np.linalg.norm(right, axis=-1)
        for mine, right in zip(rows, truth, strict=True)
    ]
    return np.concatenate([e[:, 0] for e in errors]), np.concatenate([e[:, 1:].ravel() for e in errors])


def table(path: Path, tokens: Tokens) -> Iterator[str]:
    """Yields the lines of the table, a model's rows each as soon as they are there."""
    yield "| rows | median | p99 | worst | first token, median | worst |"
    yield "|---|---|---|---|---|---|"
    for dtype in ("bfloat16", "float32"):
        truth = their_rows(path, tokens, dtype, exact=True)
        yield _line(f"Transformers, {dtype}", their_rows(path, tokens, dtype), truth)
        for residual_dtype in dict.fromkeys((dtype, "float32")):
            stream = "" if dtype == "float32" else f", {residual_dtype} stream"
            yield _line(f"ours, {dtype}{stream}", our_rows(path, tokens, dtype, residual_dtype), truth)


def _line(name: str, rows: list[np.ndarray], truth: list[np.ndarray]) -> str:
    first, others = row_errors(rows, truth)
    values = (np.median(others), np.quantile(others, 0.99), others.max(), np.median(first), first.max())
    return f"| {name} | {' | '.join(f'{100 * value:.3g} %' for value in values)} |"


def real_tokens(path: Path) -> Tokens:
    """Returns questions in the model's chat template, each with the model's own answer, greedy in float32."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    config, params = load_qwen2(path, dtype="float32", scan_layers=True)
    ids, lengths = pad_prompts(prompts)
    out = generate_single_task_jitted(
        QwenModel(config), params, ids, ANSWER_TOKENS, prompt_lengths=lengths, extract_activations=False
    )
    return Tokens(np.asarray(ids), np.asarray(lengths), np.asarray(out.token_ids))


def random_tokens() -> Tokens:
    """Returns random prompts of several lengths, and random tokens after them."""
    rng = np.random.default_rng(0)
    lengths = np.arange(RANDOM_LENGTH - 7, RANDOM_LENGTH + 1, dtype=np.int32)
    ids = rng.integers(2, RANDOM_VOCABULARY, (2, len(lengths), RANDOM_LENGTH), dtype=np.int32)
    return Tokens(ids[0], lengths, ids[1][:, :24])


def write_random(folder: Path) -> Path:
    """Writes a lively random model of 24 layers, and returns its folder."""
    config = qwen2_config(
        vocab_size=RANDOM_VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="float32",
        token_ids={"<|endoftext|>": 0, "<|im_end|>": 1},
    )
    write_checkpoint(folder, config, seed=0, max_shard_bytes=1 << 30)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare captured rows with float64, by dtype.")
    parser.add_argument("model_path", nargs="?", type=Path, help="a checkpoint (default: a random one)")
    options = parser.parse_args()
    print(json.dumps(describe()))
    with tempfile.TemporaryDirectory() as scratch:
        if options.model_path is None:
            path, tokens = write_random(Path(scratch)), random_tokens()
        else:
            path, tokens = options.model_path, real_tokens(options.model_path)
        for line in table(path, tokens):
            print(line, flush=True)


if __name__ == "__main__":
    main()
