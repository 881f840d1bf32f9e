"""Hands out the sequences that this process is to make, one by one, while the ones before are being made."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from qwen2_core.requests import SequenceRequest


def keys_of(requests: Sequence[SequenceRequest]) -> tuple[str, ...]:
    """Returns the requests' keys in the store."""
    return tuple(request.key for request in requests if request.key is not None)


class Work(Protocol):
    """Hands out sequences to the loop that makes them: the one thing that it knows of other processes."""

    @property
    def widths(self) -> Collection[int]:
        """The buckets of all prompts that may come."""
        ...

    @property
    def hastens(self) -> bool:
        """Whether others wait for what has ended here, so that it is to be committed at once."""
        ...

    def next_width(self) -> int | None:
        """Returns the bucket of the next sequence's prompt once it is known; None where no more comes."""
        ...

    def requests(self, widths: Collection[int]) -> Iterator[SequenceRequest | None]:
        """Yields the next sequences as long as their prompts are of these buckets; None while none is there.

        The loop asks for the next one as soon as it has room for it.
        """
        ...


class Everything:
    """Hands out all of some requests in their order: this process makes all that is left of its part."""

    hastens = False

    def __init__(self, requests: Sequence[SequenceRequest]) -> None:
        self._left = list(reversed(requests))
        self.widths = {request.width for request in requests}

    def next_width(self) -> int | None:
        return self._left[-1].width if self._left else None

    def requests(self, widths: Collection[int]) -> Iterator[SequenceRequest | None]:
        while self._left and self._left[-1].width in widths:
            yield self._left.pop()
