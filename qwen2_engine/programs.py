"""The executables of continuous generation, compiled side by side from the weights' shapes alone; cached.

On a mesh of D groups of devices (``device_mesh``) every array of slots or prompts is that of all groups, one
group after the other; each has as many slots as the shape says, and reads a prompt of its own at a time.
"""

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

from qwen2_core.kernels.matmul import compiler_options
from qwen2_core.sampling import Sampling
from qwen2_core.sharding import ACTIVATIONS, ROWS, WHOLE, Layout, axes_of, layout_of
from qwen2_engine.decode_window import (
    SlotShape,
    Window,
    create_slots,
    empty_prompt,
    insert,
    prefill_prompt,
    run_window,
)
from qwen2_jax import QwenModel

_WINDOW_AXES: Any = Window(ROWS, ROWS, ROWS, ROWS, ACTIVATIONS)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class SlotPrograms:
    """The executables of one shape; each takes over the slots it is given and nothing else."""

    shape: SlotShape  # of one group
    layout: Layout
    create: jax.stages.Compiled  # () -> slots
    prefills: Mapping[
        int, jax.stages.Compiled
    ]  # by width: (params, ids [D, width], lengths [D]) -> (prompts, rows)
    # (slots, prompts, slot [D] within each group or -1, sequence_id [D], limit [D], sampling, seed) -> slots
    insert: jax.stages.Compiled
    window: jax.stages.Compiled  # (params, slots, sampling, seed, eos_ids) -> (slots, window)
    eos_slots: int
    compile_seconds: float

    @property
    def idle_drawing(self) -> tuple[Any, ...]:
        """The window's last arguments where no slot is in use."""
        return Sampling().traced(), np.uint32(0), np.full(self.eos_slots, -1, np.int32)

    @property
    def all_slots(self) -> int:
        """Of all groups."""
        return self.shape.slots * self.layout.groups

    @property
    def working_bytes(self) -> int:
        """The most that is needed on a device at any time besides the weights and the slots themselves."""
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
    weights, layout = (treedef, abstract), layout_of(model.config, params)
    # A prompt is read alone, whatever the slots and their windows.
    alone = SlotShape(1, shape.prompt_width, 1, cache_dtype=shape.cache_dtype)
    jobs: list[Callable[[], jax.stages.Compiled]] = [
        lambda: _compile_create(model, shape, layout),  # pyright: ignore[reportArgumentType]
        lambda: _compile_insert(model, shape, layout),  # pyright: ignore[reportArgumentType]
        functools.partial(_compile_window, model, shape, eos_slots, *weights),
        *(functools.partial(_compile_prefill, model, alone, w, capture_prompt, *weights) for w in widths),
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles outside the GIL
        create, inserting, window, *prefills = pool.map(lambda job: job(), jobs)
    seconds = time.perf_counter() - started
    by_width = dict(zip(widths, prefills, strict=True))
    return SlotPrograms(shape, layout, create, by_width, inserting, window, eos_slots, seconds)


@functools.lru_cache(maxsize=64)
def _compile_create(model: QwenModel, shape: SlotShape, layout: Layout) -> jax.stages.Compiled:
    slots = _slots(model, shape)
    return layout.jit(functools.partial(create_slots, model, shape), (), axes_of(slots)).lower().compile()


@functools.lru_cache(maxsize=64)
def _compile_prefill(
    model: QwenModel, shape: SlotShape, width: int, capture_prompt: bool, treedef: Any, leaves: Any
) -> jax.stages.Compiled:
    params = jax.tree.unflatten(treedef, leaves)
    layout = layout_of(model.config, params)
    program = layout.jit(
        functools.partial(prefill_prompt, model, shape, capture_prompt),
        in_axes=(WHOLE, ROWS, ROWS),
        out_axes=(axes_of(_prompt(model, shape)), ACTIVATIONS),
    )
    input_ids, lengths = layout.struct((1, width), jnp.int32, ROWS), layout.struct((1,), jnp.int32, ROWS)
    return _compile(program.lower(params, input_ids, lengths))


@functools.lru_cache(maxsize=64)
def _compile_insert(model: QwenModel, shape: SlotShape, layout: Layout) -> jax.stages.Compiled:
    slots, prompt = _slots(model, shape), _prompt(model, shape)
    program = layout.jit(
        insert,
        in_axes=(axes_of(slots), axes_of(prompt), ROWS, ROWS, ROWS, WHOLE, WHOLE),
        out_axes=axes_of(slots),
        donate_argnums=(0,),
    )
    by_group = [layout.struct((1,), dtype, ROWS) for dtype in (jnp.int32, jnp.uint32, jnp.int32)]
    drawing = (Sampling().traced(), layout.struct((), jnp.uint32))
    return _compile(program.lower(layout.structs(slots), layout.structs(prompt), *by_group, *drawing))


@functools.lru_cache(maxsize=64)
def _compile_window(
    model: QwenModel, shape: SlotShape, eos_slots: int, treedef: Any, leaves: Any
) -> jax.stages.Compiled:
    params = jax.tree.unflatten(treedef, leaves)
    layout, slots = layout_of(model.config, params), _slots(model, shape)
    program = layout.jit(
        functools.partial(run_window, model, shape.window),
        in_axes=(WHOLE, axes_of(slots), WHOLE, WHOLE, WHOLE),
        out_axes=(axes_of(slots), _WINDOW_AXES),
        donate_argnums=(1,),
    )
    eos_token_ids = layout.struct((eos_slots,), jnp.int32)
    drawing = (Sampling().traced(), layout.struct((), jnp.uint32), eos_token_ids)
    return _compile(program.lower(params, layout.structs(slots), *drawing))


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    return lowered.compile(compiler_options())  # pyright: ignore[reportArgumentType]


def _slots(model: QwenModel, shape: SlotShape) -> Any:
    return jax.eval_shape(functools.partial(create_slots, model, shape))


def _prompt(model: QwenModel, shape: SlotShape) -> Any:
    return jax.eval_shape(functools.partial(empty_prompt, model, shape))


def _temporary_bytes(program: jax.stages.Compiled) -> int:
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes


def _result_bytes(program: jax.stages.Compiled) -> int:
    """Of what is returned, but for what was updated in place."""
    memory: Any = program.memory_analysis()
    return memory.output_size_in_bytes - memory.alias_size_in_bytes
