"""Ctrl-C and SIGTERM within one process. (A second signal ends the process: test_distributed_jitted.)"""

from __future__ import annotations

import signal

import pytest

from run_signals import StopRequest

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_where_nothing_would_be_lost_a_signal_interrupts(number: int, capfd: pytest.CaptureFixture[str]):
    stop = StopRequest()
    with stop.on_signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert stop.requested
    assert "once more to stop at once" in capfd.readouterr().err


@SIGNALS
def test_while_results_are_made_it_only_asks_to_stop(number: int):
    stop = StopRequest()
    with stop.on_signals():
        with stop.deferred():
            assert not stop.requested
            signal.raise_signal(number)
        assert stop.requested


def test_the_handlers_of_before_are_put_back():
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with StopRequest().on_signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before
