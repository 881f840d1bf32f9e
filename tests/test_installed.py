"""The package as its users have it: beside their own files, and installed from a wheel."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runner_cases import LAYERS, puzzle, small_checkpoint, write_tasks
from source_imports import INSTALLED

import qwen2_jax

PLACE = Path(qwen2_jax.__file__).parent
FROM_WHEEL = PLACE.name == "site-packages"

# Names that a folder of one's own may well have; each was a top-level module here or could become one.
COMMON_NAMES = (
    "attention",
    "config",
    "continuous",
    "format",
    "grids",
    "kernels",
    "matmul",
    "options",
    "products",
    "programs",
    "report",
    "requests",
    "sampling",
    "scoring",
    "sharding",
    "tasks",
    "utils",
    "weights",
    "workload",
)

USE_EVERY_FACE = """
import sys

import jax
import numpy as np

import arc_puzzles, arc_runner, qwen2_core, qwen2_engine
from activation_store import ActivationStore
from distributed_kv_cached_inference import main
from generate_jitted import generate_single_task_jitted
from kvcache_utils import KVCacheConfig, create_kv_cache_buffers
from qwen2_jax import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

assert sys.path[0] == ""
checkpoint, *layers = sys.argv[1:]
config, params = load_qwen2(checkpoint)
model = create_model_with_hooks(config, tuple(map(int, layers)))
generation = generate_single_task_jitted(model, params, np.ones((1, 4), np.int32), 3)
assert generation.token_ids.shape == (1, 3)
assert generation.activations.shape == (len(layers), 3, 1, config.hidden_size)

sizes = KVCacheConfig(num_layers=1, num_kv_heads=1, head_dim=2, max_prefill_length=3, max_decode_length=4)
assert sum(leaf.nbytes for leaf in jax.tree.leaves(create_kv_cache_buffers(sizes))) == sizes.nbytes

flags = "--dataset_path tasks.json --activations_dir activations --output_filepath submission.json"
flags += " --max_output_tokens 3 --predictions_per_task 1 --grid_encoder MinimalGridEncoder()"
assert main([*flags.split(), "--model_path", checkpoint, "--layers_to_extract", *layers]) == 0
store = ActivationStore("activations")
assert [record.task_id for record in store.sequences()] == ["mine"]
"""


def python(folder: Path, *words: str) -> str:
    """Returns what a Python started in `folder` prints, with the folder first on its path."""
    outcome = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(PLACE)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a user whose files have common names and must not be imported."""
    for name in COMMON_NAMES:
        (tmp_path / f"{name}.py").write_text(f'raise ImportError("the user\'s own {name}.py was imported")\n')
    write_tasks(tmp_path / "tasks.json", mine=puzzle(1, 2, 3))
    return tmp_path


def test_every_face_works_beside_files_with_common_names(folder: Path):
    python(folder, "-c", USE_EVERY_FACE, str(small_checkpoint()), *map(str, range(LAYERS)))


@pytest.mark.parametrize("module", ["distributed_kv_cached_inference", "activation_store"])
def test_the_command_lines_start_beside_files_with_common_names(folder: Path, module: str):
    assert python(folder, "-m", module, "--help").startswith("usage: ")


# --- Installed from a wheel ---------------------------------------------------------------------------------

from_wheel = pytest.mark.skipif(not FROM_WHEEL, reason="the package is not installed from a wheel")


@pytest.fixture
def files() -> set[str]:
    """The files of the installed package, relative to site-packages."""
    recorded = importlib.metadata.files("qwen2-jax-activations")
    assert recorded is not None
    return {str(file) for file in recorded if ".." not in file.parts}


@from_wheel
def test_the_wheel_installs_exactly_the_expected_top_level_names(files: set[str]):
    names = {Path(file).parts[0].removesuffix(".py") for file in files}
    assert {name for name in names if not name.endswith(".dist-info") and name != "__pycache__"} == INSTALLED


@from_wheel
def test_the_wheel_holds_the_example_the_parts_of_the_page_and_the_kernels(files: set[str]):
    assert {f"activation_store/page/page.{kind}" for kind in ("html", "css", "js")} <= files
    example = {"tasks.json", *(f"tiny-qwen2/{name}" for name in ("config.json", "model.safetensors"))}
    example |= {f"tiny-qwen2/{name}" for name in ("tokenizer.json", "tokenizer_config.json")}
    assert {f"arc_runner/data/{name}" for name in example} <= files
    assert any(file.startswith("qwen2_core/kernels/cpu/_kernels.") for file in files)
    assert not any("csrc" in file for file in files)
