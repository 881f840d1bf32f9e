"""What the driver of a run on Ray and its workers tell each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from activation_store import FinishedSequence, StoreSettings
from activation_store.format import host_name
from activation_store.local_files import LOCK
from activation_store.remote_files import open_files
from arc_runner.options import RunOptions
from qwen2_core.requests import SequenceRequest

DRIVER = 0  # its host index; it writes no sequences, and is there so that no other run writes
ANSWER_SECONDS = 1.0  # within which a worker answers an order


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What each worker of a run is told once."""

    options: RunOptions  # with absolute paths
    settings: StoreSettings
    eos: tuple[int, ...]
    interventions: bytes | None
    widths: tuple[int, ...]  # the buckets of all prompts that are left
    lock: bytes  # what is written in the lock of the driver's host folder, to know the store by; b"" at a URL


@dataclasses.dataclass(frozen=True)
class Order:
    """What the driver asks of a worker; the answer is a ``Status``."""

    requests: Sequence[SequenceRequest] = ()  # to make, after those of earlier orders
    hastens: bool = False  # nothing waits any more: commit soon what has ended
    stops: bool = False  # store what has ended, and end


@dataclasses.dataclass(frozen=True)
class Status:
    """How a worker is, and what has happened since its last status."""

    phase: str  # "loading", "compiling", "generating", "waiting", "storing", "ended"
    room: int = 0  # sequences that it could take
    ended: Sequence[FinishedSequence] = ()  # on their way to the store; without rows
    notices: Sequence[str] = ()  # sentences for the user
    failure: str = ""  # why it has ended, if not by order
    blames: bool = False  # whether what it was making may have caused that
    tokens_per_second: float = 0.0
    tokens: int = 0  # generated so far, also of sequences that have not ended
    slots: int = 0
    slots_in_use: int = 0
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as ``figures_of`` has them


def lock_of(directory: str) -> bytes:
    """Returns what the lock of the driver's host folder says: another in every run. Behind a URL b""."""
    files = open_files(directory)
    if not files.excludes_others:
        return b""
    try:
        return files.read(f"{host_name(DRIVER)}/{LOCK}")
    except OSError:
        return b"?"
