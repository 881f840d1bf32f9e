"""How the workers of a torch DataLoader know which epoch they read.

They are copies of one object in other processes. Each iteration over the loader makes them anew, or lets the
same ones begin again, and nobody tells them how often that happened before.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import weakref
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

from activation_store.format import StoreError


class WorkerEpochs:
    """Counts the iterations of loaders, in a folder of symbolic links, which are made at once or not at all.

    The main process begins a round each time its batches are set to a place. In a round the first worker of
    an iteration gives it the next number, and the others find it there. Copies in other processes share the
    folder, which is removed with the object that made it.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="batches-")
        self._round = 0
        weakref.finalize(self, _remove, self._folder, os.getpid())

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return WorkerEpochs, ()  # a copy that is used for itself
        return _shared, (self._folder, self._round)  # a worker's

    def begin(self, place: dict[str, Any]) -> None:
        """Begins a round at a place, plain values. Workers that go on from earlier rounds will find it."""
        self._round += 1
        with contextlib.suppress(FileNotFoundError):  # when Python ends
            self._path(str(self._round)).symlink_to(json.dumps(place))

    def claim(self, iteration: str, follow: bool) -> tuple[dict[str, Any] | None, int]:
        """Returns the place of the round and the number of an iteration in it, from 0.

        Args:
            iteration: the same for all workers of one iteration, and another for each iteration.
            follow: looks for rounds begun since this copy was made. The place is None where there are none.
        """
        place = None
        while follow and self._path(str(self._round + 1)).is_symlink():
            self._round += 1
            place = json.loads(str(self._path(str(self._round)).readlink()))
        for number in itertools.count():
            claimed = self._path(f"{self._round}-{number}")
            try:
                claimed.symlink_to(iteration)
            except FileExistsError:
                if str(claimed.readlink()) != iteration:
                    continue
            except FileNotFoundError as error:
                raise StoreError(
                    f"{self._folder}, where the workers of a DataLoader count epochs, was removed; set "
                    "TMPDIR to a folder that stays"
                ) from error
            return place, number
        raise AssertionError("counting does not end")

    def _path(self, name: str) -> Path:
        return Path(self._folder, name)


def _shared(folder: str, number: int) -> WorkerEpochs:
    """Returns a worker's copy, which leaves the folder to the process that made it."""
    epochs = WorkerEpochs.__new__(WorkerEpochs)
    epochs._folder, epochs._round = folder, number
    return epochs


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker has a copy of the object, and must leave its folder alone
        shutil.rmtree(folder, ignore_errors=True)
