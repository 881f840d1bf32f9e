"""Tiny lively models of every kind of RoPE and of sliding windows, and their frequencies in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from lively import SHALLOW, Lively

CONTEXT = 32  # the original one of those whose RoPE is scaled
HALF = 8  # pairs of a head
FACTOR = 4.0
LONG = {
    "short_factor": [1 + 0.02 * i for i in range(HALF)],
    "long_factor": [1 + 0.5 * i for i in range(HALF)],
    "original_max_position_embeddings": CONTEXT,
}
LLAMA = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": CONTEXT}
WINDOW = {"use_sliding_window": True, "sliding_window": 24}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 4 * CONTEXT, "rope_scaling": {"rope_type": kind, **settings}}


SETTINGS: dict[str, dict[str, Any]] = {
    "linear": _rope("linear", factor=FACTOR),
    "dynamic": _rope("dynamic", factor=FACTOR) | {"max_position_embeddings": CONTEXT},
    "yarn": _rope("yarn", factor=FACTOR, original_max_position_embeddings=CONTEXT),
    "llama3": _rope("llama3", factor=FACTOR, **LLAMA),
    "longrope": _rope("longrope", **LONG),
    "windows above layer 0": WINDOW | {"max_window_layers": 1},
    "windows in all layers": WINDOW | {"max_window_layers": 0, "sliding_window": 5},
    "windows in every second layer, yarn": WINDOW
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    | _rope("yarn", factor=FACTOR, original_max_position_embeddings=CONTEXT, beta_slow=0.5, truncate=False),
}


def variant(name: str, **changes: Any) -> Lively:
    """Returns the model of three layers, all of them captured."""
    settings = tuple(SETTINGS[name].items())
    return dataclasses.replace(SHALLOW, layers=3, extract=(0, 1, 2), seed=3, settings=settings, **changes)


def exact_rope(name: str, theta: float, length: int) -> tuple[np.ndarray, float]:
    """Returns the frequencies of a text of so many tokens and the attention factor, in float64."""
    rope: dict[str, Any] = SETTINGS[name].get("rope_scaling", {"rope_type": "default"})
    pairs, kind = np.arange(HALF), rope["rope_type"]
    plain = theta ** (-pairs / HALF)
    if kind == "linear":
        return plain / FACTOR, 1.0
    if kind == "dynamic":
        grown = FACTOR * max(length, CONTEXT) / CONTEXT - (FACTOR - 1)
        return (theta * grown ** (HALF / (HALF - 1))) ** (-pairs / HALF), 1.0
    if kind == "longrope":
        by = rope["long_factor" if length > CONTEXT else "short_factor"]
        return plain / np.array(by), math.sqrt(1 + math.log(FACTOR) / math.log(CONTEXT))
    turns = CONTEXT * plain / (2 * math.pi)  # within the original context
    if kind == "llama3":
        kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
        return plain * (kept + (1 - kept) / FACTOR), 1.0
    if kind == "yarn":
        ends = [
            HALF * math.log(CONTEXT / (2 * math.pi * count)) / math.log(theta)
            for count in (32.0, rope.get("beta_slow", 1.0))
        ]
        first, last = ends if rope.get("truncate") is False else (math.floor(ends[0]), math.ceil(ends[1]))
        first, last = max(first, 0), min(last, 2 * HALF - 1)
        divided = np.clip((pairs - first) / (last - first), 0, 1)
        return plain * (1 - divided + divided / FACTOR), 0.1 * math.log(FACTOR) + 1
    return plain, 1.0
