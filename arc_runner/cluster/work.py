"""Hands out the units that this process is to make, one by one, while the ones before are being made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from activation_store import ActivationWriter
from qwen2_core.requests import SequenceRequest


class Unit(NamedTuple):
    """Holds sequences that one process makes together: those of one task and one width, or of one call.

    Units are small, so that little is waited for at the end. The name follows from the sequences alone, so
    that all processes know a unit by the same name.
    """

    keys: tuple[str, ...]
    work: Any  # what the loop needs to make the sequences

    @property
    def name(self) -> str:
        return hashlib.sha256("".join(self.keys).encode()).hexdigest()[:32]


def keys_of(requests: Sequence[SequenceRequest]) -> tuple[str, ...]:
    """Returns the requests' keys in the store, which name a unit."""
    return tuple(request.key for request in requests if request.key is not None)


def left(units: Sequence[Unit], writer: ActivationWriter) -> list[Unit]:
    """Returns the units that have a sequence which is not committed."""
    return [unit for unit in units if not all(key in writer.committed for key in unit.keys)]


class Work(Protocol):
    """Hands out units to the loops that make them: the one thing that a loop knows of other processes."""

    def take(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Yields those of ``units`` that this process is to make.

        The loop asks for the next unit as soon as it has room for it, while the ones before are being made.
        """
        ...

    def wait(self, units: Sequence[Unit]) -> bool:
        """Waits, after all of ``units`` were offered and what was taken is made.

        Returns True if what is left of them is to be offered again, False if the loop is to end.
        """
        ...


class Share:
    """Hands out all that is left: the loop is given the requests of this process's share and no others."""

    def __init__(self, writer: ActivationWriter) -> None:
        self._writer = writer

    def take(self, units: Sequence[Unit]) -> Iterator[Unit]:
        return iter(left(units, self._writer))

    def wait(self, units: Sequence[Unit]) -> bool:
        return False
