"""The exit code and the answers of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from runner_cases import (
    copy_small,
    puzzle,
    report,
    run_main,
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
