"""The executables of continuous generation, compiled side by side from the weights' shapes alone; cached."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from products import compiler_options
from qwen2_jax import QwenModel
from sampling import Sampling
from window_loop import SlotShape, create_slots, empty_prompt, insert, prefill_prompt, run_window


@dataclasses.dataclass(frozen=True)
class SlotPrograms:
    """The executables of one shape; each takes over the slots it is given and nothing else."""

    shape: SlotShape
    create: jax.stages.Compiled  # () -> slots
    prefills: Mapping[
        int, jax.stages.Compiled
    ]  # by width: (params, ids [1, width], length) -> (prompt, rows)
    insert: jax.stages.Compiled  # (slots, prompt, slot, sequence_id, limit, sampling, seed) -> slots
    window: jax.stages.Compiled  # (params, slots, sampling, seed, eos_ids) -> (slots, window)
    eos_slots: int
    compile_seconds: float

    @property
    def idle_drawing(self) -> tuple[Any, ...]:
        """The window's last arguments where no slot is in use."""
        return Sampling().traced(), np.uint32(0), np.full(self.eos_slots, -1, np.int32)

    @property
    def working_bytes(self) -> int:
        """The most that is needed at any time besides the weights and the slots themselves."""
        window, results = _temporary_bytes(self.window), _result_bytes(self.window)
        prompt = max(_result_bytes(prefill) for prefill in self.prefills.values())
        return max(
            window + 2 * results + prompt,  # one window computes while the last one is copied out
            results + max(_temporary_bytes(p) + _result_bytes(p) for p in self.prefills.values()),
            results + prompt + _temporary_bytes(self.insert),
        )


def compile_slots(
    model: QwenModel,
    params: Any,
    shape: SlotShape,
    widths: tuple[int, ...],
    *,
    capture_prompt: bool = False,
    eos_slots: int = 8,
) -> SlotPrograms:
    """Compiles all that slots of one shape need for prompts padded to ``widths``.

    Raises:
        ValueError: a width beyond the shape's.
    """
    if max(widths) > shape.prompt_width:
        raise ValueError(f"A prompt width of {max(widths)} exceeds the slots' {shape.prompt_width}.")
    leaves, treedef = jax.tree.flatten(params)
    abstract = tuple(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
        for leaf in leaves
    )
    weights = (treedef, abstract)
    # A prompt is read alone, whatever the slots and their windows.
    alone = SlotShape(1, shape.prompt_width, 1, cache_dtype=shape.cache_dtype)
    jobs: list[Callable[[], jax.stages.Compiled]] = [
        lambda: _compile_create(model, shape),  # pyright: ignore[reportArgumentType]
        lambda: _compile_insert(model, shape),  # pyright: ignore[reportArgumentType]
        functools.partial(_compile_window, model, shape, eos_slots, *weights),
        *(functools.partial(_compile_prefill, model, alone, w, capture_prompt, *weights) for w in widths),
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles outside the GIL
        create, inserting, window, *prefills = pool.map(lambda job: job(), jobs)
    seconds = time.perf_counter() - started
    by_width = dict(zip(widths, prefills, strict=True))
    return SlotPrograms(shape, create, by_width, inserting, window, eos_slots, seconds)


@functools.lru_cache(maxsize=64)
def _compile_create(model: QwenModel, shape: SlotShape) -> jax.stages.Compiled:
    return jax.jit(functools.partial(create_slots, model, shape)).lower().compile()


@functools.lru_cache(maxsize=64)
def _compile_prefill(
    model: QwenModel, shape: SlotShape, width: int, capture_prompt: bool, treedef: Any, leaves: Any
) -> jax.stages.Compiled:
    params = jax.tree.unflatten(treedef, leaves)
    program = jax.jit(functools.partial(prefill_prompt, model, shape, capture_prompt))
    return _compile(program.lower(params, jax.ShapeDtypeStruct((1, width), jnp.int32), _scalar(jnp.int32)))


@functools.lru_cache(maxsize=64)
def _compile_insert(model: QwenModel, shape: SlotShape) -> jax.stages.Compiled:
    prompt = jax.eval_shape(functools.partial(empty_prompt, model, shape))
    program = jax.jit(insert, donate_argnums=0)
    scalars = [_scalar(dtype) for dtype in (jnp.int32, jnp.uint32, jnp.int32)]
    seed = _scalar(jnp.uint32)
    return _compile(program.lower(_slots(model, shape), prompt, *scalars, Sampling().traced(), seed))


@functools.lru_cache(maxsize=64)
def _compile_window(
    model: QwenModel, shape: SlotShape, eos_slots: int, treedef: Any, leaves: Any
) -> jax.stages.Compiled:
    params = jax.tree.unflatten(treedef, leaves)
    program = jax.jit(functools.partial(run_window, model, shape.window), donate_argnums=1)
    drawing = (Sampling().traced(), _scalar(jnp.uint32), jax.ShapeDtypeStruct((eos_slots,), jnp.int32))
    return _compile(program.lower(params, _slots(model, shape), *drawing))


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    return lowered.compile(compiler_options())  # pyright: ignore[reportArgumentType]


def _slots(model: QwenModel, shape: SlotShape) -> Any:
    return jax.eval_shape(functools.partial(create_slots, model, shape))


def _scalar(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype)


def _temporary_bytes(program: jax.stages.Compiled) -> int:
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes


def _result_bytes(program: jax.stages.Compiled) -> int:
    """Of what is returned, but for what was updated in place."""
    memory: Any = program.memory_analysis()
    return memory.output_size_in_bytes - memory.alias_size_in_bytes
