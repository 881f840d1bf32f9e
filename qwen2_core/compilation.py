"""Compiles programs from the weights' shapes alone, under the JAX settings that results are defined under.

JAX's settings belong to the user's process: environment variables, ``jax.config``, ``with`` blocks. Numbers
must not depend on them in silence. So all that is traced, compiled or run here is held to the values that
``defined_settings`` names. What cannot be held is refused by ``check_settings``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.core import Tracer

from qwen2_core.kernels.matmul import compiler_options

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Settings that no `with` block can change, and the values that results are defined under.
_FIXED = {
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_memory_fitting_effort": 0.0,
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
}
_FAST_MATH = "xla_cpu_enable_fast_math"
_FIXED_ON_A_MESH = {"jax_use_shardy_partitioner": True}


@contextlib.contextmanager
def defined_settings() -> Iterator[None]:
    """Holds this thread to the JAX settings that results are defined under, whatever the user's are.

    Usable as a decorator too. Not around a ``yield``: the caller would see them.
    """
    with contextlib.ExitStack() as stack:
        for setting in (
            jax.enable_x64(False),
            jax.disable_jit(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.default_matmul_precision(None),
            jax.default_prng_impl("threefry2x32"),
            jax.threefry_partitionable(True),
            jax.legacy_prng_key("allow"),
            jax.allow_f16_reductions(True),
            jax.debug_infs(False),  # a score of minus infinity is how attention leaves out a key
            jax.debug_key_reuse(False),
            jax.transfer_guard("allow"),
            jax.thread_guard(False),
        ):
            stack.enter_context(setting)
        yield


@contextlib.contextmanager
def program_settings() -> Iterator[None]:
    """Holds this thread to ``defined_settings`` and leaves the search for NaN to ``raise_on_nan``.

    JAX's own would keep the memory of donated buffers, and say nothing that a reader understands.
    """
    with defined_settings(), jax.debug_nans(False):
        yield


def raise_on_nan(values: Any) -> None:
    """Does for a pytree of arrays what the user's ``jax_debug_nans`` asks for.

    They are the log-probabilities of generated tokens, all NaN where a logit is, or what was made of prompts.

    Raises:
        FloatingPointError: it is set, and one of them is NaN.
    """
    if jax.config.values["jax_debug_nans"] and any(
        np.isnan(to_host(array)).any() for array in jax.tree.leaves(values)
    ):
        raise FloatingPointError(
            "Generation computed NaN, which jax_debug_nans looks for; are the weights finite?"
        )


def traced_apart(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a function that traces and compiles run in a thread of its own, under ``program_settings``.

    There it sees none of the caller's ``with`` blocks: meshes, transformations, flax interceptors. So the
    programs that it returns may be kept for other callers.
    """

    def apart(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with (
            program_settings(),
            jax.check_tracer_leaks(False),
            jax.no_tracing(False),
            jax.default_device(None),
        ):
            return function(*args, **kwargs)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(apart, *args, **kwargs).result()

    return call


@defined_settings()
def to_host(array: Any) -> np.ndarray:
    """Copies an array to the host, also where the user's transfer guard forbids it."""
    return np.asarray(array)


def check_settings(*, mesh: bool = False) -> None:
    """Checks the settings of JAX that nobody but the user can change.

    Args:
        mesh: whether programs are split over several devices.

    Raises:
        ValueError: one sentence that names the setting, its value and the value it must have.
    """
    for name, needed in (_FIXED | (_FIXED_ON_A_MESH if mesh else {})).items():
        value = jax.config.values.get(name, needed)
        value = getattr(value, "name", value)
        if value != needed:
            raise ValueError(
                f"JAX's setting {name} is {value!r}, with which results may differ; leave it at {needed!r} "
                f"(jax.config.update, or the environment variable {name.upper()})."
            )
    said = re.findall(rf"{_FAST_MATH}(?:=(\S*))?(?!\S)", os.environ.get("XLA_FLAGS", ""))
    if said and said[-1].lower() not in ("false", "0", "f", "n", "no"):
        raise ValueError(
            f"XLA_FLAGS sets {_FAST_MATH}, with which the bytes of rows differ; start again without it."
        )


@defined_settings()
def check_surroundings(*arguments: Any) -> None:
    """Checks that programs can be compiled and run where this is called, with these arguments.

    Raises:
        ValueError: one sentence: inside a JAX transformation, inside ``flax.linen.intercept_methods``, with
            deleted arrays, or as ``check_settings``.
    """
    leaves = jax.tree.leaves(arguments)
    # Within jit, also constants are tracers.
    if any(isinstance(leaf, Tracer) for leaf in (*leaves, jax.device_put(np.zeros(())))):
        raise ValueError(
            "Generation compiles and runs programs of its own, so it cannot be called inside jax.jit, vmap, "
            "grad or eval_shape: call it outside of them, or put model.apply there."
        )
    if getattr(nn.module, "_global_interceptor_stack", None):
        raise ValueError(
            "Generation runs programs that were compiled without interceptors, so it cannot be called inside "
            "flax.linen.intercept_methods: call it outside, or put model.apply there."
        )
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        raise ValueError(
            "The parameters (or another argument) were deleted, for instance donated to a jitted function; "
            "load them again, or keep a copy."
        )
    check_settings()


@dataclasses.dataclass(frozen=True)
class AbstractParams:
    """Shapes, dtypes and places of a parameter tree; hashable, so that programs can be cached by it."""

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, params: Any) -> AbstractParams:
        """Describes a tree of arrays, or of ``jax.ShapeDtypeStruct``."""
        leaves, treedef = jax.tree.flatten(params)
        structs = (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
            for leaf in leaves
        )
        return cls(treedef, tuple(structs))

    @property
    def tree(self) -> Any:
        """The tree, with ``jax.ShapeDtypeStruct`` leaves."""
        return jax.tree.unflatten(self.treedef, self.leaves)


def compile_all(lowered: Iterable[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
    """Compiles traced programs side by side; XLA compiles outside the GIL."""
    options = compiler_options()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: program.compile(options), lowered))
