"""benchmarks/on_gpu: tried whole at a tiny shape, and its checks see what they are there for."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_store.format import FinishedSequence
from benchmarks import on_gpu, on_gpu_checks
from benchmarks.on_gpu_checks import Outcome, differences, equal_bytes
from benchmarks.on_gpu_models import SMALL, TINY, TINY_LAYERS, random_params
from benchmarks.on_gpu_trace import Kernel, kernels_of
from qwen2_engine import ContinuousEngine

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "on_gpu.sh"


@pytest.mark.slow
def test_every_section_runs_at_the_small_scale_and_is_written(tmp_path: Path):
    pytest.importorskip("torch", reason="half of it compares with torch: pip install '.[parity]'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OUT": str(tmp_path), "PYTHON": sys.executable}
    run = subprocess.run(
        [SCRIPT, "--small"], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "gpu-cpu-small.json").read_text())
    assert list(report["sections"]) == list(on_gpu.sections(SMALL))
    assert report["skipped"] == []
    assert {"device", "nvidia_smi", "jax", "date", "commit"} <= set(report["machine"])
    assert report["command"] == "benchmarks/on_gpu.sh --small"
    for name, result in report["sections"].items():
        assert result["problems"] == []
        assert result["figures"]
        assert name in (tmp_path / "gpu-cpu-small.md").read_text()
        assert name in run.stdout
    assert report["sections"]["kernels, batch 1"]["figures"]["kernels"][0]["microseconds"] > 0


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the program with made-up sections; returns its exit code and what it wrote."""

    def run(sections: dict[str, Any], budget: float = 100) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(on_gpu, "sections", lambda _: sections)
        monkeypatch.setattr(sys, "argv", ["on_gpu", "--small"])
        monkeypatch.setenv("OUT", str(tmp_path))
        monkeypatch.setenv("BUDGET_SECONDS", str(budget))
        code = on_gpu.main()
        return code, json.loads((tmp_path / "gpu-cpu-small.json").read_text())

    return run


def test_a_section_that_fails_is_one_line_and_the_others_run(run_main: Any, capsys: Any):
    def broken(_: Any) -> Outcome:
        raise ValueError("two\nlines")

    code, report = run_main({"broken": broken, "sound": lambda _: Outcome({"figure": 1.5})})
    assert code == 1
    assert report["sections"]["broken"]["problems"] == ["ValueError: two lines"]
    assert report["sections"]["sound"]["figures"] == {"figure": 1.5}
    assert "broken; FAILED: ValueError: two lines\n" in capsys.readouterr().out


def test_sections_are_skipped_and_named_once_the_time_is_up(run_main: Any, capsys: Any):
    code, report = run_main({"late": lambda _: Outcome({}), "later": lambda _: Outcome({})}, budget=-1)
    assert code == 0
    assert report["sections"] == {}
    assert report["skipped"] == ["late", "later"]
    assert "late; later" in capsys.readouterr().out


def test_a_section_is_chosen_by_its_beginning_up_to_a_whole_number():
    assert on_gpu.begins("decode, batch 1", "decode, batch 1")
    assert on_gpu.begins("decode, batch 128", "decode")
    assert not on_gpu.begins("decode, batch 128", "decode, batch 1")


# --- Equal bytes --------------------------------------------------------------------------------------------


def finished() -> FinishedSequence:
    rows = np.ones((2, 3, 4), np.float32)
    name: Any = 7
    return FinishedSequence(name, np.arange(3, dtype=np.int32), np.zeros(3, np.float32), "length", rows)


@pytest.mark.parametrize("name", ["token_ids", "logprobs", "rows"])
def test_one_bit_of_a_sequence_is_noticed(name: str):
    assert differences([finished()], [finished()]) == []
    spoilt = finished()
    changed = getattr(spoilt, name).copy()
    changed.reshape(-1).view(np.uint8)[-4] ^= 1
    spoilt = dataclasses.replace(spoilt, **{name: changed})
    assert differences([finished()], [spoilt]) == [f"sequence 7: 1 of {changed.size} values of {name} differ"]


@pytest.mark.slow
def test_random_keys_that_depend_on_the_slot_are_noticed(monkeypatch: pytest.MonkeyPatch):
    class Faulty(ContinuousEngine):
        def start(self, stage: Any, *compiling: Any, **named: Any) -> Any:
            running: Any = super().start(stage, *compiling, **named)
            sound = running.programs.insert

            def insert(slots: Any, prompts: Any, new: Any, sampling: Any) -> Any:
                wrong = new.sequence_id + new.slot.astype(np.uint32)
                return sound(slots, prompts, dataclasses.replace(new, sequence_id=wrong), sampling)

            running.programs = dataclasses.replace(running.programs, insert=insert)
            return running

    params = random_params(TINY)
    assert equal_bytes(TINY, TINY_LAYERS, params, slots=4).problems == []
    monkeypatch.setattr(on_gpu_checks, "ContinuousEngine", Faulty)
    problems = equal_bytes(TINY, TINY_LAYERS, params, slots=4).problems
    assert any(problem.startswith("in the opposite order: ") for problem in problems)


# --- Kernels ------------------------------------------------------------------------------------------------


def test_only_the_streams_of_a_gpu_are_counted():
    def named(kind: str, pid: int, name: str, tid: int = 0) -> dict[str, Any]:
        return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}

    def event(name: str, pid: int, tid: int, dur: float) -> dict[str, Any]:
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "dur": dur, "args": {"hlo_op": "dot"}}

    events = [
        named("process", 1, "/device:GPU:0"),
        named("process", 2, "/host:CPU"),
        named("thread", 1, "Stream #13(Compute)", 13),
        named("thread", 1, "XLA Ops", 14),
        event("gemm", 1, 13, 2.0),
        event("fusion", 1, 13, 5.0),
        event("gemm", 1, 13, 4.0),
        event("dot", 1, 14, 6.0),
        event("python", 2, 1, 100.0),
    ]
    assert kernels_of(events) == [Kernel("gemm", 6.0, 2), Kernel("fusion", 5.0, 1)]
