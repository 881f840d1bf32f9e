"""The symmetries of a puzzle: flips, rotations and permutations of the colours.

A puzzle stays the same puzzle under each of them, and each has an inverse that brings the answer back.

    >>> Augmentation.parse("rot90").apply(((1, 0, 0), (0, 1, 0)))
    ((0, 1), (1, 0), (0, 0))
"""

import random
import re
from dataclasses import dataclass

from arc_puzzles.grids import COLOURS, ArcFormatError, Grid

# Name: (mirror left to right first?, then how many quarter turns clockwise).
GEOMETRIES = {
    "identity": (False, 0),
    "rot90": (False, 1),
    "rot180": (False, 2),
    "rot270": (False, 3),
    "flip": (True, 0),
    "flip+rot90": (True, 1),
    "flip+rot180": (True, 2),
    "flip+rot270": (True, 3),
}

SAME_COLOURS = tuple(range(COLOURS))


@dataclass(frozen=True)
class Augmentation:
    """Flips or rotates a grid (`geometry`, a key of GEOMETRIES), then turns colour c into `colours[c]`.

    `str()` gives its name and `parse` reads it: "identity", "rot90", "flip+rot270", "rot90/c0213456789".
    Raises ArcFormatError for an unknown geometry and for colours that are no permutation of 0..9.
    """

    geometry: str = "identity"
    colours: tuple[int, ...] = SAME_COLOURS

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise ArcFormatError(f"{self.geometry!r} is not one of the geometries {', '.join(GEOMETRIES)}")
        if tuple(sorted(self.colours)) != SAME_COLOURS:
            raise ArcFormatError(f"the colours {self.colours} are not a permutation of 0 to {COLOURS - 1}")

    def apply(self, grid: Grid) -> Grid:
        """Returns the augmented grid."""
        mirror, turns = GEOMETRIES[self.geometry]
        if mirror:
            grid = tuple(row[::-1] for row in grid)
        for _ in range(turns):
            grid = tuple(zip(*grid[::-1], strict=True))
        return tuple(tuple(self.colours[cell] for cell in row) for row in grid)

    def inverse(self) -> "Augmentation":
        """Returns the augmentation that undoes this one: `a.inverse().apply(a.apply(grid)) == grid`."""
        # Every geometry with a mirror in it is a reflection, which undoes itself.
        geometry = {"rot90": "rot270", "rot270": "rot90"}.get(self.geometry, self.geometry)
        return Augmentation(geometry, tuple(self.colours.index(colour) for colour in range(COLOURS)))

    def __str__(self) -> str:
        if self.colours == SAME_COLOURS:
            return self.geometry
        return f"{self.geometry}/c{''.join(map(str, self.colours))}"

    @classmethod
    def parse(cls, name: str) -> "Augmentation":
        """Returns the augmentation that `str()` gives this name; raises ArcFormatError if there is none."""
        geometry, slash, colours = name.partition("/c")
        if slash and not re.fullmatch("[0-9]{10}", colours):
            raise ArcFormatError(f"{name!r} is no augmentation; write it like rot90 or rot90/c0213456789")
        augmentation = cls(geometry, tuple(map(int, colours)) if slash else SAME_COLOURS)
        if str(augmentation) != name:
            raise ArcFormatError(f"{name!r} is no augmentation's name; this one is called {augmentation}")
        return augmentation


def choose_augmentations(n: int, seed: int) -> list[Augmentation]:
    """Returns `n` different augmentations: the eight geometries, identity first, then seeded recoloured ones.

    Colour 0, the background of most puzzles, keeps its value. The list for a smaller `n` is the beginning of
    the list for a larger one. Raises ValueError unless 1 <= n <= 100000.
    """
    if not 1 <= n <= 100_000:
        raise ValueError(f"the number of augmentations is {n}; it has to be from 1 to 100000")
    chosen = dict.fromkeys(map(Augmentation, GEOMETRIES))
    # Of `random`, only seeding and random() promise the same values in every Python version.
    rng = random.Random(seed)
    geometries = list(GEOMETRIES)
    while len(chosen) < n:
        geometry = geometries[int(rng.random() * len(geometries))]
        colours = (0, *sorted(range(1, COLOURS), key=lambda _: rng.random()))
        chosen[Augmentation(geometry, colours)] = None
    return list(chosen)[:n]
