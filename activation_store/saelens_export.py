"""Writing stored rows as a dataset that SAELens loads as cached activations.

That is a Hugging Face dataset (`datasets.load_from_disk`) with one float32 column of shape
[context_size, hidden] named after the hook, and a column `token_ids` of context_size int32 each. Load it with

    LanguageModelSAERunnerConfig(use_cached_activations=True, cached_activations_path=OUTPUT,
                                 hook_name="blocks.12.hook_resid_post", context_size=..., ...)
"""

import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.format import StoreError, hook_name
from activation_store.reader import ActivationStore
from activation_store.rows import STORED, RowFilter


def export_saelens(
    store: ActivationStore,
    layer: int,
    output: str | os.PathLike[str],
    context_size: int,
    rows: RowFilter | None = None,
) -> int:
    """Writes one layer to the new directory `output` as windows of `context_size` rows.

    Windows follow each other through the store without a gap: a sequence that ends within a window is
    followed by the next one. The rows after the last whole window (fewer than context_size) are left out.

    Args:
        store: the store to read.
        layer: which layer's rows.
        output: a directory that does not exist yet.
        context_size: rows in a window.
        rows: which rows to take, by default all.

    Returns:
        How many windows were written.

    Raises:
        StoreError: the layer is not stored, the directory exists, there is not one window, or the library
            `datasets` is not installed.
    """
    store.require_layer(layer)
    if context_size < 1:
        raise StoreError(f"context_size must be at least 1, not {context_size}")
    target = Path(output)
    if target.exists():
        raise StoreError(f"{target} exists already; choose a new directory")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise StoreError("the export needs Hugging Face datasets: pip install datasets") from error
    hook = hook_name(layer)
    features = datasets.Features(
        {
            hook: datasets.Array2D((context_size, store.settings.hidden_size), "float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=context_size),
        }
    )

    def examples() -> Iterator[dict[str, Any]]:
        for window, token_ids in _windows(store, layer, context_size, rows):
            yield {hook: window, "token_ids": token_ids}

    if next(examples(), None) is None:
        raise StoreError(f"the store has fewer than {context_size} such rows: not one window")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The library builds its tables in a cache first; beside the target, where there must be room anyway.
    with tempfile.TemporaryDirectory(dir=target.parent) as cache:
        dataset = datasets.Dataset.from_generator(examples, features=features, cache_dir=cache)
        dataset.save_to_disk(str(target))
        return len(dataset)


def _windows(
    store: ActivationStore, layer: int, context_size: int, chosen: RowFilter | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows, float32 [context_size, hidden], and their tokens, int32 [context_size], end to end."""
    rows = np.empty((context_size, store.settings.hidden_size), np.float32)
    token_ids = np.empty(context_size, np.int32)
    filled = 0
    for data, columns, _ in store.iterate(layer, rows=chosen, dtype=STORED):
        start = 0
        while start < len(data):
            stop = min(len(data), start + context_size - filled)
            end = filled + stop - start
            rows[filled:end] = data[start:stop]
            token_ids[filled:end] = columns.token_ids[start:stop]
            start, filled = stop, end
            if filled == context_size:
                yield rows.copy(), token_ids.copy()
                filled = 0
