"""A small checkpoint, small puzzles and calls of the runner's command line, for the runner's tests."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lively import Lively, rewrite_json, row_errors

import distributed_kv_cached_inference
from activation_store import ActivationStore, verify_store
from arc_runner.data import EXAMPLE_MODEL
from arc_runner.predictions import Book
from distributed_kv_cached_inference import main
from qwen2_core.weights import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

REPOSITORY = Path(__file__).parents[2]
MODULES = Path(distributed_kv_cached_inference.__file__).parent  # of the checkout, or of an installed copy
PYTHON = [sys.executable, "-P"]  # without the modules of the current directory
COMMAND = [*PYTHON, "-m", "distributed_kv_cached_inference"]
TINY = EXAMPLE_MODEL
LAYERS = 2
ERROR = "distributed_kv_cached_inference.py: error: "
_SCRATCH = tempfile.TemporaryDirectory()


@functools.cache
def small_checkpoint() -> Path:
    """Two lively layers in float32, with the embedded tokenizer: compiles in a second. Not to be changed."""
    return copy_small(Path(_SCRATCH.name) / "small")


def copy_small(directory: Path) -> Path:
    """A copy of the small checkpoint to spoil."""
    Lively(layers=LAYERS, inner=128, vocab=512, seed=8).save(directory)
    for file in TINY.glob("*.json"):
        shutil.copyfile(file, directory / file.name)
    rewrite_json(directory / "config.json", num_hidden_layers=LAYERS, torch_dtype="float32")
    return directory


def puzzle(*cells: int) -> dict[str, Any]:
    """A valid task: turn a row around. Its prompt has about 50 tokens."""
    row = list(cells)
    return {
        "train": [{"input": [[1, 2]], "output": [[2, 1]]}],
        "test": [{"input": [row], "output": [row[::-1]]}],
    }


def write_tasks(file: Path, **tasks: Any) -> Path:
    file.write_text(json.dumps(tasks))
    return file


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def arguments(folder: Path | str, **flags: Any) -> list[str]:
    """Command line of a quick run that reads and writes in ``folder``; a flag that is None is left out.

    A list is a flag's several values, True a flag without value.
    """
    values = {
        "model_path": small_checkpoint(),
        "dataset_path": f"{folder}/tasks.json",
        "activations_dir": f"{folder}/activations",
        "output_filepath": f"{folder}/submission.json",
        "layers_to_extract": range(LAYERS),
        "grid_encoder": "MinimalGridEncoder()",
        "predictions_per_task": 2,
        "max_output_tokens": 8,
    }
    words: list[str] = []
    for name, value in (values | flags).items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, range | list):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def run_main(folder: Path | str, **flags: Any) -> Outcome:
    """``main`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments(folder, **flags))
    return Outcome(code, out.getvalue(), err.getvalue())


def four(folder: Path) -> Path:
    """Four puzzles that make one shape, ready to be run in ``folder``."""
    write_tasks(folder / "tasks.json", **{f"task-{i}": puzzle(*range(i, i + 3)) for i in range(4)})
    return folder


def run_four(folder: Path) -> Path:
    outcome = run_main(four(folder))
    assert (outcome.code, outcome.err) == (0, "")
    return folder


def assert_refused(outcome: Outcome, sentence: str) -> None:
    """Bad usage, told in one line."""
    assert outcome.code == 2
    assert outcome.err.startswith(ERROR)
    assert outcome.err.count("\n") == 1
    assert sentence in outcome.err, outcome.err


def run_python(script: str, *words: str) -> str:
    """What a script prints that is run in a process of its own, and sees the modules here."""
    process = start_python(script, *words)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


# The runner; as its n-th call or window begins, it says so and does something first.
RUNNER = """
import os, runpy, signal, sys, time
import jax
from qwen2_engine import continuous_batching
from arc_runner import loaded_model
settings, number, something = sys.argv[1:4]
exec(settings)
calls = []
def slow(owner, name):
    original = getattr(owner, name)
    def slowed(*args):
        calls.append(args)
        if len(calls) == int(number):
            print("here", file=sys.stderr, flush=True)
            exec(something)
        return original(*args)
    setattr(owner, name, slowed)
slow(loaded_model.LoadedModel, "generate")
slow(continuous_batching.RunningSlots, "_dispatch")
del sys.argv[1:4]
runpy.run_module("distributed_kv_cached_inference", run_name="__main__")
"""


def start_runner(call: int, something: str, *words: str, settings: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, where ``settings`` are executed before.

    ``something`` is executed as call or window number ``call`` begins, counted from 1.
    """
    return start_python(RUNNER, settings, str(call), something, *words)


def environment(*folders: str | Path) -> dict[str, str]:
    """The environment of a process that imports from ``folders``, then the modules that are tested here."""
    paths = [*folders, MODULES, Path(__file__).parent]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def start_python(script: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PYTHON, "-c", script, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def submission(folder: Path) -> bytes:
    return (folder / "submission.json").read_bytes()


def store_of(folder: Path) -> ActivationStore:
    return ActivationStore(folder / "activations")


def book(folder: Path) -> Book:
    """All predictions of a run's submission."""
    return Book.from_json(json.loads((folder / "submission.predictions.json").read_text())["tasks"])


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "submission.report.json").read_text())


def digests(folder: Path) -> dict[str, str]:
    """What was stored of each sequence, byte for byte, by key."""
    store = ActivationStore(folder / "activations")
    return {record.key: store.sequence_digest(record) for record in store.sequences()}


def assert_whole(folder: Path, expected: Path) -> None:
    """All is there once, and the answers are those of a run in one process."""
    assert digests(folder) == digests(expected)
    assert list(verify_store(store_of(folder))) == []
    assert submission(folder) == submission(expected)
    assert report(folder)["sequences"] == len(digests(expected))
    assert not report(folder)["stopped_early"]


def tokens(folder: Path) -> dict[tuple[str, int, str, int], list[int]]:
    """The generated tokens of each sequence, by its name."""
    store = ActivationStore(folder / "activations")
    return {
        (r.task_id, r.test_index, r.augmentation, r.sample_index): store.generated_tokens(r).tolist()
        for r in store.sequences()
    }


@functools.cache
def _plain_forward(checkpoint: Path, layers: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    config, params = load_qwen2(checkpoint, dtype="float32", scan_layers=True)  # soon compiled
    apply = jax.jit(create_model_with_hooks(config, layers).apply)
    return lambda ids: np.asarray(apply({"params": params}, ids)[2])


def plain_rows(checkpoint: Path, layers: tuple[int, ...], token_ids: np.ndarray) -> np.ndarray:
    """Rows [layers, tokens, hidden] of one sequence: a single forward pass in float32, no cache."""
    ids = np.zeros((1, -(-len(token_ids) // 64) * 64), np.int32)  # rows see no padding after them
    ids[0, : len(token_ids)] = token_ids
    return _plain_forward(checkpoint, layers)(ids)[:, : len(token_ids), 0]


def stored_row_errors(folder: Path, checkpoint: Path) -> Iterable[np.ndarray]:
    """Of each stored sequence, the relative error [layers, rows] of its rows against ``plain_rows``."""
    store = ActivationStore(folder / "activations")
    for record in store.sequences():
        token_ids = np.concatenate([store.prompt_token_ids(record), store.generated_tokens(record)])
        expected = plain_rows(checkpoint, store.layers, token_ids)[:, -record.n_rows :]
        yield row_errors(np.stack([store.rows(record, layer) for layer in store.layers]), expected)
