"""Compiles the programs of continuous generation side by side, from the weights' shapes alone; cached.

On a mesh of D groups of devices (``qwen2_core.sharding``) every array of slots or prompts is that of all
groups, one group after the other. Each group has as many slots as the shape says, and reads a prompt of its
own at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from qwen2_core.compilation import AbstractParams, compiler_options, traced_apart
from qwen2_core.sampling import SamplingParams, abstract_sampling_params
from qwen2_core.sharding import ACTIVATIONS, ROWS, WHOLE, Layout, axes_of
from qwen2_core.steering import STEERING, Placed, abstract_steering
from qwen2_engine.decode_window import (
    NewSequence,
    SlotShape,
    Window,
    create_slots,
    empty_prompt,
    insert,
    prefill_prompt,
    run_window,
)
from qwen2_jax import QwenModel

_Jobs = dict[str, Callable[[], jax.stages.Compiled]]
_NO_INTERVENTIONS = AbstractParams.of(())
_WINDOW_AXES: Any = Window(ROWS, ROWS, ROWS, ROWS, ACTIVATIONS, ACTIVATIONS)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class PromptPrograms:
    """The executables that read prompts, by width; arguments and results are as of ``SlotPrograms``."""

    shape: SlotShape  # of one group; it reads only
    layout: Layout
    prefills: Mapping[int, jax.stages.Compiled]
    compile_seconds: float

    @property
    def all_slots(self) -> int:
        """Number of prompts that are read at once: one in each group."""
        return self.layout.data_parallel

    @property
    def working_bytes(self) -> int:
        """Bytes needed at most on a device at any time, besides the weights."""
        prompt = max(map(_result_bytes, self.prefills.values()))
        return prompt + max(_temporary_bytes(p) + _result_bytes(p) for p in self.prefills.values())


@dataclasses.dataclass(frozen=True)
class SlotPrograms:
    """The executables of one shape. ``insert`` and ``window`` take over the memory of the slots they are
    given.

    ========  ==============================================================================  ================
    program   arguments                                                                       results
    ========  ==============================================================================  ================
    create                                                                                    slots
    prefills  by width: params, input_ids [D, width], lengths [D]                             prompts, rows
    insert    slots, prompts, new sequences [D], sampling                                     slots
    window    params, slots, sampling                                                         slots, window
    ========  ==============================================================================  ================

    Where there are interventions, prefills and window have a last argument more: the steering of D prompts;
    the interventions.
    """

    shape: SlotShape  # of one group
    layout: Layout
    create: jax.stages.Compiled
    prefills: Mapping[int, jax.stages.Compiled]
    insert: jax.stages.Compiled
    window: jax.stages.Compiled
    compile_seconds: float

    @property
    def all_slots(self) -> int:
        """Number of slots of all groups."""
        return self.shape.slots * self.layout.data_parallel

    @property
    def idle_sampling(self) -> SamplingParams:
        """The sampling arguments of a window in which no slot is in use."""
        return abstract_sampling_params(self.shape.sampling)

    @property
    def working_bytes(self) -> int:
        """Bytes needed at most on a device at any time, besides the weights and the slots themselves."""
        window, results = _temporary_bytes(self.window), _result_bytes(self.window)
        prompt = max(_result_bytes(prefill) for prefill in self.prefills.values())
        return max(
            window + 2 * results + prompt,  # one window computes while the last one is copied out
            results + max(_temporary_bytes(p) + _result_bytes(p) for p in self.prefills.values()),
            results + prompt + _temporary_bytes(self.insert),
        )


def compile_slots(
    model: Any,
    params: Any,
    layout: Layout,
    shape: SlotShape,
    widths: tuple[int, ...],
    placed: tuple[Placed, ...] = (),
    compiling: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> SlotPrograms:
    """Compiles all that slots of one shape need for prompts padded to ``widths``, with these interventions.

    ``compiling(name)`` is entered around the compilation of each program, on threads.

    Raises:
        ValueError: a width beyond the shape's.
    """
    weights, steered = AbstractParams.of(params), AbstractParams.of(placed)
    jobs: _Jobs = {
        "empty slots": functools.partial(compile_create, model, shape, layout),
        "insert": functools.partial(compile_insert, model, shape, layout),
        "window": functools.partial(compile_window, model, shape, layout, weights, steered),
    }
    jobs |= _prefill_jobs(model, weights, layout, shape, widths, steered)
    (create, inserting, window, *prefills), seconds = _compile_all(jobs, compiling)
    return SlotPrograms(
        shape, layout, create, dict(zip(widths, prefills, strict=True)), inserting, window, seconds
    )


def compile_prompts(
    model: Any,
    params: Any,
    layout: Layout,
    shape: SlotShape,
    widths: tuple[int, ...],
    placed: tuple[Placed, ...] = (),
    compiling: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> PromptPrograms:
    """Compiles what reads prompts padded to ``widths``, as ``compile_slots`` does, and nothing else."""
    weights, steered = AbstractParams.of(params), AbstractParams.of(placed)
    jobs = _prefill_jobs(model, weights, layout, shape, widths, steered)
    prefills, seconds = _compile_all(jobs, compiling)
    return PromptPrograms(shape, layout, dict(zip(widths, prefills, strict=True)), seconds)


def _prefill_jobs(
    model: Any,
    weights: AbstractParams,
    layout: Layout,
    shape: SlotShape,
    widths: tuple[int, ...],
    steered: AbstractParams,
) -> _Jobs:
    if max(widths) > shape.prompt_width:
        raise ValueError(f"A prompt width of {max(widths)} exceeds the slots' {shape.prompt_width}.")
    return {
        f"prefill of width {width}": functools.partial(
            compile_prefill, model, shape.one_prompt, layout, weights, width, steered
        )
        for width in widths
    }


def _compile_all(
    jobs: _Jobs, compiling: Callable[[str], AbstractContextManager[Any]]
) -> tuple[list[jax.stages.Compiled], float]:
    """Does all jobs side by side; returns their programs in order, and the seconds that it took."""

    def compile_one(name: str) -> jax.stages.Compiled:
        with compiling(name):
            return jobs[name]()

    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles outside the GIL
        compiled = list(pool.map(compile_one, jobs))
    return compiled, time.perf_counter() - started


@functools.lru_cache(maxsize=64)
@traced_apart
def compile_create(model: QwenModel, shape: SlotShape, layout: Layout) -> jax.stages.Compiled:
    """Compiles the program that makes slots, all free."""
    axes = axes_of(_slots(model, shape))
    return layout.jit(functools.partial(create_slots, model, shape), (), axes).lower().compile()


@functools.lru_cache(maxsize=64)
@traced_apart
def compile_prefill(
    model: QwenModel,
    shape: SlotShape,
    layout: Layout,
    params: AbstractParams,
    width: int,
    placed: AbstractParams = _NO_INTERVENTIONS,
) -> jax.stages.Compiled:
    """Compiles the program that reads a prompt padded to ``width``."""
    steering = (abstract_steering(layout, placed.tree, 1),) if placed.tree else ()
    program = layout.jit(
        functools.partial(prefill_prompt, model, shape),
        in_axes=(WHOLE, ROWS, ROWS, *(STEERING for _ in steering)),
        out_axes=(axes_of(_prompt(model, shape)), ACTIVATIONS),
    )
    input_ids, lengths = layout.struct((1, width), jnp.int32, ROWS), layout.struct((1,), jnp.int32, ROWS)
    return _compile(program.lower(params.tree, input_ids, lengths, *steering))


@functools.lru_cache(maxsize=64)
@traced_apart
def compile_insert(model: QwenModel, shape: SlotShape, layout: Layout) -> jax.stages.Compiled:
    """Compiles the program that gives a free slot of each group a new sequence."""
    states = _slots(model, shape), _prompt(model, shape), _new_sequence(shape)
    program = layout.jit(
        insert,
        in_axes=(*map(axes_of, states), WHOLE),
        out_axes=axes_of(states[0]),
        donate_argnums=(0,),
    )
    return _compile(program.lower(*map(layout.structs, states), abstract_sampling_params(shape.sampling)))


@functools.lru_cache(maxsize=64)
@traced_apart
def compile_window(
    model: QwenModel,
    shape: SlotShape,
    layout: Layout,
    params: AbstractParams,
    placed: AbstractParams = _NO_INTERVENTIONS,
) -> jax.stages.Compiled:
    """Compiles the program that makes a window of steps of all slots."""
    slots, interventions = _slots(model, shape), (placed.tree,) if placed.tree else ()
    program = layout.jit(
        functools.partial(run_window, model, shape),
        in_axes=(WHOLE, axes_of(slots), WHOLE, *(WHOLE for _ in interventions)),
        out_axes=(axes_of(slots), _WINDOW_AXES),
        donate_argnums=(1,),
    )
    sampling = abstract_sampling_params(shape.sampling)
    return _compile(program.lower(params.tree, layout.structs(slots), sampling, *interventions))


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    return lowered.compile(compiler_options())  # pyright: ignore[reportArgumentType]


def _slots(model: QwenModel, shape: SlotShape) -> Any:
    return jax.eval_shape(functools.partial(create_slots, model, shape))


def _prompt(model: QwenModel, shape: SlotShape) -> Any:
    return jax.eval_shape(functools.partial(empty_prompt, model, shape))


def _new_sequence(shape: SlotShape) -> Any:
    one, strengths = jax.ShapeDtypeStruct((1,), jnp.int32), None
    if shape.interventions:
        strengths = jax.ShapeDtypeStruct((1, shape.interventions), jnp.float32)
    there, sequence_id = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.bool_, jnp.uint32))
    return NewSequence(one, one, there, sequence_id, one, strengths)  # pyright: ignore[reportArgumentType]


def _temporary_bytes(program: jax.stages.Compiled) -> int:
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes


def _result_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes of the results, without those that were updated in place."""
    memory: Any = program.memory_analysis()
    return memory.output_size_in_bytes - memory.alias_size_in_bytes
