"""What decides the last bits of a run is recorded with each sequence, and a change of it is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from runner_cases import (
    digests,
    four,
    puzzle,
    report,
    run_main,
    small_checkpoint,
    store_of,
    write_tasks,
)

from activation_store import verify_store
from arc_runner import numerics
from arc_runner.numerics import run_numerics, say_numerics
from arc_runner.options import RunOptions
from qwen2_core.kernels.cpu.library import Instructions
from qwen2_core.sharding import Layout
from qwen2_jax import QwenConfig

OPTIONS = RunOptions(augmentations=2)
CONFIG = QwenConfig(dtype="bfloat16")


def of(config: QwenConfig = CONFIG, layout: Layout | None = None, **changes: Any) -> dict[str, Any]:
    return run_numerics(dataclasses.replace(OPTIONS, **changes), config, layout or Layout())


def test_runs_of_one_kind_have_equal_numerics_that_are_json():
    assert of() == json.loads(json.dumps(of()))


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": "task"},
        {"generation": "python"},
        {"batch_size": 16},
        {"memory_budget": 3.0},
        {"generation": "task", "batch_size": 16},
        {"generation": "task", "augmentations": 4},
    ],
)
def test_whatever_changes_the_shape_of_a_batch_changes_them(changes: dict[str, Any]):
    assert of(**changes) != of()


def test_what_changes_no_bits_does_not_change_them(monkeypatch: pytest.MonkeyPatch):
    assert of(augmentations=4) == of(predictions_per_task=8) == of(output_filepath="elsewhere.json") == of()
    assert of(generation="python", batch_size=16) == of(generation="python")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/somewhere")
    assert of()["flags"] == {}


def test_flags_of_the_compiler_count_in_any_order(monkeypatch: pytest.MonkeyPatch):
    found = []
    for flags in ("--xla_a=1 --xla_b=2", " --xla_b=2  --xla_a=1"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        found.append(of())
    assert found[0] == found[1]
    assert found[0]["flags"] == {"XLA_FLAGS": "--xla_a=1 --xla_b=2"}


def test_kernels_layers_and_precision_count(monkeypatch: pytest.MonkeyPatch):
    there = of()
    assert of(CONFIG.replace(scan_layers=not CONFIG.scan_layers)) != there
    monkeypatch.setattr(numerics, "is_available", lambda: True)
    names = {"AVX2": "avx2", "AVX512_BF16": "avx512_bf16", "AMX": "avx512_bf16 and amx"}
    for instructions, name in names.items():
        monkeypatch.setattr(numerics, "instructions", lambda chosen=Instructions[instructions]: chosen)
        assert of()["cpu_kernels"] == name
    monkeypatch.setattr(numerics, "is_available", lambda: False)
    assert of()["cpu_kernels"] is None
    assert of(CONFIG.replace(dtype="float32"))["cpu_kernels"] is None
    with jax.default_matmul_precision("float32"):
        assert of()["matmul_precision"] == "float32"


def test_a_change_is_one_line_that_names_what_differs(capsys: pytest.CaptureFixture[str]):
    earlier = {"batch_size": 8, "cpu_kernels": "avx512_bf16", "flags": {}}
    say_numerics(earlier, [])
    say_numerics(earlier, [earlier])
    assert capsys.readouterr().out == ""
    say_numerics({"batch_size": 4, "cpu_kernels": None, "flags": {"XLA_FLAGS": "-x"}}, [earlier, earlier])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert (
        "(batch_size was 8 and is 4; cpu_kernels was avx512_bf16 and is none; "
        'flags was {} and is {"XLA_FLAGS": "-x"})'
    ) in out


@pytest.mark.slow
def test_a_store_that_is_continued_otherwise_says_which_sequence_was_made_how(tmp_path: Path):
    four(tmp_path)
    first = run_main(tmp_path, n_tasks=2)
    assert "begun otherwise" not in first.out
    assert "begun otherwise" not in run_main(tmp_path, n_tasks=2, batch_size=2).out  # nothing is left to make
    second = run_main(tmp_path, batch_size=2)
    assert second.code == 0
    assert "the store was begun otherwise than it is continued (batch_size was 8 and is 2)" in second.out
    assert second.out.index("begun otherwise") < second.out.index("slots for prompts")
    store = store_of(tmp_path)
    (host,) = (tmp_path / "activations").glob("host-*.json")
    described = json.loads(host.read_text())["numerics"]
    sizes = {record.task_id: described[record.numerics]["batch_size"] for record in store.sequences()}
    assert sizes == {"task-0": 8, "task-1": 8, "task-2": 2, "task-3": 2}
    assert store.provenance["numerics"]["batch_size"] == 8
    assert list(verify_store(store)) == []
    made = [record for record in store.sequences() if record.task_id in ("task-2", "task-3")]
    assert report(tmp_path)["tokens_generated"] == sum(record.generated_length for record in made)


def test_a_run_that_is_repeated_records_nothing_new(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", a=puzzle(1, 2))
    assert run_main(tmp_path).code == 0
    files = {p: p.read_bytes() for p in (tmp_path / "activations").rglob("*.json*") if p.is_file()}
    before = digests(tmp_path)
    assert run_main(tmp_path).code == 0
    assert {p: p.read_bytes() for p in files} == files
    assert digests(tmp_path) == before


def test_a_corrected_task_is_told_from_the_others_and_its_old_sequences_can_be_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from activation_store.__main__ import main

    model = str(small_checkpoint())
    dataset, store = tmp_path / "tasks.json", str(tmp_path / "activations")
    write_tasks(dataset, a=puzzle(1, 2, 3), b=puzzle(4, 5, 6), c=puzzle(7, 8, 9))
    assert run_main(tmp_path).code == 0
    intact = digests(tmp_path)
    old = {record.key for record in store_of(tmp_path).sequences(task_ids={"b"})}
    verify = ["verify", store, "--dataset", str(dataset)]
    assert main(verify) == 0
    write_tasks(dataset, a=puzzle(1, 2, 3), b=puzzle(4, 5, 7), d=puzzle(7, 8, 1))
    capsys.readouterr()
    assert main(verify) == 1
    stale = f"task b: 2 sequences are of other prompts than {dataset} gives now"
    assert capsys.readouterr().out.splitlines()[:-1] == ["task d test 0 has no sequence", stale]
    assert run_main(tmp_path).code == 0
    capsys.readouterr()
    assert main(verify) == 1  # both are there now
    assert capsys.readouterr().out.splitlines() == [stale, "10 sequences, 1 findings"]
    assert main([*verify, "--model_path", model, "--repair"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"dropped: {stale}", "8 sequences, 0 findings"]
    left = digests(tmp_path)
    assert not old & set(left)
    assert {key: digest for key, digest in intact.items() if key not in old}.items() <= left.items()
    assert list(verify_store(store_of(tmp_path))) == []
    assert run_main(tmp_path).code == 0
    assert digests(tmp_path) == left  # nothing was made again
