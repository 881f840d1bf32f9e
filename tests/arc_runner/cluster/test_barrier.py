"""The barrier at the end: process 0 learns how the others have ended, and waits for nobody who is dead."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from meeting import free_address, meeting, processes

from arc_runner.cluster import barrier
from arc_runner.cluster.barrier import DONE, STOPPED, tell_end, telling_failure, wait_for_others
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.signals import StopRequest


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ProcessInfo]]:
    """Processes that have met, of which none is heard of unless a test says so."""
    monkeypatch.setattr(barrier, "POLL_SECONDS", 0.05)
    with meeting(3) as found:
        yield found


def counting_down(*counts: int) -> Callable[[], int]:
    """The sequences left, as they are seen one time after the other; the last number stays."""
    numbers = list(counts)
    return lambda: numbers.pop(0) if len(numbers) > 1 else numbers[0]


def test_process_0_waits_until_all_have_ended(three: list[ProcessInfo]):
    later = threading.Timer(0.5, lambda: tell_end(three[2], DONE))
    assert tell_end(three[1], DONE)
    later.start()
    began = time.monotonic()
    assert wait_for_others(three[0], lambda: 0, StopRequest()) == {1: DONE, 2: DONE}
    assert time.monotonic() - began >= 0.4
    later.join()


def test_a_process_that_stops_early_is_not_waited_for_and_nor_are_the_others(three: list[ProcessInfo]):
    tell_end(three[2], STOPPED)
    assert wait_for_others(three[0], lambda: 5, StopRequest()) == {2: STOPPED}


def test_process_0_gives_up_once_nothing_is_stored_any_more(
    three: list[ProcessInfo], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(barrier, "NEWS_SECONDS", 0.5)
    tell_end(three[1], DONE)
    began = time.monotonic()
    left = counting_down(*range(30, 6, -1))  # one more is stored before each of 23 looks
    assert wait_for_others(three[0], left, StopRequest()) == {1: DONE}
    assert time.monotonic() - began >= 1.5


def test_figures_of_a_process_that_died_at_its_very_end_are_not_waited_for_long(
    three: list[ProcessInfo], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(barrier, "FIGURES_SECONDS", 0.3)
    tell_end(three[1], DONE)
    assert wait_for_others(three[0], lambda: 0, StopRequest()) == {1: DONE}


def test_what_the_others_have_stored_may_be_seen_a_little_later(three: list[ProcessInfo]):
    for process in three[1:]:
        tell_end(process, DONE)
    left = counting_down(3, 3, 3, 0)
    assert wait_for_others(three[0], left, StopRequest()) == {1: DONE, 2: DONE}
    assert left() == 0


def test_a_stop_ends_the_waiting(three: list[ProcessInfo]):
    stop = StopRequest()
    later = threading.Timer(0.2, lambda: setattr(stop, "requested", True))
    later.start()
    assert wait_for_others(three[0], lambda: 1, stop) == {}
    later.join()


def test_a_process_that_fails_tells_so(three: list[ProcessInfo]):
    with pytest.raises(OSError, match="disk"), telling_failure(three[1]):
        raise OSError("disk")
    assert wait_for_others(three[0], lambda: 1, StopRequest()) == {1: STOPPED}


def test_where_process_0_has_ended_nobody_waits():
    *_, last = processes(2, free_address())
    began = time.monotonic()
    assert not tell_end(last, DONE)
    assert time.monotonic() - began < 5


def test_a_process_0_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    """Its port still takes connections, and nobody answers."""
    monkeypatch.setattr(barrier, "_CONNECT_SECONDS", 0.3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        assert not tell_end(ProcessInfo(1, 2, address), DONE)
