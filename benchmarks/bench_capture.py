"""What capturing and storing rows costs the generation loop: the runner with and without, side by side.

    python -m benchmarks.bench_capture --checkpoint CHECKPOINT [--generation task]

Each leg is the main job itself, in this process, over the same small puzzles: 8 samples of 110 tokens each,
so that a call of ``--generation task`` makes one batch of 880 rows in 14 layers, 22 MB at Qwen2.5-0.5B's
shape in bfloat16. One leg captures and stores every row, durable before its clock stops; the other makes the
same tokens with ``--no_extract_activations``. They alternate, and each round starts with the other one.
Compared is the runner's own clock, from the first call to the last commit, without loading and compiling.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
from pathlib import Path

import jax

from arc_runner.data import EXAMPLE_MODEL
from arc_runner.errors import EXIT_DONE
from arc_runner.options import RunOptions
from benchmarks.machine import describe
from distributed_kv_cached_inference import run

ROOT = Path(__file__).parent.parent
LEGS = (True, False)  # with capture, without


def write_puzzles(path: Path, count: int) -> None:
    """Puzzles of one cell: prompts that are short, so that what is timed is the decode loop."""
    task = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]], "output": [[4]]}]}
    path.write_text(json.dumps({f"task{number}": task for number in range(count)}))


def leg(options: RunOptions) -> dict[str, float]:
    """The runner's figures."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = run(options)
    if code != EXIT_DONE:
        raise SystemExit(f"the runner ended with {code}:\n{output.getvalue()}")
    return json.loads(Path(options.output_filepath).with_suffix(".report.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what capturing and storing costs.")
    parser.add_argument("--checkpoint", default=str(EXAMPLE_MODEL))
    parser.add_argument("--generation", default="task", choices=["task", "continuous"])
    parser.add_argument("--puzzles", type=int, default=2, help="batches of 8 sequences in a leg")
    parser.add_argument("--tokens", type=int, default=110)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where to make the stores")
    options = parser.parse_args()
    seconds: dict[bool, list[float]] = {capture: [] for capture in LEGS}
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        jax.config.update("jax_compilation_cache_dir", f"{scratch}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        dataset = Path(scratch) / "puzzles.json"
        write_puzzles(dataset, options.puzzles)
        common = RunOptions(
            model_path=options.checkpoint,
            dataset_path=str(dataset),
            max_output_tokens=options.tokens,
            augmentations=1,
            temperature=1.0,
            generation=options.generation,
        )
        for number in range(options.rounds + 1):
            for capture in LEGS if number % 2 else LEGS[::-1]:
                folder = Path(scratch) / f"{number}-{capture}"
                figures = leg(
                    dataclasses.replace(
                        common,
                        activations_dir=str(folder / "activations"),
                        output_filepath=str(folder / "submission.json"),
                        extract_activations=capture,
                    )
                )
                kind = "with" if capture else "without"
                print(
                    f"round {number}  {kind:8s} {figures['tokens_generated']} tokens in "
                    f"{figures['generate_seconds']:.2f} s: {figures['tokens_per_second']:.1f} tokens/s, "
                    f"{figures['bytes_stored'] / 1e6:.1f} MB stored"
                    f"{'   (not counted: compiled first)' if number == 0 else ''}",
                    flush=True,
                )
                if number:
                    seconds[capture].append(figures["generate_seconds"])
    costs = [with_it / without - 1 for with_it, without in zip(seconds[True], seconds[False], strict=True)]
    median = {capture: statistics.median(of_leg) for capture, of_leg in seconds.items()}
    print(json.dumps(describe()))
    print(
        f"capturing and storing costs {statistics.median(costs):+.1%} of the loop's time, rounds "
        f"{', '.join(f'{cost:+.1%}' for cost in costs)}; medians {median[True]:.2f} and {median[False]:.2f} s"
    )


if __name__ == "__main__":
    main()
