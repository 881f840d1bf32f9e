"""What a decode step of slots costs where samples of one prompt share its keys, and where each has a copy.

    python -m benchmarks.bench_shared_prompts [--slots 8 32] [--prompt 1000 4000] [--samples 8] [--layers 24]

Qwen2.5-0.5B's shape with random weights, layers 10 to 23 captured. Both ways run the same compiled window of
16 steps, by turns, on equal keys. Only the rows differ that the slots point at. Wall clock, and processor
seconds of all threads; then attention's share of them, in a program that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe
from kvcache_utils import KVCache
from qwen2_core.compilation import AbstractParams
from qwen2_core.config import QwenConfig
from qwen2_core.kernels.attention import attend_two_part
from qwen2_core.kernels.matmul import compiler_options
from qwen2_core.kernels.platforms import tracing_for
from qwen2_core.sampling import Sampling, sampling_params
from qwen2_core.sharding import Layout
from qwen2_engine import programs
from qwen2_engine.decode_window import SlotShape, SlotState, create_slots
from qwen2_jax_with_hooks import create_model_with_hooks

Rows = dict[str, np.ndarray]  # by way: the row of each slot's prompt


def random_weights(model: Any) -> Any:
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    block = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(model.config.dtype)
    return jax.tree.map(lambda leaf: jnp.asarray(np.resize(block, leaf.shape), leaf.dtype), shapes)


def slots_of(model: Any, shape: SlotShape, prompt: int, rows: np.ndarray) -> SlotState:
    """Slots in use, each at the first step of its answer; the keys of all prompts are the same numbers."""
    state = jax.jit(functools.partial(create_slots, model, shape))()
    length = jnp.full(shape.slots, prompt, jnp.int32)
    prefill = dataclasses.replace(state.cache.prefill, length=length)
    return dataclasses.replace(
        state,
        cache=KVCache(prefill, state.cache.ar, jnp.asarray(rows, jnp.int32)),
        ended=jnp.zeros(shape.slots, bool),
        limits=jnp.full(shape.slots, shape.max_tokens, jnp.int32),
    )


def by_turns(ways: dict[str, Callable[[], Any]], rounds: int, steps: int) -> dict[str, tuple[float, float]]:
    """Returns the median milliseconds of a step of each way: by the clock, and of the processors."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            spent = time.perf_counter() - clock, time.process_time() - processor
            if number:  # the first one warms up
                found[way].append(spent)
    return {
        way: tuple(statistics.median(part) / steps * 1e3 for part in zip(*times, strict=True))
        for way, times in found.items()
    }  # pyright: ignore[reportReturnType]


def windows(model: Any, params: Any, shape: SlotShape, prompt: int, rows: Rows) -> dict[str, Any]:
    compiled = programs.compile_window(model, shape, Layout(), AbstractParams.of(params))
    sampling = sampling_params(Sampling(), 0, (), model.config.vocab_size)
    states = {way: slots_of(model, shape, prompt, of_way) for way, of_way in rows.items()}

    def run(way: str) -> Any:
        states[way], window = compiled(params, states[way], sampling)
        return window

    return {way: functools.partial(run, way) for way in rows}


def attentions(model: Any, shape: SlotShape, prompt: int, rows: Rows) -> dict[str, Any]:
    """Of all layers, for one step."""
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    q = jnp.ones((shape.slots, heads, model.config.head_dim), model.config.dtype)

    def step(q: Any, cache: KVCache) -> Any:
        with tracing_for("cpu"):
            for layer in range(layers):
                q = attend_two_part(q, cache, layer)
        return q

    caches = {way: slots_of(model, shape, prompt, of_way).cache for way, of_way in rows.items()}
    compiled = jax.jit(step).lower(q, next(iter(caches.values()))).compile(compiler_options())
    return {way: functools.partial(compiled, q, cache) for way, cache in caches.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time decode steps of slots that share prompts.")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--prompt", type=int, nargs="+", default=[1000])
    parser.add_argument("--samples", type=int, default=8, help="slots that continue each prompt")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(describe()))
    config = QwenConfig(dtype=options.dtype, num_hidden_layers=options.layers)
    captured = [layer for layer in range(10, 24) if layer < options.layers]
    model = create_model_with_hooks(config, captured or [0])
    params = random_weights(model)
    for slots in options.slots:
        for prompt in options.prompt:
            room = 16 * (options.rounds + 2)
            shape = SlotShape(slots, prompt, room, shared_prompts=True)
            own = np.arange(slots)
            rows = {"copied": own, "shared": own // options.samples}
            for what, ways, steps in (
                ("step", windows(model, params, shape, prompt, rows), shape.window),
                ("its attention", attentions(model, shape, prompt, rows), 1),
            ):
                found = by_turns(ways, options.rounds if steps > 1 else 4 * options.rounds, steps)
                texts = [f"{way} {clock:.1f} ({cpu:.1f})" for way, (clock, cpu) in found.items()]
                print(f"{slots} slots, prompts of {prompt}: {what}: ms (processors'): {', '.join(texts)}")


if __name__ == "__main__":
    main()
