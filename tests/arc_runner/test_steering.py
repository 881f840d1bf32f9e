"""--hook_points and --steer: stored, told, replayed, the same in each way to generate; or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from runner_cases import (
    assert_refused,
    four,
    puzzle,
    run_main,
    small_checkpoint,
    store_of,
    tokens,
    write_tasks,
)

from activation_store import ActivationStore, verify_store
from activation_store.replay import replay_store
from arc_runner.steering_file import read_steering
from qwen2_core.hook_points import LN_FINAL
from qwen2_core.intervention_files import encode_interventions
from qwen2_core.interventions import AblateHeads, Add

POINTS = ["attn.hook_z:0-1", "mlp.hook_post:1", "blocks.0.hook_resid_mid", LN_FINAL]
HOOKS = ["hook_resid_post", "attn.hook_z", "hook_resid_mid", "mlp.hook_post", LN_FINAL]
VECTOR = np.linspace(-30, 30, 64)
STEERING = [Add("hook_resid_mid", 0, VECTOR, positions="generated"), AblateHeads([1], [2])]


def write_steering(folder: Path, steering: Any = STEERING) -> Path:
    file = folder / "steer.safetensors"
    file.write_bytes(encode_interventions(steering))
    return file


def run(folder: Path, **flags: Any) -> Any:
    return run_main(folder, n_tasks=1, extract_prompt=True, hook_points=POINTS, **flags)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with other points and interventions."""
    folder = four(tmp_path_factory.mktemp("steered"))
    outcome = run(folder, steer=write_steering(folder))
    assert (outcome.code, outcome.err) == (0, "")
    return folder


def test_what_is_stored_is_sound_and_replayed_with_the_same_interventions(steered: Path):
    store = store_of(steered)
    assert list(store.settings.hooks_by_point) == HOOKS
    assert store.settings.widths == {"mlp.hook_post": 128}
    assert store.interventions() == (steered / "steer.safetensors").read_bytes()
    assert list(verify_store(store)) == []
    assert list(replay_store(store, str(small_checkpoint()), count=9)) == []
    record = store[0]
    assert record.strengths == ()
    heads = store.rows(record, layer="blocks.1.attn.hook_z").reshape(record.n_rows, 4, 16)
    assert (heads[:, 2] == 0).all()
    assert (heads[:, 3] != 0).any()


@pytest.mark.parametrize("way", ["task", pytest.param("python", marks=pytest.mark.slow)])
def test_the_other_ways_to_generate_store_the_same(way: str, steered: Path, tmp_path: Path):
    four(tmp_path)
    assert run(tmp_path, steer=steered / "steer.safetensors", generation=way).code == 0
    assert tokens(tmp_path) == tokens(steered)
    there, here = store_of(steered), store_of(tmp_path)
    assert set(here.settings.hook_names) == set(there.settings.hook_names)
    for record in here.sequences():
        for hook in here.settings.hook_names:
            expected = there.rows(there[record.key], layer=hook)  # equal keys
            assert np.allclose(here.rows(record, layer=hook), expected, rtol=1e-3, atol=1e-3)


def test_the_same_command_continues_and_others_are_told_what_would(steered: Path):
    kept = steered / "activations" / "interventions.safetensors"
    assert "2 of them done already" in run(steered, steer=kept).out
    outcome = run(steered)
    assert_refused(outcome, "--steer is the file of checksum ")
    assert outcome.err.endswith(f"or continue it with --steer {kept}\n")
    outcome = run_main(steered, extract_prompt=True, steer=kept)
    assert_refused(outcome, "--hook_points is attn.hook_z:0,1 hook_resid_mid:0 mlp.hook_post:1 ln_final")
    assert "ln_final.hook_normalized there and none here); choose another" in outcome.err


@pytest.mark.usefixtures("no_weights")
def test_a_dry_run_tells_points_and_interventions_and_counts_their_bytes(steered: Path):
    file = steered / "steer.safetensors"
    outcome = run(steered, steer=file, dry_run=True, activations_dir=steered / "none")
    assert outcome.code == 0, outcome.err
    assert (
        "  steering          Add at hook_resid_mid of layer 0, generated, strength 1\n"
        "                    AblateHeads at attn.hook_z of layer 1, all, strength 1\n"
    ) in outcome.out
    points = "hook_resid_mid of layer 0, mlp.hook_post of layer 1, ln_final.hook_normalized in float32"
    assert f"layers 0, 1, attn.hook_z of layers 0, 1, {points}" in outcome.out
    [limit] = re.findall(r"at most ([0-9.]+) kB", outcome.out)
    stored = store_of(steered)[0].shard_bytes + file.stat().st_size
    assert stored < 1000 * float(limit) < 1.5 * stored


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("a layer", {"hook_points": ["mlp.hook_post:2"]}, "blocks.2.mlp.hook_post: the model has layers 0 to 1"),
    ("no rows", {"hook_points": [LN_FINAL], "no_extract_activations": True}, "--hook_points and --no_ext"),
    ("before nothing", {"capture_before": True}, "--capture_before is about what --steer changes"),
    ("no file", {"steer": "none.safetensors"}, "--steer: cannot read none.safetensors: No such file"),
    ("a folder", {"steer": "."}, "--steer: . is not a file"),
    ("a URL", {"steer": "gs://bucket/x"}, "--steer gs://bucket/x is a URL"),
]  # fmt: skip


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("flags", "sentence"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_flags_that_cannot_be_are_refused_before_the_weights(
    flags: dict[str, Any], sentence: str, tmp_path: Path
):
    four(tmp_path)
    assert_refused(run_main(tmp_path, **flags), sentence)


FILES: list[tuple[str, Any, str]] = [
    ("other bytes", b"{}", "steer.safetensors is no file of interventions: "),
    ("another width", Add("hook_resid_mid", 0, np.ones(63)), "--steer: Add.vector must be [64] or [1, 64]"),
    ("a layer", Add("hook_resid_mid", 2, np.ones(64)), "--steer: Add.layers [2] are out of range"),
    ("a head", AblateHeads([0], [4]), "--steer: AblateHeads.heads [4] are out of range"),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("content", "sentence"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_files_that_do_not_fit_are_refused_before_the_weights(content: Any, sentence: str, tmp_path: Path):
    four(tmp_path)
    file = tmp_path / "steer.safetensors"
    file.write_bytes(content if isinstance(content, bytes) else encode_interventions(content))
    assert_refused(run_main(tmp_path, steer=file), sentence)


def test_equal_interventions_are_kept_as_equal_bytes_however_they_are_written(tmp_path: Path):
    file = write_steering(tmp_path, [Add("hook_resid_mid", [0], np.ones(64))])
    other = tmp_path / "other.safetensors"
    where = '[ {"layers": [0], "point": "hook_resid_mid", "kind": "Add"} ]'
    safetensors.numpy.save_file({"0.vector": np.ones(64, np.float16)}, other, {"interventions": where})
    assert other.read_bytes() != file.read_bytes()
    assert read_steering(str(other)) == read_steering(str(file)) == file.read_bytes()


@pytest.mark.slow
def test_rows_before_an_intervention_are_stored_on_request(steered: Path, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", **{"task-0": puzzle(0, 1, 2)})
    steer = steered / "steer.safetensors"
    assert run(tmp_path, steer=steer, capture_before=True, generation="task").code == 0
    store = ActivationStore(tmp_path / "activations")
    assert store.settings.capture_before
    record = store[0]
    assert (store.rows(record, layer="blocks.1.attn.hook_z") != 0).all()
    assert tokens(tmp_path) == tokens(steered)
