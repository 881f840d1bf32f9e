"""The vote over all predictions of a test, which chooses the two attempts that a submission has.

Each prediction counts for the grid it holds, turned back into the puzzle's own orientation and colours.

    >>> candidates = vote([Prediction(((1,),), -2.0), Prediction(None, -1.0), Prediction(((2,),), -1.5)])
    >>> [candidate.grid for candidate in candidates]
    [((2,),), ((1,),)]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from arc_puzzles.grids import Grid


@dataclass(frozen=True)
class Prediction:
    """Holds a predicted grid, its augmentation undone; None where the answer held no grid.

    `logprob` is the summed log-probability of the answer's tokens, in nats.
    """

    grid: Grid | None
    logprob: float


@dataclass(frozen=True)
class Candidate:
    """Holds a grid that was predicted, how often, and the summed `logprob` of these predictions."""

    grid: Grid
    votes: int
    logprob: float


def vote(predictions: Sequence[Prediction]) -> list[Candidate]:
    """Returns the distinct grids, best first.

    The grid of more predictions is better. Between equals decides the greater summed log-probability, and
    then which was predicted first. Predictions without a grid count for nothing; a log-probability that is
    not finite counts as that of the impossible.
    """
    votes: dict[Grid, list[float]] = {}
    for prediction in predictions:
        if prediction.grid is not None:
            logprob = prediction.logprob if math.isfinite(prediction.logprob) else -math.inf
            votes.setdefault(prediction.grid, []).append(logprob)
    candidates = [Candidate(grid, len(each), math.fsum(each)) for grid, each in votes.items()]
    return sorted(candidates, key=lambda one: (-one.votes, -one.logprob))  # stable: first predicted, first
