"""The vote over predictions: which grids are the attempts, and in which order."""

import itertools
import math
import random

import pytest

from arc_puzzles.augmentations import choose_augmentations
from arc_puzzles.grids import Grid
from arc_puzzles.voting import Candidate, Prediction, vote

A: Grid = ((1,),)
B: Grid = ((2, 2),)
C: Grid = ((3,), (3,))


def chosen(*predictions: tuple[Grid | None, float]) -> list[Grid]:
    return [candidate.grid for candidate in vote([Prediction(*one) for one in predictions])]


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ([], []),
        ([(None, -1.0), (None, 0.0)], []),
        ([(A, -9.0)], [A]),
        ([(None, 0.0), (A, -9.0), (None, 0.0)], [A]),
        ([(A, -1.0), (B, -50.0), (B, -50.0)], [B, A]),  # more votes first, however unlikely
        ([(A, -3.0), (B, -2.0)], [B, A]),  # equal votes: the likelier
        ([(A, -1.0), (B, -2.0), (A, -9.0), (B, -2.0)], [B, A]),  # -10 against -4
        ([(A, -2.0), (B, -2.0)], [A, B]),  # equal in everything: the first
        ([(B, -2.0), (A, -2.0)], [B, A]),
        ([(C, -1.0), (A, -5.0), (B, -4.0), (A, -5.0), (B, -4.0)], [B, A, C]),
        ([(A, math.nan), (B, -1e9)], [B, A]),
        ([(A, math.inf), (A, -math.inf), (B, -1e9), (B, -1e9)], [B, A]),
        ([(A, -math.inf), (B, math.nan)], [A, B]),
    ],
)
def test_the_vote_by_example(predictions: list[tuple[Grid | None, float]], expected: list[Grid]):
    assert chosen(*predictions) == expected


def test_a_candidate_says_how_often_it_was_predicted_and_how_likely():
    predictions = [Prediction(A, -1.5), Prediction(B, -1.0), Prediction(A, -2.0), Prediction(None, -3.0)]
    assert vote(predictions) == [Candidate(A, 2, -3.5), Candidate(B, 1, -1.0)]


def test_grids_of_other_shapes_with_the_same_cells_are_different():
    assert chosen((((1, 1),), -1.0), (((1,), (1,)), -2.0), (((1, 1),), -1.0)) == [((1, 1),), ((1,), (1,))]


def test_the_order_of_predictions_decides_nothing_but_full_ties():
    predictions = [(A, -1.0), (B, -2.0), (B, -3.0), (C, -4.0), (None, 0.0)]
    assert {tuple(chosen(*order)) for order in itertools.permutations(predictions)} == {(B, A, C)}


def test_answers_to_turned_puzzles_vote_for_one_grid_once_they_are_turned_back():
    grid: Grid = ((1, 2, 0), (0, 5, 9))
    turned = [(one, one.apply(grid)) for one in choose_augmentations(12, seed=3)]
    assert len({answer for _, answer in turned}) > 8
    predictions = [Prediction(one.inverse().apply(answer), -1.0) for one, answer in turned]
    assert vote([Prediction(A, 0.0), *predictions])[0] == Candidate(grid, 12, -12.0)


def test_the_vote_agrees_with_counting_by_hand():
    rng = random.Random(0)
    for _ in range(50):
        grids = [rng.choice([A, B, C, None]) for _ in range(9)]
        candidates = vote([Prediction(grid, -1.0) for grid in grids])
        counts = {grid: grids.count(grid) for grid in grids if grid is not None}
        assert {one.grid: one.votes for one in candidates} == counts
        assert [one.votes for one in candidates] == sorted(counts.values(), reverse=True)
