"""The public ARC training set, where it is at hand: it loads, its prompts are whole, its answers score."""

import os
from pathlib import Path

import pytest
from puzzle_cases import SHAPE, check_prompts

from arc_puzzles import build_submission, load_tasks, parse_answer, score

ROOT = Path(__file__).parents[2]
PUBLIC_TASKS = Path(os.environ.get("ARC_TASKS", ROOT.parent / "shared" / "arc-agi" / "training.json"))


@pytest.mark.skipif(not PUBLIC_TASKS.is_file(), reason="ARC_TASKS does not name the public training set")
def test_all_400_public_tasks_load_and_their_prompts_are_whole():
    loaded = load_tasks(PUBLIC_TASKS)
    assert len(loaded.tasks) == 400
    assert loaded.failures == ()
    attempts = {}
    for task in loaded.tasks:
        check_prompts(task, SHAPE, "output-from-examples-v0")
        for i, pair in enumerate(task.test):
            assert pair.output is not None
            answer = parse_answer(f"Sure!\n{SHAPE.encode(pair.output)}", SHAPE)
            assert answer is not None
            attempts[task.task_id, i] = [answer]
    result = score({task.task_id: task.outputs for task in loaded.tasks}, attempts)
    assert (result.tasks_solved, result.tests_solved) == (400, len(attempts))
    assert len(attempts) == 416
    submission = build_submission(loaded.outline, attempts)
    assert sum(map(len, submission.values())) == 416
