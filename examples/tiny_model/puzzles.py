"""Seeded puzzles of the rules, for training and as samples: two pairs that show the rule, and one test.

No grid that a sample has as an input is one in training, not even turned, mirrored or in other colours
(`is_held_out`). Every puzzle has one answer: no rule that explains both pairs says otherwise.
"""

import zlib
from collections.abc import Callable

from arc_puzzles import ArcTask, Pair
from arc_puzzles.augmentations import GEOMETRIES, Augmentation
from tiny_model.rules import BACKGROUND, PLAIN_RULES, SEEN_RULES, UNSEEN_RULES, Dice, Drawn, Grid

HELD_OUT = 8  # one of so many grids is held out from training
SAMPLE_SEED = 18
TRIES = 10_000
TURNS = tuple(map(Augmentation, GEOMETRIES))


def is_held_out(grid: Grid) -> bool:
    """Tells whether a grid may be the input of a sample only, the same for all that look alike.

    That is in each orientation, and in any colours.
    """
    looks = min(_with_first_colours(turn.apply(grid)) for turn in TURNS)
    return zlib.crc32(repr(looks).encode()) % HELD_OUT == 0


def _with_first_colours(grid: Grid) -> Grid:
    names = {BACKGROUND: BACKGROUND}
    return tuple(tuple(names.setdefault(cell, len(names)) for cell in row) for row in grid)


def _turned(rule: Callable[[Grid], Grid], turn: Augmentation) -> Callable[[Grid], Grid]:
    back = turn.inverse()
    return lambda grid: back.apply(rule(turn.apply(grid)))


# What the seen rules do to a puzzle that is turned or mirrored, such as to fall up.
EXPLANATIONS = tuple(_turned(rule, turn) for rule in PLAIN_RULES for turn in TURNS)


def possible_answers(pairs: list[tuple[Grid, Grid]], test: Grid) -> set[Grid]:
    """Returns what every seen rule that explains all pairs makes of the test."""
    answers = {rule(test) for rule in EXPLANATIONS if all(rule(before) == after for before, after in pairs)}
    renamed: dict[int, int] = {}
    for before, after in pairs:
        if [len(row) for row in before] != [len(row) for row in after]:
            return answers
        for old, new in zip(sum(before, ()), sum(after, ()), strict=True):
            if renamed.setdefault(old, new) != new:
                return answers
    return answers | {tuple(tuple(renamed.get(cell, cell) for cell in row) for row in test)}


def draw_puzzle(name: str, dice: Dice, held_out: bool) -> ArcTask:
    """Returns a puzzle of the rule whose inputs all are held out, or none. Its id is the rule's name."""
    rule = (SEEN_RULES | UNSEEN_RULES)[name]
    for _ in range(TRIES):
        drawn = rule(dice)
        pairs = [_draw_pair(drawn, dice, held_out) for _ in range(3)]
        shown, (test, answer) = pairs[:2], pairs[2]
        if len({before for before, _ in pairs}) < 3:
            continue
        if possible_answers(shown, test) <= ({answer} if name in SEEN_RULES else set()):
            train = tuple(Pair(before, after) for before, after in shown)
            return ArcTask(name, train, (Pair(test, answer),))
    raise ValueError(f"no puzzle of {name} came of {TRIES} tries")


def _draw_pair(drawn: Drawn, dice: Dice, held_out: bool) -> tuple[Grid, Grid]:
    for _ in range(TRIES):
        grid = drawn.draw_input(dice)
        output = drawn.apply(grid)
        if output != grid and is_held_out(grid) == held_out:
            return grid, output
    raise ValueError(f"no grid {'held out' if held_out else 'for training'} came of {TRIES} tries")


def draw_training_puzzle(dice: Dice) -> ArcTask:
    """Returns a puzzle of one of the seen rules, no input of which is held out."""
    names = list(SEEN_RULES)
    return draw_puzzle(names[dice.between(0, len(names) - 1)], dice, held_out=False)


def sample_tasks() -> list[ArcTask]:
    """Returns one sample of each rule, seen and unseen: the puzzles that are embedded."""
    return [
        draw_puzzle(name, Dice(f"{SAMPLE_SEED} {name}"), held_out=True)
        for name in (*SEEN_RULES, *UNSEEN_RULES)
    ]
