"""Benchmarks that nothing else runs do run: of the embedded model, and of results that are committed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_goodput, plot_peers

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_goodput_counts_the_same_tokens_in_slots_and_in_static_batches(tmp_path: Path):
    report = tmp_path / "report.json"
    options = "--sequences 3 --samples 2 --slots 2 --dtype float32 --without transformers --output"
    command = [sys.executable, "-m", "benchmarks.bench_goodput", *options.split(), str(report)]
    subprocess.run(command, cwd=ROOT, check=True)
    written = json.loads(report.read_text())
    assert (written["sequences"], written["samples"]) == (6, 2)
    results = written["results"]
    assert results["slots"]["tokens"] == results["static batches"]["tokens"] > 0
    assert all(one["seconds"] > one["prefill_seconds"] > 0 for one in results.values())


def test_prompts_are_told_apart_where_each_comes_equally_often():
    one, other = np.arange(3), np.arange(4)
    different, samples = bench_goodput.without_repeats([one, one, other, other])
    assert [len(prompt) for prompt in different] == [3, 4]
    assert samples == 2
    assert bench_goodput.without_repeats([one, one, other])[1] == 1


def test_the_limit_is_the_steps_whose_bytes_memory_delivers():
    result = {"bandwidth_beside_rounds": [1e9, 3e9, 9e9], "bytes_per_step": 1_000_000_000}
    assert plot_peers.limit_of(result) == 3


def test_a_picture_is_drawn_of_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib", reason="the extra `plots`")
    names = ("cpu-2core-amx-batch-1-8-32", "peers-cpu-2core-avx2")
    results = [str(ROOT / "benchmarks/results" / f"{name}.json") for name in names]
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["plot", str(picture), *results])
    plot_peers.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
