"""The page about own prompts says what works: its blocks run from top to bottom."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runner_cases import MODULES, environment

from activation_store import ActivationStore
from arc_runner.data import EXAMPLE_MODEL

PAGE = Path(__file__).parents[1] / "docs" / "prompts.md"


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path: Path):
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["bash"] * 4 + ["python"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    out = []
    for language, block in blocks:
        text = block.replace("arc_runner/data/tiny-qwen2", str(EXAMPLE_MODEL))
        text = text.replace("python distributed", f"python {MODULES}/distributed")
        words = ["bash", "-ec", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment() | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        out.append(done.stdout)
    _, plan, run, verified, notebook = out
    assert "3 (1 sample of each), 0 of them done already" in plan
    assert "completions in completions.jsonl, report in completions.report.json" in run
    assert verified == "3 sequences, 0 findings\n"
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()
    ]
    assert [one["id"] for one in lines] == ["sum", "brief", "open"]
    assert len(ActivationStore(tmp_path / "prompt-activations")) == 3
    assert re.search(r"(stop|length)\n\[\('", notebook)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("completions.jsonl", "completions.report.json", "prompt-activations", "prompts.jsonl"),
    ]
