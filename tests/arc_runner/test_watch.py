"""A whole run as a person sees it on a terminal, and as its metrics tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runner_cases import arguments, four, report, run_main
from terminals import on_terminal

from arc_runner import display
from distributed_kv_cached_inference import main

DONE = 0


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "submission.metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("generation", ["continuous", pytest.param("task", marks=pytest.mark.slow)])
def test_a_run_on_a_terminal_ends_with_a_table_and_a_puzzle_and_leaves_no_bar(
    generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(display, "_DRAWN_SECONDS", 0.05)
    monkeypatch.setattr(display, "_DRAWN_AFTER", 0.0)
    terminal = on_terminal(monkeypatch, columns=100)
    # Of a length that no other test has: its programs are not compiled yet.
    code = main(arguments(four(tmp_path), generation=generation, max_output_tokens=7))
    terminal.close()
    assert code == DONE
    lines = terminal.lines()
    assert lines[0].startswith("4 tasks, 8 sequences")
    end = lines[lines.index("done") :]
    assert any(line.startswith("│ tokens generated  │ ") for line in end)
    assert any(line.startswith("none was solved; an unsolved one: task task-") for line in end)
    assert "tokens/s · " not in "\n".join(lines)  # the bar is gone
    assert "of 8 sequences" in terminal.written  # and was there
    assert "compiling window" in terminal.written or generation == "task"
    assert "\x1b[?25l" not in terminal.written  # a cursor that is hidden stays so after a kill


def test_the_metrics_tell_the_phases_and_the_figures_and_a_resumed_run_appends(tmp_path: Path):
    folder = four(tmp_path)
    assert run_main(folder, n_tasks=1).code == DONE
    assert run_main(folder).code == DONE
    before = len(metrics(folder))
    assert run_main(folder).code == DONE  # has nothing to do
    lines = metrics(folder)
    assert len(lines) == before
    starts = [i for i, line in enumerate(lines) if line["phase"] == "start"]
    assert len(starts) == 2
    phases = {line["phase"]: line for line in lines[starts[1] :]}  # the last line of each
    assert list(phases) == ["start", "loading", "compiling", "generating", "storing", "done"]
    last = lines[-1]
    assert (last["sequences_done"], last["sequences_total"]) == (8, 8)
    assert lines[starts[1]]["sequences_done"] == 2
    assert last["tokens_generated"] == report(folder)["tokens_generated"]
    assert (last["tasks_solved"], last["tasks_known"]) == (0, 4)
    assert last["slots"] == 8
    assert 0 < last["slots_in_use"] <= 6
    assert last["tokens_per_second"] > 0
    assert last["peak_memory_bytes"] > 10e6
    assert phases["compiling"]["tokens_per_second"] == 0
