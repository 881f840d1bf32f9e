"""Ctrl-C and SIGTERM within one process. (What they do to the command line: test_stopping.)"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from arc_runner.signals import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """The signals that reach whoever handled them before."""
    numbers: list[int] = []
    before = {number: signal.signal(number, lambda n, _: numbers.append(n)) for number in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_while_results_are_made_a_signal_only_asks_to_stop(
    number: int, caught: list[int], capfd: pytest.CaptureFixture[str]
):
    stop = StopRequest()
    with stop.deferred():
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert "once more to stop at once" in capfd.readouterr().err
        assert caught == []


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_signal_does_what_it_did_before(first: int, second: int, caught: list[int]):
    with StopRequest().deferred():
        signal.raise_signal(first)
        signal.raise_signal(second)
    assert caught == [second]


@pytest.mark.parametrize("number", SIGNALS)
def test_once_a_stop_was_requested_the_next_signal_is_not_deferred_again(number: int, caught: list[int]):
    stop = StopRequest()
    with stop.deferred():
        signal.raise_signal(number)
    with stop.deferred():  # as while the last batch is written
        signal.raise_signal(number)
    assert caught == [number]


@pytest.mark.parametrize("number", SIGNALS)
def test_afterwards_signals_go_to_who_had_them_before(number: int, caught: list[int]):
    stop = StopRequest()
    with pytest.raises(OSError, match="full"), stop.deferred():
        raise OSError("full")
    signal.raise_signal(number)
    assert caught == [number]
    assert not stop.requested


def test_a_run_in_a_thread_leaves_signals_alone(caught: list[int]):
    def run() -> bool:
        stop = StopRequest()
        with stop.deferred():
            signal.raise_signal(signal.SIGINT)
        return stop.requested

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(run).result()
    assert caught == [signal.SIGINT]
