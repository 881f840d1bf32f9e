"""Stored rows become a dataset that SAELens loads."""

import os
from pathlib import Path

import filelock
import numpy as np
import pytest
from activation_fakes import SETTINGS, batch

from activation_store import (
    ActivationStore,
    ActivationWriter,
    RowFilter,
    StoreError,
    StoreWriteError,
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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("step", ["from_generator", "save_to_disk", "rename", "fsync"])
def test_a_full_disk_is_one_sentence_leaves_nothing_and_the_next_export_starts_again(
    tmp_path: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch, step: str
):
    datasets = pytest.importorskip("datasets", reason="the export needs the extra `sae`")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "from_generator":  # the library raises its own error of what went wrong
            patch.setattr(datasets.arrow_writer.ArrowWriter, "write", full)
        else:
            owner = {"save_to_disk": datasets.Dataset, "rename": Path, "fsync": os}[step]
            patch.setattr(owner, step, full)
        with pytest.raises(StoreWriteError, match=r"cannot write .*: No space left on device; nothing of it"):
            export_saelens(store, 11, tmp_path / "out", 7)
    assert names(tmp_path) == ["store"]
    assert export_saelens(store, 11, tmp_path / "out", 7) > 0
    assert names(tmp_path) == ["out", "store"]


def test_what_a_killed_export_left_is_cleared_away(tmp_path: Path, store: ActivationStore):
    datasets = pytest.importorskip("datasets", reason="the export needs the extra `sae`")
    left = tmp_path / ".out.unfinished"
    for folder in ("cache", "dataset"):
        (left / folder / "deep").mkdir(parents=True)
        (left / folder / "deep" / "half.arrow").write_bytes(b"half")
    (left / "export.lock").touch()
    count = export_saelens(store, 11, tmp_path / "out", 7)
    assert len(datasets.load_from_disk(str(tmp_path / "out"))) == count
    assert names(tmp_path) == ["out", "store"]


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path, store: ActivationStore):
    pytest.importorskip("datasets", reason="the export needs the extra `sae`")
    (tmp_path / ".out.unfinished").mkdir()
    with (
        filelock.FileLock(tmp_path / ".out.unfinished" / "export.lock"),
        pytest.raises(StoreError, match="another export is writing"),
    ):
        export_saelens(store, 11, tmp_path / "out", 7)
    assert names(tmp_path) == [".out.unfinished", "store"]


@pytest.mark.parametrize("left", ["folder", "file", "link", "dangling"])
def test_what_is_there_already_is_not_touched(tmp_path: Path, store: ActivationStore, left: str):
    out = tmp_path / "out"
    if left == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif left == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / ("store" if left == "link" else "nothing"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="exists already"):
        export_saelens(store, 11, out, 7)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_into_the_store_itself_is_refused_however_it_is_written(
    tmp_path: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "link").symlink_to(tmp_path / "store")
    monkeypatch.chdir(tmp_path / "store")
    for output in (
        "out",
        "host-00000/out",
        "../link/out",
        "../store/new/out",
        str(tmp_path / "store" / "out"),
    ):
        with pytest.raises(StoreError, match="is in the store itself"):
            export_saelens(store, 11, output, 7)


def test_a_damaged_shard_is_named_and_nothing_is_exported(tmp_path: Path, store: ActivationStore):
    pytest.importorskip("datasets", reason="the export needs the extra `sae`")
    shard = tmp_path / "store" / "host-00000" / "shard-000001.safetensors"
    os.truncate(shard, 3000)
    with pytest.raises(StoreError, match=r"shard-000001\.safetensors has 3000 bytes"):
        export_saelens(store, 11, tmp_path / "out", 7)
    assert names(tmp_path) == ["store"]


def test_a_missing_library_is_one_sentence(
    tmp_path: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(StoreError, match=r"pip install datasets"):
        export_saelens(store, 11, tmp_path / "out", 7)


def test_home_is_expanded_and_the_window_is_a_whole_number(
    tmp_path: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
):
    for wrong in (7.0, "7", True, None, np.float32(7)):
        with pytest.raises(StoreError, match="context_size must be a whole number"):
            export_saelens(store, 11, tmp_path / "out", wrong)  # type: ignore[arg-type]
    pytest.importorskip("datasets", reason="the export needs the extra `sae`")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert export_saelens(store, 11, "~/out", np.int64(7)) > 0  # type: ignore[arg-type]
    assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "~").exists()
