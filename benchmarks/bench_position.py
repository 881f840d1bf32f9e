"""What a decode step costs by the position it is at, and that ``max_tokens`` does not change it.

    python -m benchmarks.bench_position --checkpoint CHECKPOINT [--batch 1 8] [--plot position.png]

The loop's own step, all 14 layers captured, 8 times in one compiled program at each position, its state
allocated for few and for many tokens. A cache that is read whole costs what is allocated; ours what is valid.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from arc_runner.data import EXAMPLE_MODEL
from benchmarks.machine import describe
from generate_jitted import DecodeState, GenerateShape, decode_one, start_decode_state
from kvcache_utils import create_kv_cache_buffers
from qwen2_core.kernels.matmul import compiler_options
from qwen2_core.sampling import Sampling, sampling_params, sequence_keys
from qwen2_core.weights import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

ROOT = Path(__file__).parent.parent
PROMPT, STEPS = 200, 8


class Steps:
    """``STEPS`` decode steps of ``batch`` sequences with room for ``max_tokens``."""

    def __init__(self, model: Any, params: Any, batch: int, max_tokens: int) -> None:
        self._shape = GenerateShape(batch, PROMPT, max_tokens)
        self._model, self._params = model, params
        keys = sequence_keys(jnp.uint32(0), jnp.arange(batch, dtype=jnp.uint32))
        sampling = sampling_params(Sampling(), 0, (), model.config.vocab_size)

        def steps(params: Any, state: DecodeState) -> DecodeState:
            def body(_: Array, state: DecodeState) -> DecodeState:
                return decode_one(model, params, state, state.cache.ar.index, sampling, keys)

            return lax.fori_loop(0, STEPS, body, state)

        state = jax.eval_shape(lambda: self._state(0))
        self._program = jax.jit(steps, donate_argnums=1).lower(params, state).compile(compiler_options())

    def _state(self, position: int) -> DecodeState:
        """As if ``position`` tokens had been generated; what they were does not matter to the time."""
        batch = self._shape.batch_size
        cache = create_kv_cache_buffers(self._shape.cache_config(self._model.config))
        prefill = dataclasses.replace(cache.prefill, length=jnp.full(batch, PROMPT, jnp.int32))
        ar = dataclasses.replace(cache.ar, index=jnp.int32(position))
        cache = dataclasses.replace(cache, prefill=prefill, ar=ar)
        nothing = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.float32), jnp.zeros(batch, bool)
        return start_decode_state(self._model, cache, *nothing, columns=self._shape.max_tokens)

    def milliseconds(self, position: int) -> float:
        """Of one step at ``position`` generated tokens."""
        state = jax.block_until_ready(self._state(position))
        started = time.perf_counter()
        after = jax.block_until_ready(self._program(self._params, state))
        seconds = time.perf_counter() - started
        del after  # giving hundreds of megabytes back takes a third of a step
        return seconds / STEPS * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Time decode steps by position and by max_tokens.")
    parser.add_argument("--checkpoint", default=str(EXAMPLE_MODEL))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max_tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="a picture of the result; needs matplotlib")
    options = parser.parse_args()
    print(json.dumps(describe()))
    config, params = load_qwen2(options.checkpoint, dtype=options.dtype)
    model = create_model_with_hooks(config)
    lines: dict[str, dict[int, float]] = {}
    for batch in options.batch:
        ways = {tokens: Steps(model, params, batch, tokens) for tokens in options.max_tokens}
        places = [int(p) for p in np.linspace(0, max(ways) - STEPS, 9)]
        places += [int(p) for p in np.linspace(0, min(ways) - STEPS, 3)[1:]]
        found: dict[tuple[int, int], list[float]] = {}
        for _ in range(options.rounds):  # interleaved: a machine's mood falls on all alike
            for position in sorted(set(places)):
                for tokens, way in ways.items():
                    if position + STEPS <= tokens:
                        found.setdefault((tokens, position), []).append(way.milliseconds(position))
        for (tokens, position), times in sorted(found.items()):
            median = statistics.median(times)
            lines.setdefault(f"batch {batch}, max_tokens {tokens}", {})[position] = median
            print(f"batch {batch}  max_tokens {tokens:5d}  position {position:5d}: {median:7.1f} ms a step")
    if options.plot:
        plot(lines, options.plot)


def plot(lines: dict[str, dict[int, float]], file: Path) -> None:
    import matplotlib as mpl  # pyright: ignore[reportMissingImports]

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set(xlabel="generated tokens before the step", ylabel="ms a step", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
