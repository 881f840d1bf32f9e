"""The examples in the docstrings of arc_puzzles run and give what they show."""

import doctest
import importlib
import json
from pathlib import Path

import pytest
from puzzle_cases import GOOD, SHAPE
from transformers import AutoTokenizer

from arc_puzzles import Augmentation
from arc_runner.data import EXAMPLE_MODEL


@pytest.mark.parametrize(
    "module",
    ["arc_puzzles", "arc_puzzles.augmentations", "arc_puzzles.grids", "arc_puzzles.voting"],
    ids=lambda name: name,
)
def test_the_example_gives_what_it_shows(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "training.json").write_text(json.dumps({"good": GOOD}))
    monkeypatch.chdir(tmp_path)
    answer = Augmentation.parse("rot90").apply(((4, 3),))
    given = {
        "tokenizer": AutoTokenizer.from_pretrained(EXAMPLE_MODEL),
        "text": f"The answer is\n{SHAPE.encode(answer)}",
    }
    outcome = doctest.testmod(importlib.import_module(module), extraglobs=given)
    assert outcome.attempted
    assert not outcome.failed
