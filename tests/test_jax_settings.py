"""A store has the same bytes under whatever settings JAX is started with, or the run is refused by name."""

from __future__ import annotations

import subprocess
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


def run(folder: Path, settings: str = "") -> subprocess.CompletedProcess[str]:
    write_tasks(folder / "tasks.json", one=puzzle(1, 2, 3))
    changes = dict(word.split("=") for word in settings.split())
    return subprocess.run(
        [*COMMAND, *arguments(folder, **FLAGS)],
        env=environment() | changes,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def by_default(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("default")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    stored = digests(folder)
    assert len(set(stored.values())) == 2
    return stored


@pytest.mark.slow
@pytest.mark.parametrize("settings", SAME)
def test_the_store_has_the_same_bytes_under_a_setting_of_jax(
    tmp_path: Path, by_default: dict[str, str], settings: str
):
    done = run(tmp_path, settings)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path) == by_default


@pytest.mark.slow
def test_a_run_under_a_setting_that_may_change_bytes_is_refused_by_name(tmp_path: Path):
    done = run(tmp_path, "JAX_DISABLE_MOST_OPTIMIZATIONS=1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{ERROR}JAX's setting jax_disable_most_optimizations is True")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "activations").exists()
