"""A store has the same bytes under whatever settings JAX is started with, or the run is refused by name."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runner_cases import COMMAND, ERROR, arguments, digests, environment, puzzle, write_tasks

# Sampled, so that random numbers show; prompts too, so that every row of the model does.
FLAGS = {"max_output_tokens": 8, "predictions_per_task": 2, "temperature": 1.0, "extract_prompt": True}
SAME = [
    "JAX_ENABLE_X64=1",
    "JAX_DISABLE_JIT=1",
    "JAX_NUMPY_DTYPE_PROMOTION=strict",
    "JAX_NUMPY_RANK_PROMOTION=raise",
    "JAX_DEFAULT_MATMUL_PRECISION=bfloat16",
    "JAX_DEFAULT_PRNG_IMPL=rbg",
    "JAX_THREEFRY_PARTITIONABLE=0",
    "JAX_DEBUG_NANS=1 JAX_CHECK_TRACER_LEAKS=1",
    "JAX_TRANSFER_GUARD=disallow JAX_ENABLE_CHECKS=1",
    "JAX_RANDOM_SEED_OFFSET=7 JAX_USE_SHARDY_PARTITIONER=0 JAX_HIGH_DYNAMIC_RANGE_GUMBEL=1",
]
REFUSED = "JAX_DISABLE_MOST_OPTIMIZATIONS=1"


def run(folder: Path, settings: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder.mkdir()
    write_tasks(folder / "tasks.json", one=puzzle(1, 2, 3))
    changes = dict(word.split("=") for word in settings.split())
    command = [*COMMAND, *arguments(folder, **FLAGS)]
    done = subprocess.run(
        command, env=environment() | changes, capture_output=True, text=True, timeout=400, check=False
    )
    return folder, done


@pytest.mark.slow
def test_the_store_is_the_same_under_each_setting_of_jax_or_the_run_is_refused(tmp_path: Path):
    by_default, done = run(tmp_path / "default", "")
    assert done.returncode == 0, done.stderr
    expected = digests(by_default)
    assert len(set(expected.values())) == 2
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda n: run(tmp_path / str(n), [*SAME, REFUSED][n]), range(len(SAME) + 1)))
    for settings, (folder, done) in zip(SAME, runs, strict=False):
        assert done.returncode == 0, (settings, done.stderr[-2000:])
        assert digests(folder) == expected, settings
    folder, done = runs[-1]
    assert done.returncode == 2
    assert done.stderr.startswith(f"{ERROR}JAX's setting jax_disable_most_optimizations is True")
    assert done.stderr.count("\n") == 1
    assert not (folder / "activations").exists()
