"""Mean, variance and norm of stored rows, gathered while writing and mergeable in any order."""

from dataclasses import dataclass

import numpy as np

# Rows measured at a time: a float32 copy of them stays in the processor's cache.
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class LayerStatistics:
    """Of `count` rows: the mean of each column, its summed squared deviation, and the summed row norm."""

    count: int
    mean: np.ndarray  # float64 [hidden]
    squared_deviation: np.ndarray  # float64 [hidden]
    norm_sum: float

    @classmethod
    def empty(cls, hidden_size: int) -> "LayerStatistics":
        return cls(0, np.zeros(hidden_size), np.zeros(hidden_size), 0.0)

    @property
    def variance(self) -> np.ndarray:
        """Population variance of each column, float64 [hidden]; NaN when there are no rows."""
        return self.squared_deviation / (self.count or np.nan)

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row; NaN when there are no rows."""
        return self.norm_sum / (self.count or np.nan)

    def merge(self, other: "LayerStatistics") -> "LayerStatistics":
        """The statistics of both sets of rows together (Chan's update)."""
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


def measure(rows: np.ndarray) -> tuple[LayerStatistics, np.ndarray]:
    """Statistics and row norms (float32 [n]) of `rows` [n, hidden], of any of the stored dtypes.

    A norm is finite exactly when its row is (and its norm fits float32): squares that overflow are taken
    again in float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return _measure(rows)


def _measure(rows: np.ndarray) -> tuple[LayerStatistics, np.ndarray]:
    statistics = LayerStatistics.empty(rows.shape[1])
    norms = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS].astype(np.float32)
        # einsum, not a BLAS product: BLAS threads would compete with the computation beside us.
        squares = np.einsum("ij,ij->i", block, block)
        if not np.isfinite(squares).all():
            wide = block.astype(np.float64)
            squares = np.einsum("ij,ij->i", wide, wide)
        root = np.sqrt(squares)
        norms[start : start + len(block)] = root
        mean = block.mean(axis=0, dtype=np.float64)
        block -= mean.astype(np.float32)
        deviation = np.einsum("ij,ij->j", block, block).astype(np.float64)
        statistics = statistics.merge(
            LayerStatistics(len(block), mean, deviation, float(root.sum(dtype=np.float64)))
        )
    return statistics, norms
