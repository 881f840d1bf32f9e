"""README and docs say what works: every block of code in them is run, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
NEEDED = ("matplotlib", "pandas", "torch", "datasets", "optax")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=named)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path):
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    for entry in ("distributed_kv_cached_inference.py", "arc_runner", "examples"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    (tmp_path / "training.json").write_bytes(EXAMPLE_TASKS.read_bytes())
    runner = ROOT / "tests" / "support" / "page_blocks.py"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", str(runner), str(page), json.dumps(STAND_INS)],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]


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
