"""Our generation beside its peers': the same checkpoint, the same prompts, interleaved in one run.

    python -m benchmarks.make_peers                                               # once, see there
    python -m benchmarks.compare_peers --batch 1 8 32 --output results.json      # from the checkout's root
    python -m benchmarks.compare_peers --only 'jitted-*' hf-bf16-dynamic-hidden --batch 1

The peers are Transformers here, and vLLM, nnsight, TransformerLens and llama.cpp in the environments that
``make_peers`` made. A contender whose environment is missing, or that fails, is named and left out.

Prints a Markdown table a batch size and writes every round's numbers to ``--output``, all after each batch
size. Exits with 1 where a check fails: greedy float32 tokens have to be Transformers', and captures have to
be finite, nonzero and, in float32, equal to Transformers' hidden states; ours have to be of the right shape.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from arc_puzzles import build_messages, create_grid_encoder, encode_prompt, load_tasks
from arc_runner.data import EXAMPLE_TASKS
from benchmarks.machine import describe
from benchmarks.make_peers import ENVIRONMENTS, interpreter
from benchmarks.peers import CONTENDERS, ITEMSIZE, Contender, Job, Measurement
from benchmarks.worker import Worker, jax_platform, torch_reaches
from qwen2_core.config import QwenConfig

ROOT = Path(__file__).parent.parent
CACHED_CHECKPOINT = Path(tempfile.gettempdir()) / "qwen2-jax-activations" / "random-qwen2.5-0.5b"
TOLERANCE = 2e-3  # of float32 rows, relative to their norm, after 24 layers of a lively model and many steps


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare our generation with its peers'.")
    parser.add_argument(
        "--checkpoint", type=Path, help="default: a seeded random Qwen2.5-0.5B, kept in TMPDIR"
    )
    parser.add_argument("--tasks", type=Path, default=EXAMPLE_TASKS, help="ARC tasks")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt_tokens", type=int, default=200)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--growing_tokens", type=int, default=8, help="new tokens of the growing path")
    parser.add_argument("--rounds", type=int, default=3)
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["*"], help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=Path, help="write everything measured to this JSON file")
    options = parser.parse_args()
    chosen = [c for c in CONTENDERS if any(fnmatch.fnmatch(c.name, pattern) for pattern in options.only)]
    if not chosen:
        parser.error(f"--only {' '.join(options.only)} matches no contender; there are {', '.join(names)}")
    if min(options.new_tokens, options.growing_tokens) < 2 or min(options.rounds, *options.batch) < 1:
        parser.error("at least two new tokens, one round and one row are needed")

    checkpoint = options.checkpoint or random_checkpoint()
    config = QwenConfig.from_hf(checkpoint)
    device = torch_device(jax_platform())
    chosen, left_out = runnable(chosen, device)
    report: dict[str, Any] = {
        "machine": describe() | {"device": device, "peers": {}},
        "command": f"python -m benchmarks.compare_peers {' '.join(sys.argv[1:])}",
        "left_out": left_out,
        "problems": [],
        "results": [],
    }
    # Two bytes a number and four are not compared with each other, and their weights need not fit together.
    for itemsize in sorted({ITEMSIZE[c.dtype] for c in chosen}):
        workers = start_workers(
            [c for c in chosen if ITEMSIZE[c.dtype] == itemsize], str(checkpoint), device, left_out
        )
        report["machine"]["peers"] |= {
            key[0]: worker.versions for key, worker in workers.items() if key[0] in ENVIRONMENTS
        }
        for batch in options.batch:
            prompts = arc_prompts(checkpoint, options.tasks, batch, options.prompt_tokens)
            job = Job(prompts, options.new_tokens, options.growing_tokens)
            rounds, limits = compare(chosen, workers, job, options.rounds, left_out)
            report["problems"] += [f"batch {batch}: {p}" for p in check(rounds, job, config)]
            report["results"] += [
                summary(c, measured, limits[c], job, config, workers[c.worker].weight_bytes)
                for c, measured in rounds.items()
            ]
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for worker in workers.values():
            worker.close()
    print(markdown(report))
    if not report["results"]:
        sys.exit("Nothing was left to compare.")
    return 1 if report["problems"] else 0


def random_checkpoint() -> Path:
    """The seeded 0.5B checkpoint, made on the first call (1 GB, in seconds)."""
    if not (CACHED_CHECKPOINT / "config.json").exists():
        CACHED_CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
        script = ROOT / "examples" / "make_random_checkpoint.py"
        with tempfile.TemporaryDirectory(dir=CACHED_CHECKPOINT.parent) as making:
            subprocess.run([sys.executable, script, f"{making}/model"], check=True)
            Path(making, "model").rename(CACHED_CHECKPOINT)
    return CACHED_CHECKPOINT


def arc_prompts(checkpoint: Path, tasks: Path, batch: int, tokens: int) -> np.ndarray:
    """[batch, tokens] int32: text of ARC tasks through the checkpoint's tokenizer, no two rows equal."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    encoder = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
    streams = [
        encode_prompt(tokenizer, build_messages(task, 0, encoder, "output-from-examples-v0"))
        for task in load_tasks(tasks).tasks
    ]
    # Row b reads task b from its start; once all tasks are used, again from a little further on.
    prompts = [
        np.resize(np.roll(streams[row % len(streams)], -11 * (row // len(streams))), tokens)
        for row in range(batch)
    ]
    assert len(np.unique(prompts, axis=0)) == batch
    return np.stack(prompts)


def torch_device(platform: str) -> str:
    """Torch's name of the device that JAX runs on."""
    return {"gpu": "cuda"}.get(platform, platform)


def runnable(chosen: list[Contender], device: str) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that can run beside JAX on ``device``, and why each of the others cannot."""
    reasons: dict[str, str] = {}
    for framework in dict.fromkeys(c.framework for c in chosen):
        if framework == "torch":
            if device not in ("cpu", "cuda"):
                reasons[framework] = f"JAX runs on {device}, where torch does not"
            elif not torch_reaches(device):
                reasons[framework] = f"torch is not installed or cannot use {device}"
        elif framework in ENVIRONMENTS:
            if device != "cpu":
                reasons[framework] = f"JAX runs on {device}, this peer is compared on a CPU"
            elif interpreter(framework) is None:
                reasons[framework] = f"no environment, make it: python -m benchmarks.make_peers {framework}"
    for framework, reason in reasons.items():
        print(f"{framework} is left out: {reason}.", file=sys.stderr)
    left_out = {c.name: reasons[c.framework] for c in chosen if c.framework in reasons}
    return [c for c in chosen if c.framework not in reasons], left_out


def start_workers(
    chosen: list[Contender], checkpoint: str, device: str, left_out: dict[str, str]
) -> dict[tuple[str, str], Worker]:
    """A worker for each framework and dtype; those that do not start are added to ``left_out``."""
    workers: dict[tuple[str, str], Worker] = {}
    for framework, dtype in dict.fromkeys(c.worker for c in chosen):
        print(f"start {framework} {dtype}", file=sys.stderr, flush=True)
        try:
            workers[framework, dtype] = Worker(framework, checkpoint, dtype, device)
        except RuntimeError as error:
            print(f"{framework} in {dtype} does not start and is left out:\n{error}", file=sys.stderr)
            reason = f"does not start: {last_line(error)}"
            left_out |= {c.name: reason for c in chosen if c.worker == (framework, dtype)}
    return workers


def last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1]


def compare(
    chosen: list[Contender],
    workers: dict[tuple[str, str], Worker],
    job: Job,
    rounds: int,
    left_out: dict[str, str],
) -> tuple[dict[Contender, list[Any]], dict[Contender, list[float]]]:
    """``rounds`` measurements a contender after its first run, all contenders with a worker taking turns.

    The first element of each list is ``prepare``'s answer. One that fails is added to ``left_out``.
    The same process reads memory before and after each turn, and the mean bytes a second are the second
    result: what others on the machine leave of its memory's bandwidth changes within seconds.
    """
    measured: dict[Contender, list[Any]] = {c: [] for c in chosen if c.worker in workers}
    limits: dict[Contender, list[float]] = {c: [] for c in measured}
    for turn in ["prepare"] + ["measure"] * rounds:
        for contender in list(measured):
            print(f"batch {len(job.prompts)}: {turn} {contender.name}", file=sys.stderr, flush=True)
            worker = workers[contender.worker]
            try:
                before = worker.call("bandwidth")
                measured[contender].append(worker.call(turn, contender, job))
                limits[contender].append((before + worker.call("bandwidth")) / 2)
            except RuntimeError as error:
                print(f"{contender.name} failed and is left out:\n{error}", file=sys.stderr)
                left_out[contender.name] = f"failed at batch {len(job.prompts)}: {last_line(error)}"
                del measured[contender]
    return measured, limits


def check(rounds: dict[Contender, list[Any]], job: Job, config: QwenConfig) -> list[str]:
    """What must not be believed: sentences."""
    problems = []
    last = {contender: measured[-1] for contender, measured in rounds.items()}
    reference = next((c for c in last if (c.framework, c.dtype, c.capture) == ("torch", "f32", True)), None)
    for contender, theirs in last.items():
        if contender.framework == "torch":
            continue
        tokens = job.tokens_of(contender)
        if contender.capture:
            problems += [f"{contender.name}: {p}" for p in check_capture(contender, theirs, tokens, config)]
        if reference is None or contender.dtype != "f32":
            continue
        expected = last[reference]
        equal = theirs.tokens == expected.tokens[:, :tokens]
        if not equal.all():
            problems.append(
                f"{contender.name}: {(~equal).any(1).sum()} of {len(equal)} rows differ from Transformers', "
                f"first at token {int((~equal).any(0).argmax())}"
            )
        elif contender.capture and contender.kind != "growing":
            distance = np.linalg.norm(theirs.rows - expected.rows) / np.linalg.norm(expected.rows)
            if not distance < TOLERANCE:
                problems.append(
                    f"{contender.name}: captured rows differ from Transformers' by {distance:.1e}"
                )
    return problems


def check_capture(contender: Contender, measured: Measurement, tokens: int, config: QwenConfig) -> list[str]:
    """Whether captured rows can be what they are said to be. Peers capture none for the last token."""
    problems = []
    rows = measured.rows
    if contender.framework == "jax":
        expected = (14, tokens, len(measured.tokens), config.hidden_size)
        if measured.capture_shape != expected:
            problems.append(f"captured {measured.capture_shape} instead of {expected}")
        rows = measured.last_rows
    assert rows is not None
    if not np.isfinite(rows).all() or not (np.linalg.norm(rows, axis=-1) > 0).all():
        problems.append("rows of the last token are zero or not finite")
    return problems


def summary(
    contender: Contender,
    measured: list[Any],
    limits: list[float],
    job: Job,
    config: QwenConfig,
    weight_bytes: int,
) -> dict[str, Any]:
    """One contender's line of the results: medians over the rounds, and each round."""
    (compile_seconds, first_seconds), rounds = measured[0], measured[1:]
    batch, prompt_tokens = job.prompts.shape
    step = [m.decode / m.steps for m in rounds]
    tokens = job.tokens_of(contender)
    itemsize = ITEMSIZE[contender.dtype]
    slots = batch * (prompt_tokens + (tokens + 1) / 2)  # read by a step, on average
    kv_bytes = slots * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    if not config.tie_word_embeddings:
        weight_bytes -= config.vocab_size * config.hidden_size * itemsize  # the embedding: a row a sequence
    median = statistics.median(step)
    return {
        "name": contender.name,
        "batch": batch,
        "tokens_per_second": batch / median,
        "tokens_per_second_rounds": [batch / s for s in step],
        "step_seconds": median,
        "bytes_per_step": int(weight_bytes + kv_bytes),
        "bytes_per_second": (weight_bytes + kv_bytes) / median,
        "bandwidth_beside_rounds": limits[1:],
        "fraction_of_limit": statistics.median(
            (weight_bytes + kv_bytes) / s / limit for s, limit in zip(step, limits[1:], strict=True)
        ),
        "prefill_seconds": statistics.median(m.prefill for m in rounds),
        "compile_seconds": compile_seconds,
        "first_generation_seconds": first_seconds,
        "new_tokens": tokens,
        "peak_bytes": max(m.peak_bytes for m in rounds),
        "peak_what": rounds[0].peak_what,
    }


def markdown(report: dict[str, Any]) -> str:
    """One table a batch size."""

    def listed(items: dict[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in items.items() if key != "peers")

    lines = [f"{listed(report['machine'])}\n", f"`{report['command']}`"]
    if peers := report["machine"]["peers"]:
        lines.append("\nPeers: " + "; ".join(f"{name} ({listed(v)})" for name, v in peers.items()))
    for batch in dict.fromkeys(result["batch"] for result in report["results"]):
        results = [r for r in report["results"] if r["batch"] == batch]
        hidden = [r["tokens_per_second"] for r in results if fnmatch.fnmatch(r["name"], "hf-*-hidden")]
        lines += [
            f"\nBatch {batch}\n",
            "| contender | tokens/s (rounds) | against the best hf with hidden states | ms a step | GB/s "
            "| of what was read beside it, GB/s | prefill s | compile s | first run s | peak GB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in results:
            spread = f"{min(r['tokens_per_second_rounds']):.1f}-{max(r['tokens_per_second_rounds']):.1f}"
            against = f"{r['tokens_per_second'] / max(hidden):.2f}x" if hidden else ""
            beside = f"{statistics.median(r['bandwidth_beside_rounds']) / 1e9:.1f}"
            compiled = "" if r["compile_seconds"] is None else f"{r['compile_seconds']:.1f}"
            lines.append(
                f"| {r['name']} | {r['tokens_per_second']:.1f} ({spread}) | {against} "
                f"| {r['step_seconds'] * 1e3:.1f} | {r['bytes_per_second'] / 1e9:.1f} "
                f"| {r['fraction_of_limit']:.0%} of {beside} | {r['prefill_seconds']:.2f} | {compiled} "
                f"| {r['first_generation_seconds']:.1f} | {r['peak_bytes'] / 1e9:.2f} |"
            )
    if report["left_out"]:
        lines += ["\nLeft out:\n", *(f"- {name}: {reason}" for name, reason in report["left_out"].items())]
    if report["problems"]:
        lines += ["\nNot to be believed:\n", *(f"- {problem}" for problem in report["problems"])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
