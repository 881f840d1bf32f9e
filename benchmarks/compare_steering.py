"""Generation with a steering vector: ours beside Transformers with forward hooks, and TransformerLens.

    python -m benchmarks.compare_steering --batch 8 --output results.json       # from the checkout's root

The same vector is added to the residual stream after one layer at every position; each row has its own
strength, and the first row is clean. The stream of 14 layers is read of each generated token: in the compiled
loop here, with forward hooks there. All take turns in one process, in float32 (``--dtype``).

Prints a table and writes every round to ``--output``. Exits with 1 where rows differ: tokens, and in float32
the rows read. TransformerLens takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from arc_runner.data import EXAMPLE_TASKS
from benchmarks.compare_peers import TOLERANCE, arc_prompts, random_checkpoint
from benchmarks.machine import describe, usable_cores
from generate_jitted import generate_single_task_jitted
from qwen2_core.interventions import Add
from qwen2_core.layers import FIXED_EXTRACT_LAYERS
from qwen2_jax import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

LAYERS = FIXED_EXTRACT_LAYERS
STEERED = 12
Result = tuple[
    np.ndarray, np.ndarray
]  # tokens [B, n]; rows [layers, n - 1, B, hidden] of all read but the last
Generate = Callable[..., Result]


class Job:
    """What every contender does."""

    def __init__(self, options: argparse.Namespace, checkpoint: Path) -> None:
        self.checkpoint, self.dtype, self.new_tokens = checkpoint, options.dtype, options.new_tokens
        self.prompts = arc_prompts(checkpoint, EXAMPLE_TASKS, options.batch, options.prompt_tokens)
        hidden = transformers.AutoConfig.from_pretrained(checkpoint).hidden_size
        self.vector = np.random.default_rng(0).normal(size=hidden).astype(np.float32)
        self.strengths = np.linspace(0, options.strength, options.batch).astype(np.float32)


def ours(job: Job) -> Generate:
    """The compiled loop with an ``Add``."""
    config, params = load_qwen2(job.checkpoint, dtype=job.dtype)
    model = create_model_with_hooks(config, LAYERS)

    def generate(strengths: np.ndarray = job.strengths) -> Result:
        steer = Add("hook_resid_post", STEERED, job.vector, strength=strengths)
        out = generate_single_task_jitted(model, params, job.prompts, job.new_tokens, interventions=[steer])
        assert out.activations is not None
        jax.block_until_ready(out)
        return np.asarray(out.token_ids), np.asarray(out.activations[:, :-1], np.float32)

    return generate


def of_transformers(job: Job) -> Generate:
    """Transformers' ``generate`` with a forward hook on each layer that is read, and on the steered one."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        job.checkpoint, dtype=getattr(torch, job.dtype)
    )
    model.eval().generation_config.eos_token_id = None
    ids = torch.from_numpy(job.prompts.astype(np.int64))
    change = added(job)
    rows: dict[int, list[torch.Tensor]] = {}

    def hook(layer: int) -> Callable[..., torch.Tensor]:
        def after(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output + change if layer == STEERED else output
            if output.shape[1] == 1:
                rows[layer].append(output[:, 0].clone())
            return output

        return after

    for layer in LAYERS:
        model.model.layers[layer].register_forward_hook(hook(layer))

    def generate() -> Result:
        rows.update({layer: [] for layer in LAYERS})
        sequences = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=job.new_tokens,
            min_new_tokens=job.new_tokens,
            pad_token_id=0,
        )
        return sequences[:, ids.shape[1] :].numpy(), stacked(rows)

    return generate


def of_transformer_lens(job: Job) -> Generate:
    """TransformerLens' ``generate`` with the same as hooks at ``hook_resid_post``."""
    from transformer_lens import (  # pyright: ignore[reportMissingImports]
        HookedTransformer,
        HookedTransformerConfig,
    )
    from transformer_lens.pretrained.weight_conversions.qwen2 import (  # pyright: ignore[reportMissingImports]
        convert_qwen2_weights,  # pyright: ignore[reportPrivateImportUsage]
    )

    dtype = getattr(torch, job.dtype)
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=dtype)
    of_hf, heads = hf.config, hf.config.num_attention_heads
    config = HookedTransformerConfig(
        d_model=of_hf.hidden_size,
        d_head=of_hf.hidden_size // heads,
        n_heads=heads,
        n_key_value_heads=of_hf.num_key_value_heads,
        d_mlp=of_hf.intermediate_size,
        n_layers=of_hf.num_hidden_layers,
        n_ctx=job.prompts.shape[1] + job.new_tokens,
        eps=of_hf.rms_norm_eps,
        d_vocab=of_hf.vocab_size,
        act_fn=of_hf.hidden_act,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_base=int(of_hf.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        rotary_dim=of_hf.hidden_size // heads,
        final_rms=True,
        gated_mlp=True,
        default_prepend_bos=False,
        dtype=dtype,
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_qwen2_weights(hf, config), strict=False)
    del hf
    ids = torch.from_numpy(job.prompts.astype(np.int64))
    change = added(job)
    rows: dict[int, list[torch.Tensor]] = {}

    def at(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value + change if hook.layer() == STEERED else value
        if value.shape[1] == 1:
            rows[hook.layer()].append(value[:, 0].clone())
        return value

    hooks: list[Any] = [(f"blocks.{layer}.hook_resid_post", at) for layer in LAYERS]

    def generate() -> Result:
        rows.update({layer: [] for layer in LAYERS})
        with model.hooks(fwd_hooks=hooks):
            out: Any = model.generate(
                ids,
                max_new_tokens=job.new_tokens,
                stop_at_eos=False,
                do_sample=False,
                prepend_bos=False,
                return_type="tokens",
                verbose=False,
            )
        return out[:, ids.shape[1] :].numpy(), stacked(rows)

    return generate


def added(job: Job) -> torch.Tensor:
    """What is added to the stream: [B, 1, hidden]."""
    change = job.strengths[:, None, None] * job.vector
    return torch.from_numpy(change).to(getattr(torch, job.dtype))


def stacked(rows: dict[int, list[torch.Tensor]]) -> np.ndarray:
    """Returns rows [layers, tokens, B, hidden] float32."""
    return torch.stack([torch.stack(rows[layer]) for layer in LAYERS]).float().numpy()


def problems_of(name: str, ours: Result, theirs: Result, dtype: str) -> list[str]:
    """What must not be believed: sentences."""
    different = (ours[0] != theirs[0]).any(1).sum()
    if different:
        return [f"{name}: {different} of {len(ours[0])} rows of tokens differ"]
    distance = float(np.linalg.norm(ours[1] - theirs[1]) / np.linalg.norm(theirs[1]))
    print(f"{name}: rows read differ by {distance:.1e} of their norm", file=sys.stderr)
    if dtype == "float32" and not distance < TOLERANCE:
        return [f"{name}: rows read differ by {distance:.1e}"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare generation with a steering vector.")
    parser.add_argument(
        "--checkpoint", type=Path, help="default: a seeded random Qwen2.5-0.5B, kept in TMPDIR"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--strength", type=float, default=2.0, help="of the last row; the first row has 0")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write everything measured to this JSON file")
    options = parser.parse_args()
    if min(options.batch, options.rounds) < 1 or options.new_tokens < 2:
        parser.error("at least one row, one round and two new tokens are needed")
    torch.set_num_threads(usable_cores())
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()

    job = Job(options, options.checkpoint or random_checkpoint())
    makers = {"ours": ours, "transformers": of_transformers}
    if importlib.util.find_spec("transformer_lens"):
        makers["transformer_lens"] = of_transformer_lens
    contenders = {name: make(job) for name, make in makers.items()}
    results = {name: generate() for name, generate in contenders.items()}  # compiles, and warms up
    problems = [
        problem
        for name in list(makers)[1:]
        for problem in problems_of(name, results["ours"], results[name], options.dtype)
    ]
    clean, _ = contenders["ours"](0 * job.strengths)
    changed = (results["ours"][0] != clean).any(1)
    if changed[0]:
        problems.append("the clean row is not that of a clean run")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, generate in contenders.items():
            started = time.perf_counter()
            generate()
            seconds[name].append(time.perf_counter() - started)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)

    ratios = {
        name: statistics.median(t / o for t, o in zip(seconds[name], seconds["ours"], strict=True))
        for name in makers
    }
    report = {
        "machine": describe(),
        "command": f"python -m benchmarks.compare_steering {' '.join(sys.argv[1:])}",
        "dtype": options.dtype,
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rows_that_steering_changes": int(changed.sum()),
        "seconds": seconds,
        "times_as_long_as_ours": ratios,
        "problems": problems,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("| | seconds (range) | times as long as ours |\n|---|---|---|")
    for name, values in seconds.items():
        spread = f"{min(values):.1f}-{max(values):.1f}"
        print(f"| {name} | {statistics.median(values):.1f} ({spread}) | {ratios[name]:.2f} |")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
