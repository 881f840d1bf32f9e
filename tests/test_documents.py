"""README and docs say what works: every block of code in them is run, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from page_blocks import blocks_of

from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_WORDS = 900
# What a reader has and this test has not, and what stands in for it.
STAND_INS = {
    "Qwen/Qwen2.5-0.5B-Instruct": str(EXAMPLE_MODEL),
    "num_workers=2": "num_workers=0",  # the blocks before have used JAX, which may not be forked
}
BIN = Path(sys.executable).parent
NEEDED = ("matplotlib", "pandas", "torch", "datasets", "optax")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python(folder: Path, *words: str) -> str:
    """Runs Python in ``folder`` as a reader does; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout in which the first command of the README has been run."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("reader")
    for entry in ("distributed_kv_cached_inference.py", "arc_runner", "examples"):
        (folder / entry).symlink_to(ROOT / entry)
    (folder / "training.json").write_bytes(EXAMPLE_TASKS.read_bytes())
    (folder / "old-pickles").mkdir()
    pickled = pickle.dumps([{"task_id": "t", "activations": np.ones((3, 896), np.float32)}])
    (folder / "old-pickles" / "layer_10_batch_1.pkl").write_bytes(pickled)
    (first,) = (block.text for block in blocks_of(ROOT / "README.md") if block.name == "main-job")
    python(folder, *first.split("&& python ")[-1].split())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=named)
def test_every_block_of_a_page_runs(page: Path, reader: Path, tmp_path: Path):
    folder = tmp_path / "reader"
    shutil.copytree(reader, folder, symlinks=True)
    python(folder, str(ROOT / "tests" / "support" / "page_blocks.py"), str(page), json.dumps(STAND_INS))


def test_a_block_that_is_not_run_here_is_run_by_ci():
    """Those that install: `.ci/run` runs them by their names."""
    script = (ROOT / ".ci" / "run").read_text()
    names = [block.name for page in PAGES for block in blocks_of(page) if block.name is not None]
    assert names == ["main-job", "tests"]
    for name in names:
        assert f"readme_command {name})" in script


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_to_a_file_leads_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_readme_can_be_read_to_its_end():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS
