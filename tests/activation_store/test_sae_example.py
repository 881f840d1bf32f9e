"""The example that trains a sparse autoencoder on a stored layer."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

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


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("optax")
    specification = importlib.util.spec_from_file_location("train_sae", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "train_sae", example)
    specification.loader.exec_module(example)
    return example


def test_the_loss_falls_and_the_result_is_saved(
    example: Any,
    store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *("train_sae.py", store.directory, "--layer=11", "--steps=150", "--batch_size=256"),
            *("--features=64", f"--output={tmp_path / 'sae'}"),
        ],
    )
    example.main()
    lines = capsys.readouterr().out.splitlines()
    printed = [float(line.split()[3]) for line in lines[:-1]]
    assert len(printed) == 10
    assert printed[-1] < 0.5 * printed[0]
    assert lines[-1].endswith("on 1200 rows of layer 11")
    assert sorted(file.name for file in (tmp_path / "sae").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


# In a process of its own: the import warns of much, and takes 20 s.
LOAD_IN_SAELENS = """
import sys, numpy, torch
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1], device="cpu")
rows = torch.from_numpy(numpy.load(sys.argv[2]))
features = sae.encode(rows)
numpy.savez(sys.argv[3], features=features.detach(), decoded=sae.decode(features).detach())
print(sae.cfg.metadata.hook_name)
"""


@pytest.mark.slow
def test_saelens_loads_it_and_finds_the_same_features(example: Any, store: ActivationStore, tmp_path: Path):
    if importlib.util.find_spec("sae_lens") is None:
        pytest.skip("sae-lens is not installed")
    autoencoder, _ = example.train(store, 11, 100, 256, 64)
    autoencoder.save(tmp_path / "sae", 11)
    rows = np.concatenate([rows for rows, _, _ in store.iterate(11)])
    np.save(tmp_path / "rows.npy", rows)
    places = [tmp_path / name for name in ("sae", "rows.npy", "found.npz")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_IN_SAELENS, *places], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "blocks.11.hook_resid_post"
    found = np.load(tmp_path / "found.npz")
    features = autoencoder.encode(rows)
    assert (features > 0).any(axis=0).sum() > 10
    np.testing.assert_allclose(found["features"], features, atol=1e-5)
    np.testing.assert_allclose(found["decoded"], features @ autoencoder.W_dec + autoencoder.b_dec, atol=1e-4)
    explained = 1 - ((rows - found["decoded"]) ** 2).sum() / ((rows - rows.mean(axis=0)) ** 2).sum()
    assert explained > 0.5
