"""Meshes of devices: ``eight_devices.py``, in a process that has eight. And how arrays lie on TPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from lively import Lively, pad_right

import device_mesh
import generate_jitted
import slot_programs
from continuous import WorkItem, generate_continuous
from generate_jitted import GenerateShape, compile_generate, generate_single_task_jitted

MODEL = Lively(layers=2, extract=(0, 1))


def test_generation_on_eight_devices():
    tests = Path(__file__).with_name("eight_devices.py")
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
    compiled = [
        getattr(slot_programs, f"_compile_{name}") for name in ("create", "prefill", "insert", "window")
    ]
    compiled.append(generate_jitted._compile)
    for cache in compiled:
        cache.cache_clear()
    monkeypatch.setattr(device_mesh, "_is_tpu", lambda sharding: sharding is not None)
    yield
    for cache in compiled:
        cache.cache_clear()


def generated(scan_layers: bool, prompts: int) -> list[Any]:
    """By one call and continuously: token ids, log-probabilities and activations."""
    model, params = MODEL.build(scan_layers=scan_layers)
    lists = MODEL.prompts((5, 9, 3)[:prompts])
    ids, lengths = pad_right(lists)
    out = generate_single_task_jitted(model, params, ids, 24, prompt_lengths=lengths, extract_prompt=True)
    items = [WorkItem(prompt, number, max_tokens=24) for number, prompt in enumerate(lists)]
    finished = sorted(
        generate_continuous(model, params, items, slots=2), key=lambda result: result.item.sequence_id
    )
    return [*jax.tree.leaves(out), *((result.token_ids, result.logprobs, result.rows) for result in finished)]


@pytest.mark.parametrize(("scan_layers", "prompts"), [(False, 1), (True, 3)], ids=["unrolled", "scanned"])
def test_the_order_of_the_state_in_memory_changes_nothing(
    scan_layers: bool, prompts: int, request: pytest.FixtureRequest
):
    expected = generated(scan_layers, prompts)
    request.getfixturevalue("orders_of_a_tpu")
    for ours, theirs in zip(
        jax.tree.leaves(generated(scan_layers, prompts)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    model, params = MODEL.build(scan_layers=scan_layers)
    program = compile_generate(model, params, GenerateShape(prompts, 9, 24, stop=False, capture_prompt=True))
    state = program.decode.input_formats[0][1]
    keys = jax.tree.leaves(state.cache.ar.k)[0].layout.major_to_minor
    assert keys == ((0, 1, 2, 4, 3) if scan_layers else (0, 1, 3, 2))
    assert state.activations.layout.major_to_minor == ((0, 2, 1, 3) if prompts == 1 else (0, 1, 2, 3))
