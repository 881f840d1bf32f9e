"""Meshes of devices: ``eight_devices.py``, in a process that has eight. And how arrays lie on TPUs."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from lively import Lively, pad_right

import generate_jitted
from generate_jitted import GenerateShape, generate_single_task_jitted
from kvcache_utils import axes
from qwen2_core import sharding
from qwen2_core.sharding import axes_of
from qwen2_engine import ContinuousEngine, SequenceRequest, programs
from qwen2_jax_with_hooks import create_model_with_hooks

MODEL = Lively(layers=2, extract=(0, 1))


@pytest.mark.slow
def test_generation_on_eight_devices():
    tests = Path(__file__).parents[1] / "support" / "eight_devices.py"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-20000:]
    assert re.search(r"\b\d\d passed in", done.stdout), done.stdout
    assert "skipped" not in done.stdout


@pytest.fixture
def orders_of_a_tpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU can keep arrays as a TPU is told to."""
    compiled = [getattr(programs, f"compile_{name}") for name in ("create", "prefill", "insert", "window")]
    compiled.append(generate_jitted._compile)
    for cache in compiled:
        cache.cache_clear()
    monkeypatch.setattr(sharding, "_is_tpu", lambda sharding: sharding is not None)
    yield
    for cache in compiled:
        cache.cache_clear()


def by_one_call(model: Any, params: Any) -> list[Any]:
    """A single row, whose activations lie otherwise than those of several."""
    ids, lengths = pad_right(MODEL.prompts((9,)))
    out = generate_single_task_jitted(model, params, ids, 24, prompt_lengths=lengths)
    return jax.tree.leaves(out)


def continuously(model: Any, params: Any) -> list[Any]:
    prompts = MODEL.prompts((5, 9, 3))
    requests = [SequenceRequest(prompt, 24, sampling_id=i, id=i) for i, prompt in enumerate(prompts)]
    finished: list[Any] = list(ContinuousEngine(model, params, slots=2).run(requests))
    finished.sort(key=lambda one: one.id)
    return [array for one in finished for array in (one.token_ids, one.logprobs, one.rows)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan_layers", "generate"), [(False, by_one_call), (True, continuously)], ids=["unrolled", "scanned"]
)
def test_the_order_of_the_state_in_memory_changes_nothing(
    scan_layers: bool, generate: Callable, request: pytest.FixtureRequest
):
    model, params = MODEL.build(scan_layers=scan_layers)
    expected = generate(model, params)
    request.getfixturevalue("orders_of_a_tpu")
    arrays = generate(model, params)
    for ours, theirs in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    if generate is by_one_call:
        (activations,) = (array for array in arrays if array.ndim == 4)
        assert activations.format.layout.major_to_minor == (0, 2, 1, 3)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(("rows", "head_dim"), [(1, 64), (3, 64), (3, 128)])
def test_the_order_of_the_state_on_a_tpu(scan_layers: bool, rows: int, head_dim: int):
    """Slots last in the cache, as a head of less than 128 would be padded; hidden last in activations."""
    config = MODEL.config(scan_layers=scan_layers, hidden_size=MODEL.heads * head_dim)
    model = create_model_with_hooks(config, MODEL.extract)
    shape = GenerateShape(rows, 9, 24)
    of_state = axes_of(jax.eval_shape(lambda: generate_jitted._empty_state(model, shape)))
    *major, slots, head = range(5 if scan_layers else 4)
    keys = of_state.cache.ar.k if scan_layers else of_state.cache.ar.k[0]
    assert keys.tpu_order == (*major, *((slots, head) if head_dim == 128 else (head, slots)))
    assert of_state.activations.tpu_order == ((0, 2, 1, 3) if rows == 1 else (0, 1, 2, 3))


def test_a_field_that_declares_too_few_axes_is_an_error_and_not_split_along_the_wrong_one():
    @dataclasses.dataclass(frozen=True)
    class State:
        tokens: Any = dataclasses.field(metadata=axes("rows"))

    with pytest.raises(TypeError, match=r"an array of 2 axes is declared with the axes \('rows',\)"):
        axes_of(State(np.zeros((3, 4))))
