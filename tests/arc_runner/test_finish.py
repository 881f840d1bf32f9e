"""The exit code and the answers of a run."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from runner_cases import (
    Outcome,
    copy_small,
    puzzle,
    report,
    run_main,
    run_python,
    small_checkpoint,
    write_tasks,
)
from spoil import (
    tensors,
)

DONE, TASKS_FAILED, RESUMABLE = 0, 1, 75


def test_sequences_with_values_that_are_not_finite_fail_and_are_listed(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model = copy_small(tmp_path / "model")
    tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * np.nan}))(model)
    for _ in range(2):  # the second time it is known from the store
        outcome = run_main(tmp_path, model_path=model)
        assert outcome.code == TASKS_FAILED
        assert "failed sequence   task test 0 identity sample 0: the log-probability is not" in outcome.out
    assert len(report(tmp_path)["sequences_failed"]) == 2


# Where root runs the tests, as nobody: root may write everywhere. What is imported late is so before.
AS_NOBODY = """
import json, os, sys
import transformers.models.qwen2
from activation_store import ActivationStore, ShuffledBatches
from activation_store.__main__ import main as look_after
from runner_cases import run_main
flags = json.loads(sys.argv[1])
run_main(**(flags | {"activations_dir": flags["folder"] + "/writable"}))
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
outcome = run_main(**flags)
store = ActivationStore(flags["activations_dir"])
rows = sum(len(store.rows(one, 0)) for one in store.sequences())
batches = sum(1 for _ in ShuffledBatches(store, layer=0, batch_size=4))
print(json.dumps([outcome, rows, batches, look_after(["verify", flags["activations_dir"]])]))
"""


@pytest.mark.slow
def test_merge_answers_from_a_store_that_cannot_be_written(finished: Path):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(finished / "activations", folder / "writable")
        store = folder / "read-only"
        shutil.copytree(finished / "activations", store)
        (store / "outcomes.json").unlink()
        (folder / "out").mkdir()
        (folder / "out").chmod(0o777)
        flags = {
            "folder": str(folder),
            "model_path": str(shutil.copytree(small_checkpoint(), folder / "model")),
            "dataset_path": str(shutil.copy(finished / "tasks.json", folder)),
            "activations_dir": str(store),
            "output_filepath": str(folder / "out" / "submission.json"),
            "merge": True,
        }
        for path in (store, *store.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))
        *_, printed = run_python(AS_NOBODY, json.dumps(flags)).splitlines()
        answers = json.loads((folder / "out" / "submission.json").read_text())
        after = sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))
    outcome, rows, batches, verified = json.loads(printed)
    code, _, err = Outcome(*outcome)
    assert code == DONE
    assert err == (
        "which sequences solve their puzzle is not noted in the store: cannot write outcomes.json in "
        f"{store}: Permission denied; what was committed before is safe\n"
    )
    assert answers == json.loads((finished / "submission.json").read_text())
    assert rows > 0
    assert batches > 0
    assert verified == 0
    assert after == before
