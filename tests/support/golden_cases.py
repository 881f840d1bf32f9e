"""What the golden files hold, shared by the script that makes them and the test that reads them.

A whole record of every row would take megabytes. A file keeps, for every position of every sequence, each
chosen layer's norm and its projection on a few fixed orthonormal directions: a row that is wrong anywhere
is wrong there, to within chance. Logits are kept whole, at some positions.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from lively import DEEP, SHALLOW, Lively

FOLDER = Path(__file__).parents[1] / "golden"
STEPS = 64
LENGTHS = (1, 17, 130)
LOGIT_STRIDE = 7
DIRECTIONS = 4

CASES = {
    "deep": DEEP,
    "mqa_untied": dataclasses.replace(SHALLOW, kv_heads=1, tied=False, extract=(5, 2), seed=2),
}


def directions(lively: Lively) -> np.ndarray:
    """Orthonormal columns [hidden, DIRECTIONS], from raw random bits, which numpy never changes."""
    raw = np.random.PCG64(lively.hidden).random_raw(lively.hidden * DIRECTIONS)
    values = raw.astype(np.float64) / 2.0**64 - 0.5
    basis = []
    for vector in values.reshape(DIRECTIONS, lively.hidden):
        for earlier in basis:
            vector = vector - (vector @ earlier) * earlier
        basis.append(vector / np.linalg.norm(vector))
    return np.stack(basis, axis=1)


def check_values(rows: np.ndarray, lively: Lively) -> np.ndarray:
    """What is kept of rows [..., hidden]: [..., 1 + DIRECTIONS], the norm and then the projections."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=-1, keepdims=True)
    return np.concatenate([norms, wide @ directions(lively)], axis=-1)
