"""The suite runs on the CPU unless JAX_PLATFORMS says otherwise, from a checkout as well as installed."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; a wrong path must not ask the hub

if importlib.util.find_spec("qwen2_jax") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner fails the test when it reads the weights."""
    from run_generation import Generator  # only where it is needed: it imports nearly everything

    def load(*_: object) -> None:
        pytest.fail("the weights are read before the input is refused")

    monkeypatch.setattr(Generator, "load", load)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four puzzles in two augmentations each, run in one go."""
    from runner_cases import run_four

    return run_four(tmp_path_factory.mktemp("finished"))
