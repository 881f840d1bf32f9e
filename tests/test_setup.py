"""Building the package: where the kernels for CPU are compiled, and what happens where they cannot be."""

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from source_imports import INSTALLED

ROOT = Path(__file__).parents[1]
MISSED = "without the kernels for CPU, bfloat16 on a CPU takes 1.4 to 2.6 times as long"


@pytest.fixture
def reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The function of setup.py, as on an x86-64 Linux machine with a compiler."""
    pytest.importorskip("setuptools")
    monkeypatch.delenv("QWEN2_CPU_KERNELS", raising=False)
    monkeypatch.setenv("CXX", sys.executable)  # any command that is there
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("sys.platform", "linux")
    return runpy.run_path(str(ROOT / "setup.py"), run_name="not main")["reason_to_skip"]


def pci_device(folder: Path, vendor: str, device: str) -> Path:
    (folder / "0000:00:04.0").mkdir()
    (folder / "0000:00:04.0" / "vendor").write_text(f"{vendor}\n")
    (folder / "0000:00:04.0" / "device").write_text(f"{device}\n")
    return folder


def test_kernels_are_compiled_on_linux_on_x86_64(reason_to_skip, tmp_path: Path):
    assert reason_to_skip(tmp_path) == ""


def test_kernels_are_not_compiled_on_a_machine_with_a_tpu(reason_to_skip, tmp_path: Path):
    assert reason_to_skip(pci_device(tmp_path, "0x1ae0", "0x0063")) == "this machine has TPUs"


def test_a_network_card_of_google_is_not_taken_for_a_tpu(reason_to_skip, tmp_path: Path):
    assert reason_to_skip(pci_device(tmp_path, "0x1ae0", "0x0042")) == ""


def test_kernels_are_not_compiled_elsewhere_or_without_compiler(reason_to_skip, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++ -m64")
    assert reason_to_skip(tmp_path) == "there is no C++ compiler /nowhere/c++"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert reason_to_skip(tmp_path) == "they are for x86-64 Linux"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> tuple[str, Path]:
    """Installs a copy of the sources with an environment variable set; returns pip's words and the place."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    source, target = folder / "source", folder / "target"
    source.mkdir()
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, source)
    for module in INSTALLED:
        if (ROOT / module).is_dir():
            shutil.copytree(
                ROOT / module, source / module, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        else:
            shutil.copy(ROOT / f"{module}.py", source)
    monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target"]
    outcome = subprocess.run([*command, target, source], capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert (target / "arc_runner" / "data" / "tiny-qwen2" / "model.safetensors").is_file()
    return outcome.stdout + outcome.stderr, target


@pytest.mark.parametrize(
    ("name", "value"), [("CXX", "/bin/false"), ("CXX", "/nowhere/c++"), ("QWEN2_CPU_KERNELS", "0")]
)
def test_an_install_without_kernels_succeeds_and_says_what_is_missed(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said, target = install(tmp_path, monkeypatch, name, value)
    assert any(line.rstrip().endswith(MISSED) for line in said.splitlines())
    assert not list(target.rglob("_kernels*"))
