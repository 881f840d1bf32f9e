"""The suite runs on the CPU unless JAX_PLATFORMS says otherwise, from a checkout as well as installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import shape_checks

if TYPE_CHECKING:
    from qwen2_core.kernels.cpu.library import Instructions

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; a wrong path must not ask the hub

# A shell's background job ignores Ctrl-C, and so would all processes that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests are a run of their own, also where they are run in a job of a cluster.
for _name in [
    name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "KUBERNETES_", "JOB_"))
]:
    del os.environ[_name]

if importlib.util.find_spec("qwen2_jax") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent))

shape_checks.install()  # before anything of the package is imported


def pytest_configure(config: pytest.Config) -> None:
    """All processes of one run of the suite share what they compile. The next run starts from nothing, unless
    JAX_COMPILATION_CACHE_DIR says where programs are kept.
    """
    if not hasattr(config, "workerinput") and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(folder))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(params=["AVX2", "AVX512_BF16", "AMX"], scope="module")
def cpu_instructions(request: pytest.FixtureRequest) -> Iterator[Instructions]:
    """Each kind of instructions of the CPU kernels that this machine has.

    A program that was traced with one kind goes on using it, so nothing traced is kept from one to the next.
    """
    import jax

    from qwen2_core.kernels.cpu import library

    if not library.is_available():
        pytest.skip(f"no CPU kernels: {library.unavailable_reason() or 'this is an accelerator'}")
    chosen = library.Instructions[request.param]
    if chosen > library.instructions():
        pytest.skip(f"this CPU has no {request.param}")
    jax.clear_caches()
    yield chosen
    jax.clear_caches()


@pytest.fixture
def cpu_kernels(cpu_instructions: Instructions, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with the CPU kernels using each kind of instructions. Trace inside the test."""
    from qwen2_core.kernels.cpu import attention, logits, matmul

    for module in (matmul, attention, logits):
        monkeypatch.setattr(module, "instructions", lambda: cpu_instructions)
    return cpu_instructions.name


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner fails the test when it reads the weights."""
    from arc_runner.loaded_model import LoadedModel  # only where it is needed: it imports nearly everything

    def load(*_: object) -> None:
        pytest.fail("the weights are read before the input is refused")

    monkeypatch.setattr(LoadedModel, "load", load)


@pytest.fixture
def port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four puzzles in two augmentations each, run in one go."""
    from runner_cases import run_four

    return run_four(tmp_path_factory.mktemp("finished"))
