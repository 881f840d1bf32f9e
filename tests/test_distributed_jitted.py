"""The runner end to end: what it stores is what the model computes, once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lively import rewrite_json
from runner_cases import (
    COMMAND,
    TINY,
    arguments,
    assert_refused,
    book,
    copy_small,
    digests,
    environment,
    four,
    puzzle,
    report,
    run_four,
    run_main,
    small_checkpoint,
    store_of,
    stored_row_errors,
    submission,
    tokens,
    write_tasks,
)

import generate_jitted
from activation_store import ActivationStore, verify_coverage, verify_store
from activation_store.replay import replay_store
from arc_runner import continuous_loop
from arc_runner.loaded_model import LoadedModel
from arc_runner.report import FIGURES
from qwen2_engine import ContinuousEngine
from qwen2_jax_with_hooks import FIXED_EXTRACT_LAYERS

DONE = 0
FLOAT32_ERROR = 1e-4
BFLOAT16_ERROR = 0.1  # a lively model's own rounding in other orders of summation


# --- What is stored -----------------------------------------------------------------------------------------


def test_arc_task_with_jitted_generation(finished: Path, tmp_path: Path):
    """A compiled call for an ARC task leaves its answers and tokens, as continuous generation does."""
    assert run_main(four(tmp_path), n_tasks=1, generation="task").code == DONE
    answers = json.loads(submission(tmp_path))
    assert answers == {"task-0": json.loads(submission(finished))["task-0"]}
    assert [list(attempts) for attempts in answers["task-0"]] == [["attempt_1", "attempt_2"]]
    assert tokens(tmp_path) == {
        name: of_one for name, of_one in tokens(finished).items() if name[0] == "task-0"
    }
    assert report(tmp_path)["programs"] == 1


def test_activation_extraction_and_save(tmp_path: Path):
    """Each generated token has a stored row in each of layers 10-23, as a plain forward pass gives it.

    Of the embedded model and puzzles, with the default layers.
    """
    outcome = run_main(
        tmp_path,
        model_path=None,
        dataset_path=None,
        layers_to_extract=None,
        n_tasks=1,
        predictions_per_task=4,
        max_output_tokens=12,
        dtype="float32",
    )
    assert (outcome.code, outcome.err) == (DONE, "")
    store = store_of(tmp_path)
    assert store.layers == FIXED_EXTRACT_LAYERS
    records = list(store.sequences())
    assert sorted(r.augmentation for r in records) == ["identity", "rot180", "rot270", "rot90"]
    generated = [store.generated_tokens(r) for r in records]
    assert len({token for of_one in generated for token in of_one.tolist()}) > 7  # no model that repeats one
    for record in records:
        assert record.n_rows == record.generated_length
        for layer in store.layers:
            assert store.rows(record, layer).shape == (record.generated_length, 64)
            assert store.rows(record, layer).dtype == np.float32
    for errors in stored_row_errors(tmp_path, TINY):
        assert errors.max() < FLOAT32_ERROR
    assert list(verify_store(store)) == []


def test_every_augmentation_of_every_task_is_stored_and_the_store_verifies(finished: Path):
    store = store_of(finished)
    assert list(verify_store(store)) == []
    assert list(verify_coverage(store, [(f"task-{i}", 0) for i in range(4)])) == []
    assert set(tokens(finished)) == {
        (f"task-{i}", 0, augmentation, 0) for i in range(4) for augmentation in ("identity", "rot90")
    }
    for errors in stored_row_errors(finished, small_checkpoint()):
        assert errors.max() < FLOAT32_ERROR


def test_the_submission_has_two_attempts_at_each_test_and_the_predictions_are_all_kept(finished: Path):
    answers = json.loads(submission(finished))
    assert list(answers) == [f"task-{i}" for i in range(4)]
    for tests in answers.values():
        assert [list(attempts) for attempts in tests] == [["attempt_1", "attempt_2"]]
    kept = [one for _, _, one in book(finished).predictions()]
    assert {one.key for one in kept} == set(digests(finished))
    assert {one.augmentation for one in kept} == {"identity", "rot90"}


WITH_PROMPT = {"extract_prompt": True, "temperature": 1}  # two samples of one prompt


def test_prompt_rows_are_stored_on_request(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    assert run_main(tmp_path, **WITH_PROMPT).code == DONE
    first, second = store_of(tmp_path).sequences()
    assert first.n_rows == first.prompt_length + first.generated_length
    assert second.n_rows == second.generated_length  # its prompt is the first one's
    for errors in stored_row_errors(tmp_path, small_checkpoint()):
        assert errors.max() < FLOAT32_ERROR


def test_without_capture_the_tokens_are_the_same_and_no_layer_is_stored(finished: Path, tmp_path: Path):
    # Layers that the model does not have are nobody's business then.
    flags = {"no_extract_activations": True, "layers_to_extract": [40]}
    assert run_main(four(tmp_path), **flags).code == DONE
    assert store_of(tmp_path).layers == ()
    assert tokens(tmp_path) == tokens(finished)


@pytest.mark.slow
def test_bfloat16_has_a_float32_stream_and_a_store_of_another_rounding_is_not_continued(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    wide, narrow = {"dtype": "bfloat16"}, {"dtype": "bfloat16", "residual_dtype": "bfloat16"}
    for folder, flags in (("wide", wide), ("narrow", narrow)):
        directory = tmp_path / folder
        assert run_main(tmp_path, activations_dir=directory, **flags).code == DONE
        store = ActivationStore(directory)
        assert store.settings.residual_dtype == ("float32" if flags is wide else "")
        assert list(replay_store(store, str(small_checkpoint()), count=2)) == []
        other = narrow if flags is wide else wide
        refused = run_main(tmp_path, activations_dir=directory, **other)
        assert_refused(refused, f"--residual_dtype {store.settings.residual_dtype or 'bfloat16'}")
        assert run_main(tmp_path, activations_dir=directory, **flags).code == DONE
    keys = [set(ActivationStore(tmp_path / folder).index) for folder in ("wide", "narrow")]
    assert not keys[0] & keys[1]
    bad = run_main(tmp_path, residual_dtype="bfloat16")
    assert_refused(bad, "--residual_dtype must be float32 or the dtype of the weights, float32, not bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "dtype", "bound"),
    [
        ({"dtype": "bfloat16"}, "bfloat16", BFLOAT16_ERROR),
        ({"kv_cache_dtype": "bfloat16"}, "float32", BFLOAT16_ERROR),
    ],
    ids=["weights", "cache"],
)
def test_bfloat16_rows_are_within_its_rounding_of_float32_rows(
    flags: dict[str, Any], dtype: str, bound: float, tmp_path: Path
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    assert run_main(tmp_path, **flags).code == DONE
    assert store_of(tmp_path).dtype.name == dtype
    errors = np.concatenate([e.ravel() for e in stored_row_errors(tmp_path, small_checkpoint())])
    assert FLOAT32_ERROR < errors.max() < bound


@pytest.mark.slow
def test_the_uncompiled_python_loop_stores_the_same_tokens_and_rows(finished: Path, tmp_path: Path):
    flags = {"generation": "python", "n_tasks": 1, "predictions_per_task": 1, "max_output_tokens": 1}
    assert run_main(four(tmp_path), **flags).code == DONE
    ((name, of_one),) = tokens(tmp_path).items()
    assert of_one == tokens(finished)[name][:1]
    for errors in stored_row_errors(tmp_path, small_checkpoint()):
        assert errors.max() < FLOAT32_ERROR
    assert report(tmp_path)["programs"] == 0


# --- Sequences that must not be confused --------------------------------------------------------------------


def test_two_tasks_with_one_prompt_are_two_sequences(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", one=puzzle(1, 2), two=puzzle(1, 2))
    assert run_main(tmp_path, predictions_per_task=1).code == DONE
    by_task = tokens(tmp_path)
    assert len(by_task) == len(digests(tmp_path)) == 2
    assert by_task["one", 0, "identity", 0] == by_task["two", 0, "identity", 0]  # greedy

    sampled = tmp_path / "sampled"
    sampled.mkdir()
    flags = {"dataset_path": tmp_path / "tasks.json", "temperature": 1, "predictions_per_task": 1}
    assert run_main(sampled, **flags).code == DONE
    by_task = tokens(sampled)
    assert by_task["one", 0, "identity", 0] != by_task["two", 0, "identity", 0]


def test_samples_differ_and_do_not_depend_on_what_runs_beside_them(tmp_path: Path):
    sampled = {}
    for batch_size in (8, 1):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        write_tasks(folder / "tasks.json", task=puzzle(1, 2))
        flags = {"temperature": 1.0, "predictions_per_task": 4, "augmentations": 2, "batch_size": batch_size}
        assert run_main(folder, **flags).code == DONE
        sampled[batch_size] = tokens(folder)
    assert len({tuple(of_one) for of_one in sampled[8].values()}) == len(sampled[8]) == 4
    assert sampled[1] == sampled[8]


def test_another_seed_gives_other_samples(tmp_path: Path):
    sampled = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_tasks(folder / "tasks.json", task=puzzle(1, 2))
        flags = {"temperature": 1.0, "predictions_per_task": 1, "random_seed": seed}
        assert run_main(folder, **flags).code == DONE
        sampled.append(tokens(folder))
    assert sampled[0] != sampled[1]


# --- The figures of the report ------------------------------------------------------------------------------


def test_the_reports_figures_are_those_of_the_store(finished: Path):
    figures, store = report(finished), store_of(finished)
    records = list(store.sequences())
    shards = (finished / "activations").glob("host-*/shard-*")
    assert figures["tasks"] == 4
    assert figures["sequences"] == len(records) == 8
    assert figures["tokens_generated"] == sum(record.generated_length for record in records)
    assert figures["bytes_stored"] == sum(shard.stat().st_size for shard in shards)
    assert figures["programs"] == 1
    assert figures["tokens_per_second"] == figures["tokens_generated"] / figures["generate_seconds"]


def test_a_second_run_makes_nothing_and_leaves_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_four(tmp_path)
    before, worked = (digests(tmp_path), submission(tmp_path)), report(tmp_path)
    monkeypatch.setattr(LoadedModel, "load", lambda *_: pytest.fail("there is nothing to load the model for"))
    outcome = run_main(tmp_path)
    assert outcome.code == DONE
    assert "8 of them done already\n" in outcome.out
    assert (digests(tmp_path), submission(tmp_path)) == before
    figures = report(tmp_path)
    assert (figures["sequences"], figures["sequences_resumed"]) == (8, 8)
    assert {name: figures[name] for name in FIGURES} == {name: worked[name] for name in FIGURES}
    assert figures["tokens_per_second"] == worked["tokens_per_second"] > 0


def test_finished_sequences_are_committed_once_they_have_waited_long_enough(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert len(list((finished / "activations").glob("host-*/shard-*"))) == 1
    monkeypatch.setattr(continuous_loop, "SHARD_SECONDS", 0.0)
    run_four(tmp_path)
    assert len(list((tmp_path / "activations").glob("host-*/shard-*"))) == 8
    assert digests(tmp_path) == digests(finished)


def test_a_continued_run_counts_only_what_it_added(finished: Path, tmp_path: Path):
    four(tmp_path)
    assert run_main(tmp_path, n_tasks=3).code == DONE
    first = report(tmp_path)
    assert run_main(tmp_path, n_tasks=99).code == DONE  # as many as there are
    second = report(tmp_path)
    assert (second["tasks"], second["sequences"], second["sequences_resumed"]) == (4, 8, 6)
    added = [r for r in store_of(tmp_path).sequences() if r.task_id == "task-3"]
    assert second["tokens_generated"] == sum(record.generated_length for record in added)
    shards = (tmp_path / "activations").glob("host-*/shard-*")
    assert first["bytes_stored"] + second["bytes_stored"] == sum(shard.stat().st_size for shard in shards)
    assert submission(tmp_path) == submission(finished)


def test_sequences_that_are_computed_again_are_neither_stored_nor_counted_twice(
    finished: Path, tmp_path: Path
):
    # In calls of one sequence the first of two is made; in calls of two it is computed beside the other.
    assert run_main(four(tmp_path), n_tasks=1, predictions_per_task=1, batch_size=1).code == DONE
    assert run_main(tmp_path, n_tasks=1).code == DONE
    assert report(tmp_path)["sequences_resumed"] == 1
    added = [r for r in store_of(tmp_path).sequences() if r.augmentation == "rot90"]
    assert len(store_of(tmp_path)) == 2
    assert report(tmp_path)["tokens_generated"] == added[0].generated_length
    wanted = {name: of_one for name, of_one in tokens(finished).items() if name[0] == "task-0"}
    assert tokens(tmp_path) == wanted


def test_the_time_of_compiling_a_stage_is_not_counted_as_time_of_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start = ContinuousEngine.start
    monkeypatch.setattr(ContinuousEngine, "start", lambda *args: (time.sleep(1), start(*args))[1])
    started = time.perf_counter()
    assert run_main(four(tmp_path)).code == DONE
    wall = time.perf_counter() - started
    figures = report(tmp_path)
    assert figures["compile_seconds"] > 1
    assert sum(figures[f"{phase}_seconds"] for phase in ("load", "compile", "generate")) < wall


@pytest.fixture
def compiled_in_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each call of the model, how many shapes it compiled."""
    counts = []
    generate = LoadedModel.generate

    def counted(self: LoadedModel, call: Any) -> Any:
        before = generate_jitted._compile.cache_info().misses
        generation = generate(self, call)
        counts.append(generate_jitted._compile.cache_info().misses - before)
        return generation

    monkeypatch.setattr(LoadedModel, "generate", counted)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("flags", [WITH_PROMPT, {"no_extract_activations": True}], ids=str)
def test_everything_is_compiled_before_the_clock_of_generation_starts(
    flags: dict[str, Any], compiled_in_calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compile_shapes = LoadedModel.compile
    monkeypatch.setattr(LoadedModel, "compile", lambda *a: (time.sleep(1), compile_shapes(*a))[1])
    started = time.perf_counter()
    assert run_main(four(tmp_path), generation="task", **flags).code == DONE
    wall = time.perf_counter() - started
    assert compiled_in_calls == [0] * 4
    figures = report(tmp_path)
    assert figures["compile_seconds"] > 1
    assert sum(figures[f"{phase}_seconds"] for phase in ("load", "compile", "generate")) < wall


def test_programs_for_more_eos_ids_than_usual_are_compiled_before_it_starts_too(
    compiled_in_calls: list[int], tmp_path: Path
):
    model = copy_small(tmp_path / "model")
    rewrite_json(model / "generation_config.json", eos_token_id=list(range(12)))
    assert run_main(four(tmp_path), model_path=model, generation="task").code == DONE
    assert compiled_in_calls == [0] * 4


# --- The surroundings ---------------------------------------------------------------------------------------


def test_the_embedded_default_says_what_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadedModel, "load", stop)
    outcome = run_main(tmp_path, model_path=None, dataset_path=None, layers_to_extract=None)
    assert "no --model_path given: using the embedded example, a tiny model" in outcome.out
    assert "no --dataset_path given: using the embedded example, ten puzzles" in outcome.out
    assert "10 tasks, 20 sequences (each test input in 2 augmentations x 1 samples)" in outcome.out


def test_the_command_line_prints_the_report_alone_and_exits_with_its_code(finished: Path):
    """A process as a user starts it: nothing but the report on its output, and an exit code."""
    run = [*COMMAND, *arguments(finished)]
    process = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=100)
    assert (process.returncode, process.stderr) == (DONE, "")
    told = [line for line in process.stdout.splitlines() if " s so far" not in line]  # of a slow machine
    assert told[0].startswith("4 tasks, 8 sequences (each test input in 2 augmentations x 1 samples), 8")
    assert "done" in told


def test_a_closed_output_pipe_neither_stops_the_run_nor_brings_a_traceback(finished: Path):
    """As in ``... | head -1``: nobody reads what it says, and the work is done."""
    reading, writing = os.pipe()
    os.close(reading)
    run = [*COMMAND, *arguments(finished)]
    process = subprocess.run(
        run, env=environment(), stdout=writing, stderr=subprocess.PIPE, text=True, timeout=100
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (DONE, "")
