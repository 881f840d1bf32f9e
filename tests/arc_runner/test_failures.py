"""A run that fails while it generates ends in one sentence and an exit code, never in a traceback."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from runner_cases import (
    ERROR,
    digests,
    puzzle,
    run_main,
    write_tasks,
)

from arc_runner.loaded_model import LoadedModel
from qwen2_engine import ContinuousEngine

DONE, TASKS_FAILED, RESUMABLE = 0, 1, 75


@pytest.mark.parametrize("generation", ["continuous", "task"])
def test_a_device_that_runs_out_of_memory_ends_the_run_in_a_sentence(
    generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))

    def generate(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nframe 1")

    monkeypatch.setattr(LoadedModel, "compile", lambda _, calls: len(calls))
    monkeypatch.setattr(LoadedModel, "generate", generate)
    monkeypatch.setattr(ContinuousEngine, "start", generate)
    outcome = run_main(tmp_path, generation=generation)
    assert outcome.code == RESUMABLE
    assert outcome.err == (
        f"{ERROR}the device failed (RESOURCE_EXHAUSTED: 9 GB); the same command continues, with a smaller "
        "--batch_size if memory ran out\n"
    )


@contextlib.contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_the_run_and_the_same_command_continues(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", **{f"task-{i}": puzzle(i, i) for i in range(3)})
    with files_up_to(8_192):  # a shard has 14 KB
        outcome = run_main(tmp_path)
    assert outcome.code == RESUMABLE
    assert outcome.err.startswith(f"{ERROR}cannot write host-00000/shard-000000.safetensors in ")
    assert outcome.err.endswith("; the same command continues\n")
    assert outcome.err.count("\n") == 1
    assert run_main(tmp_path).code == DONE
    assert len(digests(tmp_path)) == 6
