"""Which sequences solved their puzzle, as a store notes it: `outcomes.json`, which a run can make again."""

import contextlib
import json
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.format import MANIFEST, StoreError, StoreWriteError
from activation_store.local_files import LocalFiles
from activation_store.remote_files import open_files
from activation_store.store_files import StoreFiles

OUTCOMES = "outcomes.json"
MAX_BYTES = 2**28  # five million sequences
_logger = logging.getLogger(__name__)


def read_outcomes(files: StoreFiles) -> dict[str, bool]:
    """Returns whether each sequence solved its puzzle, by key, as far as `write_outcomes` was told.

    Raises:
        StoreError: the file is damaged; a run writes it anew.
    """
    where = f"{files.location}/{OUTCOMES}"
    try:
        _require_file(files)
        data = files.read(OUTCOMES, 0, MAX_BYTES + 1)
        outcomes = None if len(data) > MAX_BYTES else json.loads(data)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"cannot read {where}: {error.strerror or error}") from error
    except (ValueError, RecursionError):  # a StoreError too: what was there was no file
        outcomes = None
    if not isinstance(outcomes, dict) or not all(type(solved) is bool for solved in outcomes.values()):
        raise StoreError(
            f"{where} is damaged; remove it, or run the same command again: it is made anew from the answers"
        )
    return outcomes


def write_outcomes(directory: str | os.PathLike[str], outcomes: Mapping[str, bool]) -> None:
    """Records which sequences, by key, solved their puzzle; earlier outcomes of other keys are kept.

    Call it from one process. `ActivationStore.sequences(solved=...)` filters by it. A damaged file is set
    aside with a warning.

    Raises:
        StoreError: there is no store, a key is no text, or an outcome is neither True nor False.
        StoreWriteError: the outcomes cannot be written.
    """
    checked = _checked(outcomes)
    files = open_files(directory)
    try:
        files.read(MANIFEST, 0, 1)
    except FileNotFoundError as error:
        raise StoreError(f"{files.location} is not an activation store: it has no {MANIFEST}") from error
    try:
        earlier = read_outcomes(files)
    except StoreError as error:
        if isinstance(error.__cause__, OSError):
            raise
        _logger.warning("%s/%s was damaged; it is made anew", files.location, OUTCOMES)
        _set_aside(files)
        earlier = {}
    files.replace(OUTCOMES, json.dumps(earlier | checked, indent=0, sort_keys=True).encode())


def _checked(outcomes: Mapping[str, bool]) -> dict[str, bool]:
    """Returns the outcomes as JSON has them; True and False of numpy are as good."""
    if not isinstance(outcomes, Mapping):
        raise StoreError(f"outcomes are {{key: True or False}}, not {outcomes!r:.100}")
    checked: dict[str, bool] = {}
    for key, solved in outcomes.items():
        if not isinstance(key, str):
            raise StoreError(f"{key!r:.100} is no key of a sequence, which is a text: give record.key")
        checked[key] = truth(solved, f"the outcome of sequence {key!r:.100}")
    return checked


def truth(value: Any, name: str) -> bool:
    """Returns True or False, of Python or numpy, as a bool; raises StoreError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise StoreError(f"{name} must be True or False, not {value!r:.100}")
    return bool(value)


def _require_file(files: StoreFiles) -> None:
    """Raises ValueError where something else has the name: reading a pipe would wait for ever."""
    if isinstance(files, LocalFiles) and not stat.S_ISREG((files.root / OUTCOMES).lstat().st_mode):
        raise ValueError


def _set_aside(files: StoreFiles) -> None:
    """Moves what is there out of the way, whatever it is, also from an earlier one that was set aside."""
    if isinstance(files, LocalFiles):
        aside = Path(files.root, f"{OUTCOMES}.damaged")
        number = 1
        while aside.exists() or aside.is_symlink():
            number += 1
            aside = aside.with_name(f"{OUTCOMES}.damaged-{number}")
        with contextlib.suppress(FileNotFoundError):
            try:
                Path(files.root, OUTCOMES).rename(aside)
            except OSError as error:
                raise StoreWriteError(f"cannot move {files.location}/{OUTCOMES}: {error.strerror}") from error
    else:
        files.set_aside(OUTCOMES)
