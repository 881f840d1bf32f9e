"""Stored rows become a dataset that SAELens loads."""

from pathlib import Path

import numpy as np
import pytest
from activation_fakes import SETTINGS, batch

from activation_store import (
    ActivationStore,
    ActivationWriter,
    RowFilter,
    StoreError,
    export_saelens,
)

HOOK = "blocks.11.hook_resid_post"


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    with ActivationWriter(tmp_path / "store", SETTINGS, provenance={}) as writer:
        writer.submit(batch("a", "bb"))
        writer.submit(batch("ccc"))
    return ActivationStore(tmp_path / "store")


@pytest.mark.parametrize("rows", [None, RowFilter(prompt=False)])
def test_a_layer_is_exported_as_saelens_loads_it(
    tmp_path: Path, store: ActivationStore, rows: RowFilter | None
):
    """The loader wants a saved dataset: the hook's column of shape (context_size, d_in), and token_ids."""
    datasets = pytest.importorskip("datasets", reason="the export needs the extra `sae`")
    output = tmp_path / "new" / "cached"
    count = export_saelens(store, 11, output, context_size=7, rows=rows)
    loaded = datasets.load_from_disk(str(output))
    assert sorted(loaded.column_names) == [HOOK, "token_ids"]
    assert loaded.features[HOOK].shape == (7, SETTINGS.hidden_size)
    assert loaded.features[HOOK].dtype == "float32"
    pieces = list(store.iterate(11, rows=rows))
    expected = np.concatenate([data for data, _, _ in pieces]).astype(np.float32)
    tokens = np.concatenate([columns.token_ids for _, columns, _ in pieces])
    assert count == len(loaded) == len(expected) // 7
    arrays = loaded.with_format("numpy")[:]
    np.testing.assert_array_equal(np.stack(arrays[HOOK]).reshape(-1, 16), expected[: count * 7])
    np.testing.assert_array_equal(np.stack(arrays["token_ids"]).ravel(), tokens[: count * 7])
    assert sorted(path.name for path in output.parent.iterdir()) == ["cached"]  # no cache is left


def test_an_export_that_cannot_be_is_one_sentence(tmp_path: Path, store: ActivationStore):
    with pytest.raises(StoreError, match="exists already"):
        export_saelens(store, 11, tmp_path, 7)
    with pytest.raises(StoreError, match="layer 3 is not in"):
        export_saelens(store, 3, tmp_path / "out", 7)
    with pytest.raises(StoreError, match="context_size"):
        export_saelens(store, 11, tmp_path / "out", 0)
    pytest.importorskip("datasets", reason="the export needs the extra `sae`")
    with pytest.raises(StoreError, match="fewer than 100000 such rows"):
        export_saelens(store, 11, tmp_path / "out", 100_000)
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_one_sentence(
    tmp_path: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(StoreError, match=r"pip install datasets"):
        export_saelens(store, 11, tmp_path / "out", 7)
