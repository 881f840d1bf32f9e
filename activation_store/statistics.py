"""Mean, variance and norm of stored rows: taken while a shard is written, merged in any order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Shaped

# Rows measured at a time: a float32 copy of them stays in the processor's cache. The sums that are stored
# are rounded block by block, so another number would change the bytes of a shard.
BLOCK_ROWS = 256


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over `count` rows of one layer, from which mean, variance and mean norm follow."""

    count: int
    mean: Float64[np.ndarray, " hidden"]  # of each column
    squared_deviation: Float64[np.ndarray, " hidden"]  # of each column from its mean, summed
    norm_sum: float  # the rows' Euclidean norms, summed

    def __repr__(self) -> str:
        """Says in a line what was measured, without the values of each column."""
        width = len(self.mean)
        return f"LayerStatistics({self.count} rows of width {width}, mean norm {self.mean_norm:.4g})"

    @classmethod
    def empty(cls, hidden_size: int) -> "LayerStatistics":
        """Returns the statistics of no rows."""
        return cls(0, np.zeros(hidden_size), np.zeros(hidden_size), 0.0)

    @property
    def variance(self) -> Float64[np.ndarray, " hidden"]:
        """The population variance of each column; NaN when there are no rows."""
        return self.squared_deviation / (self.count or np.nan)

    @property
    def mean_norm(self) -> float:
        """The mean Euclidean norm of a row; NaN when there are no rows."""
        return self.norm_sum / (self.count or np.nan)

    def merge(self, other: "LayerStatistics") -> "LayerStatistics":
        """Returns the statistics of both sets of rows together.

        The update is that of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
        computing sample variances" (1979), which loses no digits where the mean is large.
        """
        count = self.count + other.count
        if not other.count:
            return self
        step = other.mean - self.mean
        return LayerStatistics(
            count,
            self.mean + step * (other.count / count),
            self.squared_deviation
            + other.squared_deviation
            + step * step * (self.count * other.count / count),
            self.norm_sum + other.norm_sum,
        )


def measure(
    rows: Shaped[np.ndarray, "rows hidden"],
) -> tuple[LayerStatistics, Float32[np.ndarray, " rows"]]:
    """Measures rows that lie in one array: as `measure_pieces` of one piece."""
    return measure_pieces([rows], rows.shape[1])


def measure_pieces(
    pieces: Iterable[Shaped[np.ndarray, "piece_rows hidden"]], hidden_size: int
) -> tuple[LayerStatistics, Float32[np.ndarray, " rows"]]:
    """Measures the rows of all pieces, end to end, without putting them into one array.

    Args:
        pieces: any number of arrays [n, hidden], of any strides, in one of the stored dtypes.
        hidden_size: the width of a row; needed because `pieces` may be empty.

    Returns:
        The statistics, and the Euclidean norm of each row. The values do not depend on where one piece ends
        and the next begins. A norm is finite exactly when its row is (and its norm fits float32): squares
        that overflow are taken again in float64.
    """
    statistics = LayerStatistics.empty(hidden_size)
    norms = [np.empty(0, np.float32)]
    with np.errstate(over="ignore", invalid="ignore"):
        for block in _blocks(pieces, hidden_size):
            of_block, block_norms = _measure_block(block)
            statistics = statistics.merge(of_block)
            norms.append(block_norms)
    return statistics, np.concatenate(norms)


def _blocks(pieces: Iterable[np.ndarray], hidden_size: int) -> Iterator[np.ndarray]:
    """Yields the rows in float32, BLOCK_ROWS at a time, in a buffer that is used again for each block."""
    buffer = np.empty((BLOCK_ROWS, hidden_size), np.float32)
    filled = 0
    for piece in pieces:
        start = 0
        while start < len(piece):
            stop = min(len(piece), start + BLOCK_ROWS - filled)
            end = filled + stop - start
            buffer[filled:end] = piece[start:stop]
            start, filled = stop, end
            if filled == BLOCK_ROWS:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _measure_block(block: np.ndarray) -> tuple[LayerStatistics, np.ndarray]:
    """Measures a block of float32 rows, which it overwrites."""
    # einsum, not a BLAS product: BLAS threads would compete with the computation beside us.
    squares = np.einsum("ij,ij->i", block, block)
    if not np.isfinite(squares).all():
        wide = block.astype(np.float64)
        squares = np.einsum("ij,ij->i", wide, wide)
    root = np.sqrt(squares)
    mean = block.mean(axis=0, dtype=np.float64)
    block -= mean.astype(np.float32)
    deviation = np.einsum("ij,ij->j", block, block).astype(np.float64)
    statistics = LayerStatistics(len(block), mean, deviation, float(root.sum(dtype=np.float64)))
    return statistics, root.astype(np.float32)
