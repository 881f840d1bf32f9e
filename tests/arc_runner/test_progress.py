"""How far a run is: its speed, and what is left."""

from __future__ import annotations

import time

import pytest

from arc_runner.progress import Clock, Progress, shown_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one entry is the time."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_clock_adds_up_its_seconds_those_that_run_too(clock: list[float]):
    one = Clock()
    for expected in (3.0, 6.0):
        with one:
            clock[0] += 3
            assert one.seconds == expected
        clock[0] += 100
        assert one.seconds == expected


def test_the_speed_counts_tokens_of_sequences_that_run_and_no_time_of_compiling(clock: list[float]):
    progress = Progress(total=4, generating=Clock(), solved=lambda: None)
    clock[0] += 1000  # compiling
    assert (progress.tokens_per_second, progress.seconds_left) == (0.0, None)
    with progress.generating:
        clock[0] += 10
        progress.count_steps(tokens=100, slots=4, slots_in_use=3)
        assert progress.tokens_per_second == 10.0
        assert progress.facts() == ["10.0 tokens/s", "3 of 4 slots"]


def test_the_time_left_is_as_if_the_others_got_as_long_as_those_that_have_ended(clock: list[float]):
    progress = Progress(total=4, generating=Clock(), solved=lambda: (1, 3))
    with progress.generating:
        clock[0] += 10
        progress.count_steps(tokens=100, slots=2, slots_in_use=2)
        progress.count_sequence(tokens=60)
        # 3 x 60 tokens are to come, 40 of them are there.
        assert progress.seconds_left == 14.0
        assert progress.facts()[2:] == ["1 of 3 tasks solved", "14 s left"]
        progress.done_elsewhere = 1
        assert (progress.done, progress.seconds_left) == (2, 8.0)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (3599, "59:59"), (7207, "2:00:07")]
)
def test_durations_are_short(seconds: float, shown: str):
    assert shown_seconds(seconds) == shown
