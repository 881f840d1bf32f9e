"""Handing out work: what another process has committed in the meantime is not made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arc_runner.cluster.claims import Claims
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.shared_files import SharedFiles
from arc_runner.cluster.work import Shared, Unit
from arc_runner.signals import StopRequest


class Committing:
    """A writer that learns of the others' commits when it looks."""

    def __init__(self, by_others: set[str]) -> None:
        self.committed: set[str] = set()
        self._by_others = by_others

    def refresh(self) -> None:
        self.committed |= self._by_others


def test_a_claimed_unit_that_its_last_owner_has_committed_is_released_and_not_made_again(tmp_path: Path):
    made, left = Unit(("a", "b"), None), Unit(("c", "d"), None)
    writer: Any = Committing({"a", "b", "c"})
    with Claims(SharedFiles(str(tmp_path)), 0) as claims:
        work = Shared(writer, claims, ProcessInfo(0, 2, claims=True), StopRequest())
        assert list(work.take([made, left], 8)) == [left]
        assert claims.holder(made.name) is None
        assert claims.holder(left.name) == "0"
