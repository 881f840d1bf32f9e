"""A checkpoint in float16: run, stored, read, verified and replayed; what overflows is never stored."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from lively import rewrite_json, rewrite_safetensors, row_errors
from runner_cases import LAYERS, copy_small, four, plain_rows, report, run_main, store_of

from activation_store.replay import replay_store
from activation_store.verify import verify_store

DOWN = "model.layers.0.mlp.down_proj.weight"


def in_float16(folder: Path, overflow: float = 1.0) -> Path:
    """The small checkpoint; ``overflow`` multiplies what the first layer's MLP adds to the stream."""

    def cast(tensors: dict[str, np.ndarray]) -> None:
        tensors[DOWN] = tensors[DOWN] * np.float32(overflow)
        tensors |= {name: array.astype(np.float16) for name, array in tensors.items()}
        assert all(np.isfinite(array).all() for array in tensors.values())

    rewrite_safetensors(copy_small(folder) / "model.safetensors", cast)
    rewrite_json(folder / "config.json", torch_dtype="float16")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("float16")
    checkpoint = in_float16(folder / "model")
    outcome = run_main(four(folder), model_path=checkpoint)
    assert (outcome.code, outcome.err) == (0, "")
    return folder, checkpoint


def test_rows_are_stored_as_float16_and_read_as_float32(finished: tuple[Path, Path]):
    folder, checkpoint = finished
    store = store_of(folder)
    assert store.settings.dtype == "float16"
    assert len(store) == 8
    for record in store:
        rows, stored = store.rows(record, 1), store.rows(record, 1, dtype="stored")
        assert (rows.dtype, stored.dtype) == (np.float32, np.float16)
        np.testing.assert_array_equal(rows, stored.astype(np.float32))
        tokens = np.concatenate([store.prompt_token_ids(record), store.generated_tokens(record)])
        expected = plain_rows(checkpoint, tuple(range(LAYERS)), tokens)[1, -record.n_rows :]
        errors = row_errors(rows, expected)
        assert 1e-5 < errors.max() < 0.01  # it was computed in float16, and no coarser


def test_a_store_in_float16_is_verified_and_replayed(finished: tuple[Path, Path]):
    folder, checkpoint = finished
    assert list(verify_store(store_of(folder))) == []
    assert list(replay_store(store_of(folder), str(checkpoint), 8)) == []


def test_a_stream_past_what_float16_holds_fails_its_sequences_by_name_and_stores_none(tmp_path: Path):
    checkpoint = in_float16(tmp_path / "model", overflow=1e5)
    outcome = run_main(four(tmp_path), model_path=checkpoint)
    assert outcome.code == 1
    assert all(record.failed and not record.n_rows for record in store_of(tmp_path))
    reasons = [one["reason"] for one in report(tmp_path)["sequences_failed"]]
    assert len(reasons) == 8
    assert all("blocks.0.hook_resid_post is not finite at position" in reason for reason in reasons)
    assert all(reason.endswith("(float16 ends at 65,504)") for reason in reasons)


@pytest.mark.slow
def test_the_same_weights_run_in_bfloat16(tmp_path: Path):
    checkpoint = in_float16(tmp_path / "model", overflow=1e5)
    outcome = run_main(four(tmp_path), model_path=checkpoint, dtype="bfloat16")
    assert (outcome.code, outcome.err) == (0, "")
    rows = np.concatenate([store_of(tmp_path).rows(record, 0) for record in store_of(tmp_path)])
    assert np.abs(rows).max() > jnp.finfo(jnp.float16).max
