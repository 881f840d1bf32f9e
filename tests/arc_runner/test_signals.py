"""Signals within one process. (What they do to the command line: test_stopping.)"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from arc_runner.signals import StopRequest, end_on_signals, let_end

SIGNALS = [signal.SIGINT, signal.SIGTERM]
WARNINGS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """The signals that reach whoever handled them before."""
    numbers: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: numbers.append(n)) for number in (*SIGNALS, *WARNINGS)
    }
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


@pytest.mark.parametrize("number", WARNINGS)
def test_what_schedulers_and_terminals_send_asks_to_stop_however_often_it_comes(
    number: signal.Signals, caught: list[int], capfd: pytest.CaptureFixture[str]
):
    stop = StopRequest()
    for _ in range(3):  # also while the last batch is written
        with stop.deferred():
            signal.raise_signal(number)
            assert stop.requested
            signal.raise_signal(number)
    assert capfd.readouterr().err == f"{number.name}: stopping as soon as the running work is done\n"
    assert caught == []


def test_a_ctrl_c_after_a_warning_does_what_it_did_before(caught: list[int]):
    with StopRequest().deferred():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)
    assert caught == [signal.SIGINT]


def test_a_warning_after_a_ctrl_c_says_nothing_new(caught: list[int]):
    stop = StopRequest()
    with stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
    with stop.deferred():
        signal.raise_signal(signal.SIGHUP)
    assert caught == []


def test_what_is_ignored_stays_ignored(caught: list[int]):
    """As after nohup, or for Ctrl-C in a script's background job."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_on_signals()
    stop = StopRequest()
    with stop.deferred():
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.raise_signal(number)
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_IGN
    assert not stop.requested


def test_once_the_exit_code_is_decided_no_signal_changes_it(caught: list[int]):
    end_on_signals()
    let_end()
    for number in (*SIGNALS, *WARNINGS):
        signal.raise_signal(number)
    assert caught == []


def test_the_handlers_of_a_program_that_calls_the_command_are_left_alone(caught: list[int]):
    let_end()
    signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGTERM]
