"""Every way in which a store is read, verified and continued, for stores that somebody has tampered with."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from activation_fakes import SETTINGS

from activation_store import ActivationStore, ActivationWriter, ShuffledBatches, StoreError, verify_store
from activation_store.verify import store_notes


def read_everything(directory: Path) -> Iterator[Callable[[], Any]]:
    """Yields each way in which a store is read."""
    opened = ActivationStore(directory)
    yield lambda: list(opened.sequences())
    yield lambda: list(store_notes(opened))
    yield lambda: opened.statistics(11)
    yield lambda: list(opened.iterate(11))
    yield lambda: list(ShuffledBatches(opened, 11, 8))
    yield lambda: [opened.sequence_digest(record) for record in opened.sequences()]
    yield lambda: [opened.columns(record, 11) for record in opened.sequences()]


def problems(directory: Path) -> list[str]:
    """Returns what each way of reading a store, its verification and its continuation say against it."""
    said: list[str] = []
    try:
        for read in read_everything(directory):
            try:
                read()
            except StoreError as error:
                said.append(str(error))
        said += verify_store(ActivationStore(directory))
    except StoreError as error:
        said.append(str(error))
    with (
        contextlib.suppress(StoreError),  # it makes again what is damaged, or refuses
        ActivationWriter(directory, SETTINGS, provenance={}) as writer,
    ):
        said += writer.dropped
    return said


def sentences(said: list[str]) -> bool:
    return bool(said) and all("\n" not in one and len(one) < 1000 for one in said)


def problems_of_reading(directory: Path) -> list[str]:
    said: list[str] = []
    for read in read_everything(directory):
        try:
            read()
        except StoreError as error:
            said.append(str(error))
    return said + list(verify_store(ActivationStore(directory)))
