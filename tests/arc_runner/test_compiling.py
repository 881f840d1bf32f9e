"""Which programs are being compiled, and for how long."""

from __future__ import annotations

import time

import pytest

from arc_runner.compiling import Compiling


def test_programs_that_are_compiled_side_by_side_are_named_with_their_seconds(
    monkeypatch: pytest.MonkeyPatch,
):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    compiling = Compiling()
    with compiling.program("window"):
        now[0] += 2
        with compiling.program("prefill of width 64"):
            now[0] += 3
            assert compiling() == "compiling window 5 s, prefill of width 64 3 s"
        assert compiling() == "compiling window 5 s; done: prefill of width 64"
        now[0] += 1.5
    assert compiling() == "compiled prefill of width 64, window"
    assert compiling.summary() == "window 6.5 s, prefill of width 64 3.0 s"
