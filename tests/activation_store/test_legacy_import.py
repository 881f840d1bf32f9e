"""Pickles of older code become a store, and a pickle that could run a program is refused before it does."""

import collections
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from activation_store import (
    ActivationStore,
    ActivationWriter,
    StoreError,
    import_legacy,
    verify_store,
)
from activation_store.__main__ import main
from activation_store.legacy_import import read_legacy


def rows(seed: int, count: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 16)).astype(dtype)


def write_pickles(directory: Path, dtype: Any = np.float32) -> None:
    """Two layers, two batches; as a list of dicts and as a dict by task; the task id "t0" collides."""
    directory.mkdir()
    for layer in (10, 11):
        listed = [
            {"task_id": "t0", "sample_idx": 0, "activation": rows(layer, 5, dtype), "shape": (5, 16)},
            {"task_id": "t0", "sample_idx": 0, "activation": rows(layer + 50, 3, dtype), "shape": (3, 16)},
        ]
        by_task = collections.OrderedDict(
            t1=rows(layer + 100, 4, dtype)[None], t2=rows(layer + 150, 2, dtype)
        )
        for number, content in enumerate((listed, by_task)):
            (directory / f"layer_{layer}_batch_{number}.pkl").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_pickles_become_a_store(tmp_path: Path, dtype: Any):
    write_pickles(tmp_path / "old", dtype)
    assert import_legacy(tmp_path / "old", tmp_path / "new", hidden_size=16) == 4
    store = ActivationStore(tmp_path / "new")
    assert store.layers == (10, 11)
    expected = {("t0", 0): (0, 5), ("t0", 1): (50, 3), ("t1", 0): (100, 4), ("t2", 0): (150, 2)}
    found = {(record.task_id, record.sample_index): record for record in store.sequences()}
    assert set(found) == set(expected)
    for name, (seed, count) in expected.items():
        for layer in (10, 11):
            stored = store.rows(found[name], layer, dtype="stored")
            assert stored.dtype == dtype
            np.testing.assert_array_equal(stored, rows(seed + layer, count, dtype))
        assert found[name].finish_reason == "imported"
        assert store.generated_tokens(found[name]).tolist() == [-1] * count
        assert np.isnan(store.generated_logprobs(found[name])).all()
    assert list(verify_store(store)) == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int):
    path = tmp_path / "layer_0_batch_0.pkl"
    path.write_bytes(pickle.dumps([{"task_id": 7, "activations": rows(0, 3)}], protocol))
    (item,) = read_legacy(path)
    assert item.task_id == "7"
    np.testing.assert_array_equal(item.rows, rows(0, 3))


def test_a_pickle_written_before_numpy_2_is_read(tmp_path: Path):
    path = tmp_path / "layer_0_batch_0.pkl"
    data = pickle.dumps([rows(0, 3)], protocol=2)
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    np.testing.assert_array_equal(read_legacy(path)[0].rows, rows(0, 3))


class _Evil:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self._reduced = call, arguments

    def __reduce__(self) -> Any:
        return self._reduced


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (os.system, ("touch {target}",)),
        (eval, ("open({target!r}, 'w')",)),
        (open, ("{target}", "w")),
        (subprocess.getoutput, ("touch {target}",)),
        (np.save, ("{target}", 1)),
        (np.fromfile, ("{target}",)),
        (getattr, ("x", "upper")),
        (__import__, ("antigravity",)),
        (pickle.loads, (pickle.dumps(1),)),
        (Path, ("{target}",)),
    ],
)
def test_a_pickle_that_needs_anything_else_is_refused_before_it_runs(
    tmp_path: Path, call: Any, arguments: Any
):
    target = tmp_path / "harm"
    filled = tuple(a.format(target=str(target)) if isinstance(a, str) else a for a in arguments)
    path = tmp_path / "layer_0_batch_0.pkl"
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps([_Evil(call, *filled)], protocol))
        with pytest.raises(StoreError, match="which is no plain type or array"):
            read_legacy(path)
    assert not target.exists()


def test_a_dotted_name_does_not_lead_out_of_an_allowed_module(tmp_path: Path):
    path = tmp_path / "layer_0_batch_0.pkl"
    name = b"ndarray.__class__"
    path.write_bytes(
        b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name + b"\x93."  # STACK_GLOBAL
    )
    with pytest.raises(StoreError, match=r"numpy\.ndarray\.__class__"):
        read_legacy(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "holds a int"),
        ([{"task_id": "a"}], "no array of float32"),
        ([rows(0, 3, np.float64)], "no array of float32"),
        ([np.array([object()], dtype=object)], "refused"),
        ([np.zeros((2, 3, 16), np.float32)], r"shape \(2, 3, 16\)"),
        ([np.zeros((0, 16), np.float32)], r"not \[rows, hidden\]"),
        (["rows"], "no array"),
    ],
)
def test_content_that_is_no_activations_is_refused(tmp_path: Path, content: Any, message: str):
    path = tmp_path / "layer_0_batch_0.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(StoreError, match=message):
        read_legacy(path)


def test_bytes_in_an_unusual_encoding_are_refused(tmp_path: Path):
    path = tmp_path / "layer_0_batch_0.pkl"
    path.write_bytes(b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00punyctR.")
    with pytest.raises(StoreError, match="encodes text as 'punyc'"):
        read_legacy(path)


@pytest.mark.parametrize("data", [b"", b"\x80", b"not a pickle", pickle.dumps([rows(0, 3)])[:-30]])
def test_a_damaged_pickle_is_refused(tmp_path: Path, data: bytes):
    path = tmp_path / "layer_0_batch_0.pkl"
    path.write_bytes(data)
    with pytest.raises(StoreError, match="is refused"):
        read_legacy(path)


def test_layers_that_do_not_belong_together_are_refused(tmp_path: Path):
    write_pickles(tmp_path / "old")
    path = tmp_path / "old" / "layer_11_batch_1.pkl"
    path.write_bytes(pickle.dumps({"t1": rows(0, 4), "t9": rows(1, 2)}))
    with pytest.raises(StoreError, match="do not hold the same sequences"):
        import_legacy(tmp_path / "old", tmp_path / "a", 16)
    path.write_bytes(pickle.dumps({"t1": rows(0, 4), "t2": rows(1, 1)}))
    with pytest.raises(StoreError, match="have different shapes for task t2"):
        import_legacy(tmp_path / "old", tmp_path / "b", 16)
    path.unlink()
    with pytest.raises(StoreError, match=r"batch 1 has layers \[10\], batch 0 has \[10, 11\]"):
        import_legacy(tmp_path / "old", tmp_path / "c", 16)


def test_rows_of_half_the_hidden_size_are_refused(tmp_path: Path):
    """The old code base stored 448 of 896 columns, and nothing noticed."""
    write_pickles(tmp_path / "old")
    with pytest.raises(StoreError, match="16 wide, the model's hidden size is 32"):
        import_legacy(tmp_path / "old", tmp_path / "new", 32)


def test_an_import_does_not_mix_with_what_is_there(tmp_path: Path):
    write_pickles(tmp_path / "old")
    import_legacy(tmp_path / "old", tmp_path / "new", 16)
    (tmp_path / "old" / "layer_10_batch_2.pkl").write_bytes(pickle.dumps([rows(0, 2)]))
    (tmp_path / "old" / "layer_11_batch_2.pkl").write_bytes(pickle.dumps([rows(1, 2)]))
    with pytest.raises(StoreError, match=r"these pickles are not those that .*new was imported from; name"):
        import_legacy(tmp_path / "old", tmp_path / "new", 16)
    with pytest.raises(StoreError, match=r"has no layer_<l>_batch_<n>\.pkl"):
        import_legacy(tmp_path, tmp_path / "other", 16)


def digests(directory: Path) -> dict[str, str]:
    store = ActivationStore(directory)
    return {record.key: store.sequence_digest(record) for record in store.sequences()}


def test_an_import_that_is_done_again_changes_nothing(tmp_path: Path):
    write_pickles(tmp_path / "old")
    assert import_legacy(tmp_path / "old", tmp_path / "new", 16) == 4
    before = digests(tmp_path / "new")
    assert import_legacy(tmp_path / "old", tmp_path / "new", 16) == 4
    assert digests(tmp_path / "new") == before


def test_an_import_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_pickles(tmp_path / "old")
    import_legacy(tmp_path / "old", tmp_path / "whole", 16)
    real = ActivationWriter.submit
    submitted: list[int] = []

    def submit(self: ActivationWriter, batch: Any) -> None:
        if submitted:
            raise KeyboardInterrupt
        submitted.append(len(batch))
        real(self, batch)

    monkeypatch.setattr(ActivationWriter, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        import_legacy(tmp_path / "old", tmp_path / "new", 16)
    monkeypatch.undo()
    assert len(ActivationStore(tmp_path / "new")) == 2
    assert import_legacy(tmp_path / "old", tmp_path / "new", 16) == 4
    assert digests(tmp_path / "new") == digests(tmp_path / "whole")
    assert list(verify_store(ActivationStore(tmp_path / "new"))) == []


def test_what_is_wrong_in_the_last_file_is_found_before_a_store_is_made(tmp_path: Path):
    write_pickles(tmp_path / "old")
    last = tmp_path / "old" / "layer_11_batch_1.pkl"
    for content, message in (
        ({"t1": rows(0, 4), "t2": rows(1, 2, np.float16)}, "are float16, those before them float32"),
        ({"t1": rows(0, 4)[:, :8], "t2": rows(1, 2)}, "8 wide, the model's hidden size is 16"),
        ({}, "holds no items"),
        ([], "holds no items"),
        ({"t1": rows(0, 4)}, "do not hold the same sequences"),
    ):
        last.write_bytes(pickle.dumps(content))
        with pytest.raises(StoreError, match=message) as raised:
            import_legacy(tmp_path / "old", tmp_path / "new", 16)
        assert "layer_11_batch_1.pkl" in str(raised.value)
        assert not (tmp_path / "new").exists()


def test_rows_that_are_not_finite_are_named_and_the_others_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bad = rows(0, 3)
    bad[1, 5] = np.nan
    (tmp_path / "layer_3_batch_0.pkl").write_bytes(pickle.dumps({"good": rows(1, 2), "bad": bad}))
    arguments = ["import-legacy", str(tmp_path), "--output", str(tmp_path / "new"), "--hidden_size", "16"]
    for _ in range(2):
        assert main(arguments) == 1
        named, count = capsys.readouterr().out.splitlines()
        assert named.startswith("task bad test 0 identity sample 0")
        assert named.endswith("is not imported: blocks.3.hook_resid_post is not finite at position 1")
        assert count == f"1 sequences in {tmp_path / 'new'}"


def test_a_row_of_zeros_is_named_and_the_others_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad = rows(0, 3)
    bad[2] = 0
    (tmp_path / "layer_3_batch_0.pkl").write_bytes(pickle.dumps({"good": rows(1, 2), "bad": bad}))
    output = str(tmp_path / "new")
    assert main(["import-legacy", str(tmp_path), "--output", output, "--hidden_size", "16"]) == 1
    named, count = capsys.readouterr().out.splitlines()
    assert named.endswith("is not imported: blocks.3.hook_resid_post is all zero at position 2")
    assert count == f"1 sequences in {output}"
    assert list(verify_store(ActivationStore(output))) == []


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([5, 3, 9], [5, 3, 9]),
        ([5, 3, 3], [0, 1, 2]),
        ([5, None, 9], [0, 1, 2]),
        ([None, None, None], [0, 1, 2]),
        ([np.int64(2), 1, 0], [2, 1, 0]),
    ],
)
def test_sample_indices_are_kept_where_they_tell_a_tasks_items_apart(
    tmp_path: Path, said: list[Any], expected: list[int]
):
    """Also over several files; other tasks, numbered or not, have no part in it."""

    def item(task: Any, sample: Any, seed: int) -> dict[str, Any]:
        named = {} if sample is None else {"sample_index": sample}
        return {"task_id": task, "activation": rows(seed, 2), **named}

    first = [item(np.int64(7), said[0], 0), item("u", 3, 8), item(7, said[1], 1)]
    (tmp_path / "layer_0_batch_0.pkl").write_bytes(pickle.dumps(first))
    (tmp_path / "layer_0_batch_1.pkl").write_bytes(pickle.dumps([item("7", said[2], 2), item("u", 3, 9)]))
    for _ in range(2):
        assert import_legacy(tmp_path, tmp_path / "new", 16) == 5
    store = ActivationStore(tmp_path / "new")
    found = {(one.task_id, one.sample_index): store.rows(one, 0) for one in store}
    assert set(found) == {("u", 0), ("u", 1), *(("7", sample) for sample in expected)}
    for seed, sample in enumerate(expected):
        np.testing.assert_array_equal(found["7", sample], rows(seed, 2))


def test_pickles_behind_a_url_are_refused(tmp_path: Path):
    with pytest.raises(StoreError, match="are read from a local directory, not from gs://bucket/old"):
        import_legacy("gs://bucket/old", tmp_path / "new", 16)


def test_rows_of_the_other_byte_order_are_read_right(tmp_path: Path):
    (tmp_path / "layer_0_batch_0.pkl").write_bytes(pickle.dumps([rows(0, 3).astype(">f4")]))
    import_legacy(tmp_path, tmp_path / "new", 16)
    store = ActivationStore(tmp_path / "new")
    np.testing.assert_array_equal(store.rows(next(store.sequences()), 0), rows(0, 3))


class _Reduced:
    """Pickled as a call and, where there is one, a state."""

    def __init__(self, *reduced: Any) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Any:
        return self._reduced


FEW = bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([rows(0, 3)]) + pickle.dumps([rows(1, 3)]), "something follows the pickle"),
        (pickle.dumps([rows(0, 3)]) + b"\n", "something follows the pickle"),
        (pickle.dumps([_Reduced(np.ndarray, ((10**7, 16), np.float32, FEW, 0, (0, 4)))]), "refused"),
        (pickle.dumps([_Reduced(np.ndarray, ((10**9, 16), np.float32))]), "refused"),
        (pickle.dumps([rows(0, 3)] * 100), "its arrays are larger than its"),
        (pickle.dumps([np.array([[object()]])]), "refused"),
        (pickle.dumps([np.array([["a"]], dtype=object)]), "an array of Python objects"),
        (pickle.dumps([np.zeros((2, 16), [("a", "O"), ("b", "f4")])]), "an array of Python objects"),
        (pickle.dumps([np.zeros((2, 16), [("a", "f4")])]), "has no array of"),
        (pickle.dumps([np.zeros(16, np.float32)]), r"shape \(16,\), not \[rows, hidden\]"),
        (pickle.dumps([np.zeros((), np.float32)]), r"shape \(\), not \[rows, hidden\]"),
        (pickle.dumps([np.zeros((2, 16), np.int32)]), "has no array of"),
        (pickle.dumps([None]), "has no array of"),
        (pickle.dumps([{"task_id": [1], "activation": rows(0, 3)}]), "neither text nor number"),
        (pickle.dumps([{"task_id": "a", "sample_idx": "0", "activation": rows(0, 3)}]), "neither text nor"),
        (pickle.dumps([{"task_id": True, "activation": rows(0, 3)}]), "neither text nor"),
        (pickle.dumps([{"task_id": "a", "sample_idx": True, "activation": rows(0, 3)}]), "neither text nor"),
        (pickle.dumps([{"task_id": "a", "sample_idx": -1, "activation": rows(0, 3)}]), "they count from 0"),
        (pickle.dumps({"a\x1b[2J": rows(0, 3)}), "cannot be stored as"),
        (pickle.dumps({"\ud800": rows(0, 3)}), "cannot be stored as"),
        (pickle.dumps({"a": rows(0, 3), "b" * 3000: rows(0, 3)}), "cannot be stored as"),
        (b"\x80\x04]r\xff\xff\xff\xff.", "numbers more objects than it can hold"),
        (b"\x80\x04]\x8e\xff\xff\xff\xff\xff\xff\xff\x00", "refused"),  # bytes without end
        (pickle.dumps([rows(0, 64)], 2).replace(b"K@K\x10", b"K\xffK\x10"), "refused"),  # 255 rows, not 64
    ],
)
def test_a_pickle_of_any_other_kind_is_named_and_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "old" / "layer_0_batch_0.pkl"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StoreError, match=message) as raised:
        import_legacy(path.parent, tmp_path / "new", 16)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1500
    assert not (tmp_path / "new").exists()


def test_text_of_a_nested_list_is_not_made(tmp_path: Path):
    """Thirty lists of the one before, twice: a gigabyte as text."""
    nested: Any = ["x"]
    for _ in range(30):
        nested = [nested, nested]
    path = tmp_path / "layer_0_batch_0.pkl"
    path.write_bytes(pickle.dumps([{"task_id": nested, "activation": rows(0, 3)}]))
    with pytest.raises(StoreError, match="neither text nor number"):
        read_legacy(path)


def test_two_files_of_one_layer_and_batch_are_refused(tmp_path: Path):
    write_pickles(tmp_path / "old")
    (tmp_path / "old" / "layer_010_batch_0.pkl").write_bytes(pickle.dumps([rows(0, 2)]))
    with pytest.raises(StoreError, match="are both layer 10 of one batch"):
        import_legacy(tmp_path / "old", tmp_path / "new", 16)


@pytest.mark.timeout(60)
def test_a_pickle_that_is_no_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "layer_0_batch_0.pkl")
    with pytest.raises(StoreError, match="it is no file"):
        import_legacy(tmp_path, tmp_path / "new", 16)
