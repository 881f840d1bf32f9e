"""The example that trains a sparse autoencoder on a stored layer."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from activation_fakes import sequence, settings

from activation_store import ActivationStore, ActivationWriter

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_sae.py"


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """Rows that a sparse code explains: each is a few of 32 directions."""
    of = settings(dtype="float32", max_output_tokens=60, capture_prompt=False)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((32, of.hidden_size))
    with ActivationWriter(tmp_path / "store", of, provenance={}) as writer:
        for task in range(20):
            one = sequence(f"t{task}", of=of, generated=60)
            assert one.rows is not None
            codes = rng.exponential(size=(*one.rows.shape[:2], 32)) * (
                rng.random((*one.rows.shape[:2], 32)) < 0.1
            )
            one.rows[:] = codes @ directions
            writer.submit([one])
    return ActivationStore(tmp_path / "store")


def test_the_loss_falls(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("optax")
    specification = importlib.util.spec_from_file_location("train_sae", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    monkeypatch.setattr(
        sys,
        "argv",
        ["train_sae.py", store.directory, "--layer=11", "--steps=150", "--batch_size=256", "--features=64"],
    )
    example.main()
    lines = capsys.readouterr().out.splitlines()
    printed = [float(line.split()[3]) for line in lines[:-1]]
    assert len(printed) == 10
    assert printed[-1] < 0.5 * printed[0]
    assert lines[-1].endswith("on 1200 rows of layer 11")
