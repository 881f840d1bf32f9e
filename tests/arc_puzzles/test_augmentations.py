"""Flips, rotations and recolourings: each by example, their inverses, their names, the seeded choice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from puzzle_cases import small_grids

from arc_puzzles.augmentations import GEOMETRIES, Augmentation, choose_augmentations
from arc_puzzles.grids import ArcFormatError

L_SHAPE = ((1, 2, 3), (4, 5, 6))


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("identity", ((1, 2, 3), (4, 5, 6))),
        ("rot90", ((4, 1), (5, 2), (6, 3))),
        ("rot180", ((6, 5, 4), (3, 2, 1))),
        ("rot270", ((3, 6), (2, 5), (1, 4))),
        ("flip", ((3, 2, 1), (6, 5, 4))),
        ("flip+rot90", ((6, 3), (5, 2), (4, 1))),
        ("flip+rot180", ((4, 5, 6), (1, 2, 3))),
        ("flip+rot270", ((1, 4), (2, 5), (3, 6))),
        ("identity/c0213456789", ((2, 1, 3), (4, 5, 6))),
        ("rot90/c0213456789", ((4, 2), (5, 1), (6, 3))),
    ],
)
def test_each_augmentation_by_example(name: str, result):
    augmentation = Augmentation.parse(name)
    assert augmentation.apply(L_SHAPE) == result
    assert str(augmentation) == name


some_augmentations = st.builds(
    Augmentation, st.sampled_from(list(GEOMETRIES)), st.permutations(range(10)).map(tuple)
)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(some_augmentations, small_grids)
def test_the_inverse_undoes_an_augmentation_and_its_name_restores_it(augmentation: Augmentation, grid):
    assert augmentation.inverse().apply(augmentation.apply(grid)) == grid
    assert augmentation.apply(augmentation.inverse().apply(grid)) == grid
    assert augmentation.inverse().inverse() == augmentation
    assert Augmentation.parse(str(augmentation)) == augmentation


@pytest.mark.parametrize(
    "name",
    ["", "rot45", "rot90+flip", "flip+", "rot90/", "rot90/c012", "rot90/c0013456789", "rot90/c0123456789"],
)
def test_a_malformed_augmentation_name_is_refused(name: str):
    with pytest.raises(ArcFormatError):
        Augmentation.parse(name)


def test_colours_have_to_be_a_permutation():
    with pytest.raises(ArcFormatError, match="are not a permutation of 0 to 9"):
        Augmentation(colours=(0,) * 10)


def test_chosen_augmentations_are_distinct_deterministic_and_begin_with_the_geometries():
    chosen = choose_augmentations(200, seed=3)
    assert [str(augmentation) for augmentation in chosen[:8]] == list(GEOMETRIES)
    assert len({str(augmentation) for augmentation in chosen}) == 200
    assert {augmentation.geometry for augmentation in chosen[8:]} == set(GEOMETRIES)
    assert all(augmentation.colours[0] == 0 for augmentation in chosen)
    assert chosen == choose_augmentations(200, seed=3)
    assert choose_augmentations(9, seed=3) == chosen[:9]
    assert choose_augmentations(9, seed=4)[8] != chosen[8]
    assert choose_augmentations(1, seed=3) == [Augmentation()]


def test_the_seeded_augmentations_never_change():
    """A run that is resumed under a later version has to ask for the same augmentations."""
    assert list(map(str, choose_augmentations(10, seed=0)[8:])) == [
        "flip+rot180/c0375284916",
        "flip+rot270/c0521438967",
    ]


@pytest.mark.parametrize("n", [0, -1, 100_001])
def test_an_impossible_number_of_augmentations_is_refused(n: int):
    with pytest.raises(
        ValueError, match=f"the number of augmentations is {n}; it has to be from 1 to 100000"
    ):
        choose_augmentations(n, seed=0)
