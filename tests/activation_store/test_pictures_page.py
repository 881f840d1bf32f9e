"""The page about pictures says what works: its blocks run from top to bottom."""

import re
import shlex
from pathlib import Path

import pytest
from activation_fakes import batch, settings

from activation_store import ActivationWriter, hook_name
from activation_store.__main__ import main

PAGE = Path(__file__).parents[2] / "docs" / "pictures.md"


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    of = settings(hook_names=tuple(map(hook_name, range(10, 24))))
    with ActivationWriter("activations", of, provenance={}) as writer:
        writer.submit(batch("a", "bb", of=of))
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "bash", "python", "bash", "text"]
    for kind, text in blocks[:-1]:
        if kind == "python":
            exec(compile(text, PAGE.name, "exec"), {})
        else:
            program, dash_m, module, *words = shlex.split(text)
            assert (program, dash_m, module) == ("python", "-m", "activation_store")
            assert main(words) == 0
    named = set(re.findall(r"activations-[\w-]+\.png", PAGE.read_text()))
    assert named <= {file.name for file in Path("plots").iterdir()}
    assert "direction: answers (layer 17)" in Path("page.html").read_text()
