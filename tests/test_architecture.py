"""The floors of the source tree: what is installed, and that imports go downwards and never in a circle."""

import shutil
import tomllib
from pathlib import Path

import pytest
from source_imports import FLOORS, INSTALLED, find_cycle, read_imports, upward_imports

ROOT = Path(__file__).parents[1]

NOT_INSTALLED = {"benchmarks", "docs", "examples", "setup", "tests"}


def test_exactly_the_expected_top_level_names_are_installed():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {pattern.removesuffix("*") for pattern in tool["packages"]["find"]["include"]}
    assert packages | set(tool["py-modules"]) == INSTALLED
    assert len(INSTALLED) <= 12


def test_every_python_file_is_installed_or_known_not_to_be():
    modules = {file.stem for file in ROOT.glob("*.py")}
    packages = {file.parent.name for file in ROOT.glob("*/*.py") if not file.parent.name.startswith(".")}
    assert (modules | packages) - {"build"} == INSTALLED | NOT_INSTALLED


def test_no_module_imports_from_a_higher_floor():
    assert upward_imports(read_imports(ROOT, INSTALLED), FLOORS) == []


def test_no_modules_import_each_other_in_a_circle():
    assert find_cycle(read_imports(ROOT, INSTALLED)) == []


# --- The reader finds faults --------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed sources, to plant faults in."""
    for name in INSTALLED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        else:
            shutil.copy(ROOT / f"{name}.py", tmp_path)
    return tmp_path


def plant(root: Path, module: str, code: str) -> None:
    file = root / f"{module.replace('.', '/')}.py"
    assert file.is_file()
    file.write_text(f"{file.read_text()}\n\n{code}\n")


@pytest.mark.parametrize(
    ("module", "code", "found"),
    [
        ("kvcache_utils", "import qwen2_jax", "kvcache_utils -> qwen2_jax"),
        ("kvcache_utils", "def later():\n    from qwen2_jax import QwenModel", "kvcache_utils -> qwen2_jax"),
        ("qwen2_core.config", "from arc_runner import options", "qwen2_core.config -> arc_runner.options"),
        (
            "qwen2_core.kernels.matmul",
            "from .. import config",
            "qwen2_core.kernels.matmul -> qwen2_core.config",
        ),
        (
            "arc_puzzles.chat",
            "import importlib as i\ni.import_module('qwen2_jax')",
            "arc_puzzles.chat -> qwen2_jax",
        ),
    ],
)
def test_a_planted_upward_import_is_found(copy: Path, module: str, code: str, found: str):
    plant(copy, module, code)
    assert upward_imports(read_imports(copy, INSTALLED), FLOORS) == [found]


@pytest.mark.parametrize(
    "code", ["import arc_puzzles.chat", "def later():\n    from .chat import encode_prompt"]
)
def test_a_planted_cycle_is_found(copy: Path, code: str):
    plant(copy, "arc_puzzles.tasks", code)
    cycle = find_cycle(read_imports(copy, INSTALLED))
    assert set(cycle) == {"arc_puzzles.tasks", "arc_puzzles.chat"}


def test_a_module_that_imports_from_its_own_package_is_a_cycle(copy: Path):
    plant(copy, "activation_store.format", "from activation_store import ActivationStore")
    assert {"activation_store", "activation_store.format"} <= set(find_cycle(read_imports(copy, INSTALLED)))
