"""What reading hook points and steering cost a decode step: ratios to the plain model, by turns in one run.

    python -m benchmarks.bench_hooks [--rounds 12] [--tokens 16]

At Qwen2.5-0.5B's shape in bfloat16, batch 8. Each leg is one compiled decode loop of the same length:

- plain: the outputs of layers 10 to 23 are captured, as always;
- points: so are the other eleven points of layer 12 and the final norm's;
- added: a vector is added to the outputs of layers 10 to 23.

A leg's time is compared with that of the plain leg beside it, and the median of the ratios is given, of the
clock and of the processor's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe
from generate_jitted import GenerateShape, compile_generate
from qwen2_core.config import QwenConfig
from qwen2_core.hook_points import LN_FINAL, RESID_POST, point_names
from qwen2_core.interventions import Add
from qwen2_core.requests import PromptBatch
from qwen2_core.sampling import Sampling, sampling_params
from qwen2_core.steering import steer, steer_prompts
from qwen2_jax_with_hooks import FIXED_EXTRACT_LAYERS, create_model_with_hooks

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from real_shape import random_model

BATCH, WIDTH = 8, 8


class Leg:
    """One model and its interventions: runs the decode loop and takes its time."""

    def __init__(self, model: Any, params: Any, tokens: int, interventions: Any = ()) -> None:
        self._params = params
        shape = GenerateShape(BATCH, WIDTH, tokens, stop=False)
        self._program = compile_generate(model, params, shape, interventions)
        self._sampling = sampling_params(Sampling(), 0, (), model.config.vocab_size)
        self._prompts = PromptBatch(
            np.arange(BATCH * WIDTH, dtype=np.int32).reshape(BATCH, WIDTH), np.full(BATCH, WIDTH, np.int32)
        )
        self._ids = np.arange(BATCH, dtype=np.uint32)
        steering = steer(interventions, model.config, BATCH)
        self._of_rows = () if steering is None else (steering,)
        self._of_prompts = () if steering is None else (steer_prompts(steering, BATCH),)

    def seconds(self) -> np.ndarray:
        """Returns the seconds of one decode loop, by the clock and by the processor."""
        args = self._params, self._prompts, self._sampling, self._ids
        state, _ = jax.block_until_ready(self._program.prefill(*args, *self._of_prompts))
        started = np.array([time.perf_counter(), time.process_time()])
        jax.block_until_ready(
            self._program.decode(self._params, state, self._sampling, self._ids, *self._of_rows)
        )
        return np.array([time.perf_counter(), time.process_time()]) - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what reading and steering cost a decode step.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--scan_layers", action="store_true")
    options = parser.parse_args()
    config = QwenConfig(dtype=jnp.bfloat16, scan_layers=options.scan_layers)
    model, params = random_model(config)
    points = {point: True if point == LN_FINAL else 12 for point in point_names() if point != RESID_POST}
    steer_by = Add(RESID_POST, FIXED_EXTRACT_LAYERS, np.full(config.hidden_size, 0.1), np.arange(BATCH))
    legs = {
        "plain": Leg(model, params, options.tokens),
        "points": Leg(create_model_with_hooks(config, points=points), params, options.tokens),
        "added": Leg(model, params, options.tokens, [steer_by]),
    }
    for leg in legs.values():
        leg.seconds()
    ratios: dict[str, list[np.ndarray]] = {"points": [], "added": [], "plain again": []}
    steps = []
    for number in range(options.rounds):
        for name in ratios if number % 2 else reversed(ratios):
            leg = legs[name.split()[0]]
            if number % 2:
                plain, own = legs["plain"].seconds(), leg.seconds()
            else:
                own, plain = leg.seconds(), legs["plain"].seconds()
            ratios[name].append(own / plain)
            steps.append(plain[0] / options.tokens)
    print(json.dumps(describe()))
    print(f"plain: {1e3 * statistics.median(steps):.1f} ms a step, median of {len(steps)}")
    for name, found in ratios.items():
        clock, processor = np.median(found, axis=0) - 1
        low, high = np.quantile(np.array(found)[:, 1], [0.25, 0.75]) - 1
        print(
            f"{name}: {clock:+.1%} by the clock, {processor:+.1%} of the processor's time "
            f"(quartiles {low:+.1%}, {high:+.1%})"
        )


if __name__ == "__main__":
    main()
