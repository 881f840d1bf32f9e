"""Answers found in a model's text, submissions, and scores."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from puzzle_cases import ENCODER_NAMES, GOOD_TASK, MINIMAL, NUMBERED, SHAPE, small_grids

from arc_puzzles.grids import Grid, create_grid_encoder
from arc_puzzles.scoring import Score, build_submission, parse_answer, score

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


# --- Submissions --------------------------------------------------------------------------------------------

RIGHT, WRONG = ((4, 3),), ((3, 4),)
NOTHING = [[0, 0], [0, 0]]


def test_build_submission_by_example():
    submission = build_submission(
        [("good", 2), ("failed", 3)],
        {("good", 0): [RIGHT, WRONG, ((9,),)], ("good", 1): [WRONG]},
    )
    assert submission == {
        "good": [
            {"attempt_1": [[4, 3]], "attempt_2": [[3, 4]]},
            {"attempt_1": [[3, 4]], "attempt_2": NOTHING},
        ],
        "failed": [{"attempt_1": NOTHING, "attempt_2": NOTHING}] * 3,
    }


def test_attempts_at_a_test_that_is_not_there_are_refused():
    for stray in (("good", 2), ("other", 0)):
        with pytest.raises(ValueError, match=f"attempts at test {stray[1]} of '{stray[0]}', which is not in"):
            build_submission([("good", 2)], {stray: [RIGHT]})


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(
    st.dictionaries(st.text(max_size=3), st.integers(1, 3), max_size=5),
    st.lists(st.lists(small_grids, max_size=3), min_size=15, max_size=15),
)
def test_a_submission_has_the_shape_that_kaggle_takes(outline: dict[str, int], grids: list[list[Grid]]):
    tests = [(task_id, i) for task_id, n_tests in outline.items() for i in range(n_tests)]
    attempts = dict(zip(tests, grids, strict=False))
    submission = json.loads(json.dumps(build_submission(outline.items(), attempts)))
    assert list(submission) == list(outline)
    for task_id, answers in submission.items():
        assert len(answers) == outline[task_id]
        for answer in answers:
            assert list(answer) == ["attempt_1", "attempt_2"]
            for grid in answer.values():
                assert len({len(row) for row in grid}) == 1
                assert all(type(cell) is int and 0 <= cell <= 9 for row in grid for cell in row)


# --- Scores -------------------------------------------------------------------------------------------------

SOLVABLE = {"s": (((1,),), ((2,),))}


@pytest.mark.parametrize(
    ("attempts", "tests_solved", "tasks_solved"),
    [
        ({("s", 0): [((1,),)], ("s", 1): [((2,),)]}, 2, 1),
        ({("s", 0): [((9,),), ((1,),)], ("s", 1): [((2,),)]}, 2, 1),  # any attempt counts
        ({("s", 0): [((1,),)], ("s", 1): [((1,),)]}, 1, 0),  # all tests have to be solved
        ({("s", 0): [((1, 1),)], ("s", 1): []}, 0, 0),
        ({("other", 0): [((1,),)]}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_a_test_needs_one_right_attempt_and_a_task_all_its_tests(attempts, tests_solved, tasks_solved):
    assert score(SOLVABLE, attempts) == Score(
        tasks_solved=tasks_solved,
        tasks_known=1,
        tasks_unknown=0,
        tests_solved=tests_solved,
        tests_known=2,
        tests_unknown=0,
    )


def test_tests_without_known_outputs_are_counted_separately():
    outputs = {"good": GOOD_TASK.outputs, "u": (None, None)}
    attempts = {("good", 0): [RIGHT], ("good", 1): [((5,),)], ("u", 0): [WRONG]}
    assert score(outputs, attempts) == Score(
        tasks_solved=0, tasks_known=0, tasks_unknown=2, tests_solved=1, tests_known=1, tests_unknown=3
    )


def test_the_placeholder_of_a_missing_attempt_solves_nothing():
    assert score({"t": (((0, 0), (0, 0)),)}, {}).tests_solved == 0
    assert score({"t": (((0, 0), (0, 0)),)}, {("t", 0): [((0, 0), (0, 0))]}).tests_solved == 1
