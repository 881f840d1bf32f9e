"""The notebook of the examples, run from its first cell to its last in a kernel of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = "activations_in_ten_minutes.ipynb"
NEEDED = ("nbclient", "ipykernel", "matplotlib", "pandas", "optax", "torch", "sae_lens")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook's own machinery
def test_every_cell_runs_and_the_answer_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    import nbformat
    from nbclient import NotebookClient

    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    )
    notebook = nbformat.read(EXAMPLES / NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path / "examples")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    printed = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "right: True" in printed
    assert "SAELens finds the same features: blocks.12.hook_resid_post" in printed
    assert (tmp_path / "examples" / "runs" / "page.html").stat().st_size > 10_000
