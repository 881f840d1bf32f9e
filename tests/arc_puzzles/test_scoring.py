"""Answers found in a model's text, submissions, and scores."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from puzzle_cases import ENCODER_NAMES, GOOD_TASK, MINIMAL, NUMBERED, SHAPE, without_test_outputs

from arc_puzzles.grids import create_grid_encoder
from arc_puzzles.scoring import Score, build_submission, parse_answer, score
from arc_puzzles.tasks import ArcTask, Pair

# --- Answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "text", "grid"),
    [
        (MINIMAL, "12\n34", ((1, 2), (3, 4))),
        (MINIMAL, "\n 12\n34\n\n", ((1, 2), (3, 4))),
        (MINIMAL, "The rule is simple.\n\n12\n34\n\nThat was it.", ((1, 2), (3, 4))),
        (MINIMAL, "1\n\n2\n\nor rather\n\n34", ((3, 4),)),
        (MINIMAL, "123\n12\n34", None),  # ragged, and not cut to the two rows that fit
        (MINIMAL, "\n".join(["1"] * 31), None),
        (MINIMAL, "1" * 31, None),
        (MINIMAL, "the answer is 3", None),
        (MINIMAL, "", None),
        (NUMBERED, "Here:\n1 12\n2 34\n", ((1, 2), (3, 4))),
        (NUMBERED, "2 12\n3 34", None),
        (SHAPE, "```grid shape: 2x2\n1 12\n2 34\n```", ((1, 2), (3, 4))),
        (SHAPE, "I see.\n```grid shape: 1x1\n1 7\n```\nNo:\n```grid shape: 1x2\n1 89\n```\nDone.", ((8, 9),)),
        (SHAPE, "```grid shape: 1x1\n1 7\n```\n```grid shape: 1x2\n1 8", ((7,),)),  # ran out of tokens
        (SHAPE, "```grid shape: 1x2\n1\n```grid shape: 1x1\n1 7\n```", ((7,),)),
        (SHAPE, "```grid shape: 1x2\n1 89\n```\n```python\nprint()\n```", ((8, 9),)),
        (SHAPE, "```grid shape: 2x2\n1 89\n```", None),  # announced with another shape
        (SHAPE, "```grid shape: 2x2\n1 12\n2 34", None),  # never closed
        (SHAPE, "1 12\n2 34", None),
    ],
)
def test_parse_answer_by_example(encoder, text: str, grid):
    assert parse_answer(text, encoder) == grid


@settings(derandomize=True, deadline=None, max_examples=300, database=None)
@given(st.sampled_from(ENCODER_NAMES), st.text("0123 |x:gridshape\n`", max_size=60) | st.text(max_size=30))
def test_parse_answer_never_raises_and_returns_only_grids_that_are_in_the_text(name: str, text: str):
    encoder = create_grid_encoder(name)
    grid = parse_answer(text, encoder)
    assert grid is None or encoder.encode(grid) in text


# --- Scores and submissions ---------------------------------------------------------------------------------

RIGHT, WRONG = ((4, 3),), ((3, 4),)


def test_build_submission_by_example():
    submission = build_submission([GOOD_TASK], {("good", 0): [RIGHT, None], ("good", 1): [WRONG]})
    assert submission == {
        "good": [{"attempt_1": [[4, 3]], "attempt_2": []}, {"attempt_1": [[3, 4]]}],
    }


def test_a_test_without_attempts_is_in_the_submission_and_stray_attempts_are_refused():
    assert build_submission([GOOD_TASK], {}) == {"good": [{}, {}]}
    with pytest.raises(ValueError, match="attempts at test 2 of 'good', which is not in the tasks"):
        build_submission([GOOD_TASK], {("good", 2): [RIGHT]})


def solvable(task_id: str) -> ArcTask:
    return ArcTask(task_id, GOOD_TASK.train, (Pair(((1,),), ((1,),)), Pair(((2,),), ((2,),))))


@pytest.mark.parametrize(
    ("attempts", "tests_solved", "tasks_solved"),
    [
        ({("s", 0): [((1,),)], ("s", 1): [((2,),)]}, 2, 1),
        ({("s", 0): [None, ((9,),), ((1,),)], ("s", 1): [((2,),)]}, 2, 1),  # any attempt counts
        ({("s", 0): [((1,),)], ("s", 1): [((1,),)]}, 1, 0),  # all tests have to be solved
        ({("s", 0): [((1, 1),)], ("s", 1): [None]}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_a_test_needs_one_right_attempt_and_a_task_all_its_tests(attempts, tests_solved, tasks_solved):
    task = solvable("s")
    assert score([task], build_submission([task], attempts)) == Score(
        tasks_solved=tasks_solved,
        tasks_known=1,
        tasks_unknown=0,
        tests_solved=tests_solved,
        tests_known=2,
        tests_unknown=0,
    )


def test_tests_without_known_outputs_are_counted_separately():
    tasks = [GOOD_TASK, without_test_outputs(solvable("u"))]
    submission = build_submission(tasks, {("good", 0): [RIGHT], ("good", 1): [((5,),)], ("u", 0): [None]})
    assert score(tasks, submission) == Score(
        tasks_solved=0, tasks_known=0, tasks_unknown=2, tests_solved=1, tests_known=1, tests_unknown=3
    )


def test_a_missing_answer_counts_as_not_solved():
    task = solvable("s")
    assert score([task], {}).tests_solved == 0
    assert score([task], {"s": [{"attempt_1": [[1]]}]}).tests_solved == 1
