"""Where pictures of a store go, and what they are called."""

import os
import re
from pathlib import Path

from activation_store.format import StoreUsageError
from activation_store.local_files import LocalFiles
from activation_store.reader import ActivationStore

_MOST_LETTERS = 80


def target_outside(store: ActivationStore, output: str | os.PathLike[str]) -> Path:
    """Returns a local path to write to; StoreUsageError for a URL or a place in the store itself."""
    if "://" in os.fspath(output):
        raise StoreUsageError(f"pictures are written to a local place, not to {output}")
    target = Path(output)
    if isinstance(store.files, LocalFiles) and target.resolve().is_relative_to(store.files.root.resolve()):
        raise StoreUsageError(f"{target} is in the store itself; choose another place")
    return target


def store_name(store: ActivationStore) -> str:
    """Returns the name of a store's directory, as it can be part of any file's name."""
    if isinstance(store.files, LocalFiles):
        name = store.files.root.resolve().name
    else:
        name = store.directory.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.+-]+", "_", name)[:_MOST_LETTERS] or "store"
