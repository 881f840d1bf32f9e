"""A file of own prompts, and a run on it that several tests read."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from runner_cases import Outcome, run_main

_SCRATCH = tempfile.TemporaryDirectory()
QUESTION = {"id": "sum", "prompt": "What is 2 + 2?"}
CHAT = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Höi, 世界"}],
    "meta": {"from": "a test"},
}
TEXT = {"id": 7, "text": "<|im_start|>The rule is"}
TOO_LONG = {"id": "long", "text": "7" * 40_000}


def write_prompts(folder: Path, *prompts: Any) -> Path:
    """A file with one prompt a line; a text stands as it is."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in prompts]
    file = folder / "prompts.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def run_prompts(folder: Path, **flags: Any) -> Outcome:
    """The runner on ``prompts.jsonl`` of a folder, in this process."""
    asked: dict[str, Any] = {
        "prompts": folder / "prompts.jsonl",
        "output_filepath": folder / "completions.jsonl",
        "dataset_path": None,
        "grid_encoder": None,
        "predictions_per_task": None,
    }
    return run_main(folder, **(asked | flags))


def completions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@functools.cache
def answered() -> tuple[Path, Outcome]:
    """A folder where prompts were answered, beside one too long and a bad line. Not to be changed."""
    folder = Path(_SCRATCH.name) / "answered"
    folder.mkdir()
    write_prompts(folder, QUESTION, CHAT, "{torn", TEXT, TOO_LONG)
    return folder, run_prompts(folder, extract_prompt=True)
