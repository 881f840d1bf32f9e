"""Writing stored rows as a dataset that SAELens loads as cached activations.

That is a Hugging Face dataset (`datasets.load_from_disk`) with one float32 column of shape
[context_size, width] named after the hook, and a column `token_ids` of context_size int32 each. Load it with

    LanguageModelSAERunnerConfig(use_cached_activations=True, cached_activations_path=OUTPUT,
                                 hook_name="blocks.12.hook_resid_post", context_size=..., ...)
"""

import contextlib
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from activation_store.format import StoreError, StoreUsageError, StoreWriteError
from activation_store.local_files import LocalFiles
from activation_store.reader import ActivationStore
from activation_store.rows import STORED, OneLayer, RowFilter, row_filter, whole


def export_saelens(
    store: ActivationStore,
    layer: OneLayer,
    output: str | os.PathLike[str],
    context_size: int,
    rows: RowFilter | None = None,
) -> int:
    """Writes one layer to the new directory `output` as windows of `context_size` rows.

    Windows follow each other through the store without a gap: a sequence that ends within a window is
    followed by the next one. The rows after the last whole window (fewer than context_size) are left out.
    `output` is there once all of it is durable; what an interrupted export leaves beside it, in
    `.NAME.unfinished`, is cleared away by the next one.

    Args:
        store: the store to read.
        layer: which layer's rows, by its number, or another hook's, by its name.
        output: a directory that does not exist yet; a leading `~` is the home directory.
        context_size: rows in a window.
        rows: which rows to take, by default all.

    Returns:
        How many windows were written.

    Raises:
        StoreUsageError: the layer is not stored, the directory exists or is in the store, or there is not
            one window.
        StoreWriteError: it cannot be written; nothing is left.
        StoreError: the store is damaged, or the library `datasets` is not installed.
    """
    hook = store.settings.hook_names[store.require_layer(layer)]
    context_size = whole(context_size, "context_size")
    if not 1 <= context_size < 1 << 31:
        raise StoreUsageError(f"context_size must be at least 1 and below 2**31, not {context_size}")
    if "://" in os.fspath(output):
        raise StoreUsageError(f"an export is written to a local directory, not to {output}")
    target = Path(os.path.expanduser(output))  # noqa: PTH111 - raises for no user
    _check_target(store, target)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise StoreError("the export needs Hugging Face datasets: pip install datasets") from error
    # Counted before a window's memory is asked for; fewer may pass where they are chosen by their norm.
    ranges = (row_filter(rows).row_range(record) for record in store.sequences())
    windows = sum(stop - start for start, stop in ranges) // context_size
    if not windows or next(_windows(store, hook, context_size, rows), None) is None:
        raise StoreUsageError(f"the store has fewer than {context_size} such rows: not one window")
    features = datasets.Features(
        {
            hook: datasets.Array2D((context_size, store.settings.hook_widths[hook]), "float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=context_size),
        }
    )

    def examples() -> Iterator[dict[str, Any]]:
        for window, token_ids in _windows(store, hook, context_size, rows):
            yield {hook: window, "token_ids": token_ids}

    try:
        with _unfinished(target) as folder:
            # The library builds its tables in a cache first.
            dataset = datasets.Dataset.from_generator(
                examples, features=features, cache_dir=str(folder / "cache")
            )
            dataset.save_to_disk(str(folder / "dataset"))
            _sync(folder / "dataset")
            (folder / "dataset").rename(target)
            _sync(target.parent)
            return len(dataset)
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise _explained(error, target) from error


def _check_target(store: ActivationStore, target: Path) -> None:
    if os.path.lexists(target):
        raise StoreUsageError(f"{target} exists already; choose a new directory")
    if isinstance(store.files, LocalFiles) and target.resolve().is_relative_to(store.files.root.resolve()):
        raise StoreUsageError(f"{target} is in the store itself; choose another directory")


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`, of one export at a time, and removes it."""
    folder = target.with_name(f".{target.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "export.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise StoreError(f"another export is writing {target}; wait for it to end") from error
    try:
        for left in ("cache", "dataset"):
            if (folder / left).exists():
                shutil.rmtree(folder / left)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _sync(folder: Path) -> None:
    """Makes a folder and the files in it durable."""
    for path in [*folder.iterdir(), folder]:
        if path == folder or path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _explained(error: BaseException, target: Path) -> StoreError:
    """Returns the store's or the system's error behind one of the library's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StoreError):
            return cause
        if isinstance(cause, OSError):
            return StoreWriteError(
                f"cannot write {target}: {cause.strerror or cause}; nothing of it is left, the same command "
                "starts again"
            )
        cause = cause.__cause__ or cause.__context__
    return StoreError(f"{target} cannot be made: {error}")


def _windows(
    store: ActivationStore, hook: str, context_size: int, chosen: RowFilter | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows, float32 [context_size, width], and their tokens, int32 [context_size], end to end."""
    rows = np.empty((context_size, store.settings.hook_widths[hook]), np.float32)
    token_ids = np.empty(context_size, np.int32)
    filled = 0
    for data, columns, _ in store.iterate(hook, rows=chosen, dtype=STORED):
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
