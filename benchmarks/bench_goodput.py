"""Goodput: valid tokens a second on real ARC lengths, in slots, in static batches, and by Transformers.

    python -m benchmarks.bench_goodput --checkpoint CHECKPOINT --tasks training.json --slots 8
    python -m benchmarks.bench_goodput --simulate 10000          # a tiny model: is memory flat?

Prompts are those of the tasks, answers as long as the true ones (no EOS), rows of 14 layers captured. All
three read the same prompts and make the same tokens; prefills count, compiling and loading do not. A static
batch runs until its longest answer ends. With ``--samples N`` each prompt is continued N times, as in a run
with several predictions a task: Transformers reads the prompt for each, ours once. The table gives tokens a
second with prefills and without. ``--sequences N`` takes every k-th input, so that lengths keep their
distribution. ``--plot`` draws the occupancy of the slots over time (extra ``plots``).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from transformers import AutoTokenizer

from arc_puzzles import build_messages, create_grid_encoder, encode_prompt, load_tasks
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS
from benchmarks.machine import PeakMemory, describe, usable_cores
from generate_jitted import GenerateShape, compile_generate, pad_prompts
from qwen2_core.requests import PromptBatch
from qwen2_core.sampling import Sampling, sampling_params
from qwen2_engine import ContinuousEngine, Occupancy, RunningSlots, SequenceRequest
from qwen2_jax import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

ROOT = Path(__file__).parent.parent
ENCODER = "GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))"
Batches = list[list[SequenceRequest]]


class Timed:
    """A program whose seconds are added up; it returns when they have passed."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self.memory_analysis = program.memory_analysis
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        started = time.perf_counter()
        out = jax.block_until_ready(self._program(*args))
        self.seconds += time.perf_counter() - started
        return out


class Moment(NamedTuple):
    """Occupancy up to ``seconds`` after the start."""

    seconds: float
    occupancy: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure valid tokens a second.")
    parser.add_argument("--checkpoint", type=Path, default=EXAMPLE_MODEL)
    parser.add_argument("--tasks", type=Path, default=EXAMPLE_TASKS)
    parser.add_argument("--sequences", type=int, help="how many test inputs; all by default")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1, help="sequences that continue each prompt")
    dtypes = ["bfloat16", "float32"]
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes)
    parser.add_argument("--their_dtype", choices=dtypes, help="of Transformers, where another one is faster")
    parser.add_argument("--max_prompt", type=int, default=10**6, help="leave out longer prompts")
    parser.add_argument("--without", nargs="*", default=[], choices=["static", "transformers"])
    parser.add_argument(
        "--simulate", type=int, metavar="N", help="N short sequences of the tiny model instead"
    )
    parser.add_argument("--output", type=Path, help="write what was measured to this JSON file")
    parser.add_argument("--plot", type=Path, help="write the occupancy over time to this image")
    options = parser.parse_args()
    if options.simulate:
        print(json.dumps(simulate(options.simulate, options.slots), indent=1))
        return

    their_dtype = options.their_dtype or options.dtype
    config, params = load_qwen2(options.checkpoint, dtype=options.dtype)
    model = create_model_with_hooks(config)
    items = ContinuousEngine(model, params).order(arc_items(options))
    batches = [items[i : i + options.slots] for i in range(0, len(items), options.slots)]
    results = {"slots": measure_slots(model, params, items, options.slots)}
    if "static" not in options.without:
        results["static batches"] = measure_static(model, params, batches)
    del params
    gc.collect()
    if "transformers" not in options.without:
        results["transformers"] = measure_transformers(options.checkpoint, their_dtype, batches)
    report = {
        "machine": describe() | {"device": jax.local_devices()[0].device_kind},
        "sequences": len(items),
        "prompt_tokens": percentiles([len(item.prompt_token_ids) for item in items]),
        "answer_tokens": percentiles([item.max_tokens for item in items]),
        "batch": options.slots,
        "dtype": options.dtype,
        "their_dtype": their_dtype,
        "samples": options.samples,
        "results": results,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(results, options.plot)
    print(markdown(report))


def arc_items(options: argparse.Namespace) -> list[SequenceRequest]:
    """A sequence for each test input, as long as its true answer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(options.checkpoint)
    encoder = create_grid_encoder(ENCODER)
    items = []
    for task in load_tasks(options.tasks).tasks:
        for index, pair in enumerate(task.test):
            prompt = encode_prompt(tokenizer, build_messages(task, index, encoder, "output-from-examples-v0"))
            if pair.output is not None and len(prompt) <= options.max_prompt:
                tokens = len(tokenizer.encode(encoder.encode(pair.output))) + 1  # and the EOS
                items.append(SequenceRequest(prompt, min(tokens, 1100), sampling_id=len(items)))
    wanted = min(options.sequences or len(items), len(items))
    chosen = [items[i] for i in np.linspace(0, len(items) - 1, wanted).round().astype(int)]
    each = [item for item in chosen for _ in range(options.samples)]
    return [dataclasses.replace(item, sampling_id=number) for number, item in enumerate(each)]


def measure_slots(model: Any, params: Any, items: list[SequenceRequest], slots: int) -> dict[str, Any]:
    """Continuous generation, by the planner's stages."""
    engine = ContinuousEngine(model, params, slots=slots)
    ordered = engine.order(items)
    windows: list[tuple[float, Occupancy]] = []
    seconds, prefill, compile_seconds, tokens, expected, peak = 0.0, 0.0, 0.0, 0, 0, 0
    for stage in engine.plan(ordered):
        running = engine.start(stage)
        assert isinstance(running, RunningSlots)
        prefills = {width: Timed(program) for width, program in running.programs.prefills.items()}
        running.programs = dataclasses.replace(running.programs, prefills=prefills)
        compile_seconds += running.programs.compile_seconds
        memory = PeakMemory()
        memory.start()
        before = memory.read()[0] - running.memory.kv_cache
        of_stage = [item for item in ordered if item.width in stage.widths]
        started = time.perf_counter() - seconds
        finished = running.generate(
            of_stage, on_window=lambda w, started=started: windows.append((time.perf_counter() - started, w))
        )
        tokens += sum(len(sequence.token_ids) for sequence in finished)
        seconds = time.perf_counter() - started
        prefill += sum(program.seconds for program in prefills.values())
        peak = max(peak, memory.read()[0] - before + running.memory.weights)
        expected = max(expected, running.memory.on_device)
    live = sum(window.live_steps for _, window in windows)
    made = sum(window.steps * window.slots for _, window in windows)
    over_time = [Moment(at, window.live_steps / (window.steps * window.slots)) for at, window in windows]
    assert tokens == sum(item.max_tokens for item in items)
    return result(tokens, seconds, prefill, live / made, over_time) | {
        "compile_seconds": compile_seconds,
        "expected_bytes": expected,
        "measured_bytes_on_cpu": peak,
    }


def measure_static(model: Any, params: Any, batches: Batches) -> dict[str, Any]:
    """``generate_single_task_jitted``'s programs: each batch to the end of its longest answer."""
    seconds, prefill, tokens, compile_seconds = 0.0, 0.0, 0, 0.0
    over_time: list[Moment] = []
    for batch in batches:
        longest = max(item.max_tokens for item in batch)
        different, samples = without_repeats([item.prompt_token_ids for item in batch])
        prompts = PromptBatch(*pad_prompts(different))
        traced = sampling_params(Sampling(), 0, (), model.config.vocab_size)
        shape = GenerateShape(len(different), prompts.input_ids.shape[1], longest, samples, stop=False)
        program = compile_generate(model, params, shape)
        compile_seconds += program.compile_seconds
        reading = Timed(program.prefill)
        program = dataclasses.replace(program, programs=(reading, program.decode))
        started = time.perf_counter()
        out = program(params, prompts, traced, np.arange(len(batch), dtype=np.uint32))
        rows = np.asarray(out.activations)
        for row, item in enumerate(batch):  # as the runner hands them to the store
            np.ascontiguousarray(rows[:, : item.max_tokens, row])
        took = time.perf_counter() - started
        over_time += static_moments(batch, seconds, took)
        seconds += took
        prefill += reading.seconds
        tokens += sum(item.max_tokens for item in batch)
        del out, rows
    return result(tokens, seconds, prefill, static_occupancy(batches), over_time) | {
        "compile_seconds": compile_seconds
    }


def measure_transformers(checkpoint: Path, dtype: str, batches: Batches) -> dict[str, Any]:
    """Transformers' ``generate`` with hidden states over the same static batches, padded on the left."""
    import torch
    import transformers

    torch.set_num_threads(usable_cores())
    transformers.logging.set_verbosity_error()
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None
    seconds, prefill, tokens = 0.0, 0.0, 0
    over_time: list[Moment] = []

    def generate(ids: Any, mask: Any, new_tokens: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids.to(device), attention_mask=mask.to(device), do_sample=False, max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, pad_token_id=0, output_hidden_states=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        out.sequences[0, -1].item()  # waits for the device
        return time.perf_counter() - started

    for batch in batches:
        longest = max(item.max_tokens for item in batch)
        width = max(len(item.prompt_token_ids) for item in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(batch):
            prompt = torch.from_numpy(item.prompt_token_ids.astype(np.int64))
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        took = generate(ids, mask, longest)
        over_time += static_moments(batch, seconds, took)
        seconds += took
        prefill += generate(ids, mask, 1)  # besides, to tell the two apart
        tokens += sum(item.max_tokens for item in batch)
    return result(tokens, seconds, prefill, static_occupancy(batches), over_time)


def simulate(sequences: int, slots: int) -> dict[str, Any]:
    """Many short sequences of the tiny example; resident and device bytes at ten moments of the run."""
    config, params = load_qwen2(EXAMPLE_MODEL, dtype="float32")
    model = create_model_with_hooks(config)
    rng = np.random.default_rng(0)
    engine = ContinuousEngine(model, params, slots=slots, max_tokens=32, sampling=Sampling(0.8))
    items = engine.order(
        SequenceRequest(rng.integers(0, 256, rng.integers(2, 60)), int(rng.integers(1, 33)), sampling_id=i)
        for i in range(sequences)
    )
    (stage,) = engine.plan(items)
    running = engine.start(stage)
    moments = []
    started = time.perf_counter()
    for number, _ in enumerate(running.generate(items), 1):
        if number % max(sequences // 10, 1) == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            on_device = sum(array.nbytes for array in jax.live_arrays())
            moments.append({"sequences": number, "resident_mb": resident / 1e6, "device_mb": on_device / 1e6})
    return {"seconds": time.perf_counter() - started, "slots": slots, "moments": moments}


def without_repeats(prompts: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """The prompts without repeats, and how often each comes; all of them, once, if that differs."""
    counts = Counter(prompt.tobytes() for prompt in prompts)
    if len(set(counts.values())) > 1:
        return prompts, 1
    return list({prompt.tobytes(): prompt for prompt in prompts}.values()), len(prompts) // len(counts)


def static_moments(batch: list[SequenceRequest], begin: float, took: float) -> list[Moment]:
    longest = max(item.max_tokens for item in batch)
    alive = [sum(item.max_tokens > step for item in batch) / len(batch) for step in range(0, longest, 16)]
    return [Moment(begin + took * (i + 1) / len(alive), share) for i, share in enumerate(alive)]


def static_occupancy(batches: Batches) -> float:
    made = sum(len(batch) * max(item.max_tokens for item in batch) for batch in batches)
    return sum(item.max_tokens for batch in batches for item in batch) / made


def result(
    tokens: int, seconds: float, prefill: float, occupancy: float, over_time: list[Moment]
) -> dict[str, Any]:
    return {
        "valid_tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "prefill_seconds": prefill,
        "tokens_per_second_without_prefill": tokens / (seconds - prefill),
        "occupancy": occupancy,
        "occupancy_over_time": over_time,
    }


def percentiles(values: Sequence[int]) -> dict[str, float]:
    return {f"{p}%": float(np.percentile(values, p)) for p in (5, 50, 95, 100)}


def markdown(report: dict[str, Any]) -> str:
    lines = [
        ", ".join(f"{key} {value}" for key, value in report["machine"].items()),
        f"\n{report['sequences']} sequences, {report['samples']} of each prompt, {report['dtype']} "
        f"(Transformers: {report['their_dtype']}), {report['batch']} at once; prompts "
        f"{report['prompt_tokens']}, answers {report['answer_tokens']}\n",
        "| | valid tokens/s | slots are faster by | without prefills | slots are faster by | occupancy "
        "| seconds | of which prefill |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = report["results"]["slots"]
    for name, measured in report["results"].items():
        cells = [name]
        for figure in ("valid_tokens_per_second", "tokens_per_second_without_prefill"):
            cells += [f"{measured[figure]:.1f}", f"{ours[figure] / measured[figure]:.2f}x"]
        cells += [f"{measured['occupancy']:.1%}"]
        cells += [f"{measured[figure]:.1f}" for figure in ("seconds", "prefill_seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"\nmemory: {ours['expected_bytes'] / 1e6:.0f} MB expected; resident on CPU, host rows included, "
        f"{ours['measured_bytes_on_cpu'] / 1e6:.0f} MB"
    )
    return "\n".join(lines)


def plot(results: dict[str, Any], file: Path) -> None:
    import matplotlib as mpl  # pyright: ignore[reportMissingImports]

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    figure, axes = plt.subplots(figsize=(9, 4))
    for name, measured in results.items():
        seconds, occupancy = zip(*measured["occupancy_over_time"], strict=True)
        axes.step([0.0, *seconds[:-1]], occupancy, where="post", label=f"{name}: {measured['occupancy']:.0%}")
    axes.set(xlabel="seconds", ylabel="slots with a live sequence", ylim=(0, 1.05))
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
