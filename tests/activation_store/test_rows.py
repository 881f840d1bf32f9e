"""Rows in a person's hands: float32 by default, layers by name, never the rows of another sequence."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from activation_fakes import SETTINGS, batch, sequence, settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    RowFilter,
    SequenceRecord,
    ShuffledBatches,
    StoreError,
)

ABSENT = [-1, 0, 2, 9, 13, 10**30, np.int64(-2), [10, 13], "blocks.2.hook_resid_post"]
NO_LAYERS = [True, np.True_, jnp.asarray(True), [True], 11.0, np.float64(11), [11.0], "11", ["11"], "", "12:"]
NO_LAYERS += ["blocks.11.hook_scale", b"11", slice(10, 12), [[11]], object()]


@pytest.fixture(scope="module")
def submitted() -> list[FinishedSequence]:
    """Rows far from 0, where bfloat16 has a step of 0.06: sums in it go wrong."""
    found = batch(*(f"t{number}" for number in range(40)))
    for one in found:
        assert one.rows is not None
        one.rows[:] = (one.rows.astype(np.float32) * 3 - 7.76).astype(ml_dtypes.bfloat16)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, submitted: list[FinishedSequence]) -> ActivationStore:
    directory = tmp_path_factory.mktemp("rows")
    with ActivationWriter(directory, SETTINGS, provenance={}) as writer:
        for start in range(0, len(submitted), 20):
            writer.submit(submitted[start : start + 20])
    return ActivationStore(directory)


def exact(submitted: list[FinishedSequence], layer: int) -> np.ndarray:
    """The rows of all sequences in float64."""
    place = {10: 0, 11: 1, 12: 2}[layer]
    return np.concatenate([one.rows[place].astype(np.float64) for one in submitted])  # type: ignore[index]


def first(store: ActivationStore) -> SequenceRecord:
    return next(store.sequences())


# --- float32 ------------------------------------------------------------------------------------------------


def test_figures_of_all_rows_are_right_in_numpy(store: ActivationStore, submitted: list[FinishedSequence]):
    wanted = exact(submitted, 12)
    rows = np.concatenate([rows for rows, *_ in store.iterate(12)])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, wanted.astype(np.float32))
    np.testing.assert_allclose(rows.mean(0), wanted.mean(0), rtol=1e-5)
    np.testing.assert_allclose(rows.std(), wanted.std(), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.linalg.norm(wanted, axis=1), rtol=1e-5)
    np.testing.assert_allclose(np.cov(rows.T), np.cov(wanted.T), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(rows @ rows[0], wanted @ wanted[0], rtol=1e-5)
    one = np.concatenate([store.rows(record, 12) for record in store.sequences()])
    np.testing.assert_array_equal(one, rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_of_every_stored_type_are_float32_and_as_stored(tmp_path: Path, dtype: str):
    of = settings(dtype=dtype)
    one = sequence("a", of=of)
    with ActivationWriter(tmp_path, of, provenance={}) as writer:
        writer.submit([one])
    store = ActivationStore(tmp_path)
    assert one.rows is not None
    stored = store.rows(store[0], 11, dtype="stored")
    assert (stored.dtype, stored.tobytes()) == (store.dtype, one.rows[1].tobytes())
    assert not stored.flags.writeable
    rows = store.rows(store[0], 11)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, one.rows[1].astype(np.float32))


def test_rows_go_into_files_and_other_libraries_without_a_word(store: ActivationStore, tmp_path: Path):
    rows = store.rows(first(store), 11)
    assert rows.flags.writeable
    assert rows.flags.c_contiguous
    np.save(tmp_path / "rows.npy", rows)
    loaded = np.load(tmp_path / "rows.npy")
    np.testing.assert_array_equal(loaded, rows)
    assert loaded.dtype == np.float32
    on_device = jnp.asarray(rows)
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device.sum(), rows.sum(), rtol=1e-5)
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that may not be written to
        tensors = [torch.from_numpy(rows), torch.tensor(rows), torch.as_tensor(store.tokens(first(store)))]
        columns = store.columns(first(store), 11)
        tensors += [torch.from_numpy(column) for column in columns]
    assert tensors[0].dtype == torch.float32


def test_what_is_written_into_an_array_stays_there(store: ActivationStore):
    record = first(store)
    before = store.sequence_digest(record)
    for array in (store.rows(record, 11), *store.columns(record, 11), store.tokens(record)):
        array[:] = 0
    store.generated_tokens(record)[:] = 0
    for rows, columns, _ in store.iterate(11):
        rows[:] = 0
        for column in columns:
            column[:] = 0
    assert store.sequence_digest(record) == ActivationStore(store.directory).sequence_digest(record) == before
    for rows, columns, _ in store.iterate(11, dtype="stored"):
        for array in (rows, columns.token_ids, columns.positions, columns.logprobs, columns.norms):
            with pytest.raises(ValueError, match="read-only"):
                array[:] = 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "", None, np.float32, 32])
def test_another_type_is_one_sentence(store: ActivationStore, dtype: Any):
    for read in (lambda: store.rows(first(store), 11, dtype=dtype), lambda: store.iterate(11, dtype=dtype)):
        with pytest.raises(StoreError, match='dtype must be "float32" or "stored"'):
            read()


# --- Several layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[10, 12], (12, 10), range(10, 13), np.array([11, 10]), {11}])
def test_several_layers_come_by_name_and_row_by_row_aligned(store: ActivationStore, layers: Any):
    record = first(store)
    rows, columns = store.rows(record, layers), store.columns(record, layers)
    assert list(rows) == list(columns.norms) == [int(layer) for layer in layers]
    for layer in rows:
        np.testing.assert_array_equal(rows[layer], store.rows(record, layer))
        np.testing.assert_array_equal(columns.norms[layer], store.columns(record, layer).norms)
    with pytest.raises(KeyError):
        rows[0]


def test_several_layers_are_read_in_the_same_order_as_one(store: ActivationStore):
    chosen = RowFilter(prompt=False, stop_position=9)
    several = list(store.iterate([12, 10], rows=chosen))
    for layer in (10, 12):
        alone = list(store.iterate(layer, rows=chosen))
        assert [record for *_, record in several] == [record for *_, record in alone]
        for (rows, columns, _), (expected, of_one, _) in zip(several, alone, strict=True):
            np.testing.assert_array_equal(rows[layer], expected)
            np.testing.assert_array_equal(columns.norms[layer], of_one.norms)
            for column, other in zip(columns[:4], of_one[:4], strict=True):
                np.testing.assert_array_equal(column, other)
    stored, *_ = next(store.iterate([12, 10], dtype="stored"))
    assert {layer: rows.dtype for layer, rows in stored.items()} == {12: store.dtype, 10: store.dtype}


def test_a_row_of_several_layers_is_kept_by_its_norm_in_each(store: ActivationStore):
    norms = np.concatenate([[*columns.norms.values()] for _, columns, _ in store.iterate([10, 12])], axis=1)
    limit = float(np.median(norms))
    expected = np.all(norms <= limit, axis=0)
    found = list(store.iterate([10, 12], rows=RowFilter(max_norm=limit)))
    assert 0 < expected.sum() < expected.size
    for place, layer in enumerate((10, 12)):
        kept = np.concatenate([columns.norms[layer] for _, columns, _ in found])
        np.testing.assert_array_equal(kept, norms[place][expected])
        all_rows = np.concatenate([rows for rows, *_ in store.iterate(layer)])
        np.testing.assert_array_equal(np.concatenate([rows[layer] for rows, *_ in found]), all_rows[expected])


def test_a_layer_has_several_names(store: ActivationStore):
    record = first(store)
    expected = store.rows(record, 12)
    names = [np.int64(12), np.uint8(12), np.array(12), jnp.asarray(12), "blocks.12.hook_resid_post"]
    for name in names:
        np.testing.assert_array_equal(store.rows(record, name), expected)
        np.testing.assert_array_equal(store.rows(record, [name])[12], expected)
        assert store.statistics(name).mean_norm == store.statistics(12).mean_norm


@pytest.mark.parametrize("layer", ABSENT)
def test_a_layer_that_is_not_stored_is_never_another(store: ActivationStore, layer: Any):
    for read in (store.rows, store.columns):
        with pytest.raises(StoreError, match=r"layer -?\d+ is not in .*; its layers: 10, 11, 12"):
            read(first(store), layer)
    with pytest.raises(StoreError, match="is not in"):
        store.iterate(layer)
    with pytest.raises(StoreError, match=r"is not in|one layer is wanted"):
        store.statistics(layer)


@pytest.mark.parametrize("layer", NO_LAYERS)
def test_what_names_no_layer_is_one_sentence(store: ActivationStore, layer: Any):
    for read in (store.rows, store.columns):
        with pytest.raises(StoreError, match="names no layer: give its number, such as 12"):
            read(first(store), layer)


def test_no_layer_and_the_same_layer_twice_are_refused(store: ActivationStore):
    for layers in ([], (), [11, 11], [11, "blocks.11.hook_resid_post"]):
        with pytest.raises(StoreError, match="layers are named once each, at least one of them"):
            store.rows(first(store), layers)
    nothing: Any = None
    with pytest.raises(StoreError, match="None names no layer"):
        store.rows(first(store), nothing)
    with pytest.raises(StoreError, match="one layer is wanted here"):
        store.statistics([11])  # type: ignore[arg-type]


# --- Rows of this store -------------------------------------------------------------------------------------


def accessors(store: ActivationStore) -> list[Any]:
    return [
        lambda record: store.rows(record, 11),
        store.columns,
        store.tokens,
        store.prompt_token_ids,
        store.generated_tokens,
        store.generated_logprobs,
        store.sequence_digest,
        lambda record: list(store.iterate(11, sequences=[record])),
        lambda record: store.to_dataframe(sequences=[record]),
    ]


def test_a_record_of_another_store_is_refused(store: ActivationStore, submitted: Any, tmp_path: Path):
    """Also that of the very same sequence, which lies elsewhere in another store."""
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit([submitted[7], submitted[3]])
        writer.submit([sequence("only here")])
    for record in ActivationStore(tmp_path):
        assert record not in store
        for read in accessors(store):
            with pytest.raises(StoreError, match=r"task .* is no record of .*rows"):
                read(record)


def test_a_record_that_was_changed_is_refused(store: ActivationStore):
    record = ActivationStore(store.directory)[5]
    for changed in (record._replace(shard="shard-000001.safetensors"), record._replace(key="0" * 32)):
        for read in accessors(store):
            with pytest.raises(StoreError, match=r"is no record of"):
                read(changed)
    for changed in (
        record._replace(n_rows=10**6),
        record._replace(row_start=-3),
        record._replace(row_start=10**6),
    ):
        with pytest.raises(StoreError, match=r"end outside .*shard-000000|is no record of|not those from"):
            store.rows(changed, 11)


@pytest.mark.parametrize("record", [0, "0f" * 16, None, 1.5, (1, 2), {"key": "x"}])
def test_what_is_no_record_is_one_sentence(store: ActivationStore, record: Any):
    for read in accessors(store):
        with pytest.raises(StoreError, match=r"is no record: give store\[0\] or one that"):
            read(record)
    with pytest.raises(StoreError, match="is no record"):
        list(store.iterate(11, sequences=store[0]))  # type: ignore[arg-type]


def test_a_record_travels_to_another_reader_of_the_store(store: ActivationStore):
    other = ActivationStore(store.directory)
    for record in store:
        np.testing.assert_array_equal(other.rows(record, 11), store.rows(record, 11))


# --- Filters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"first_position": -1}, {"stop_position": -1}, {"first_position": 1.5}, {"stop_position": True}]
)
def test_a_position_counts_from_the_start(wrong: Any):
    with pytest.raises(StoreError, match=r"_position counts from 0, the first token of the prompt; it is"):
        RowFilter(**wrong)


def test_a_norm_is_a_number():
    for wrong in (-1.0, float("nan"), "a", "3", True, [1.0], {}):
        with pytest.raises(StoreError, match="max_norm must be a number of at least 0"):
            RowFilter(max_norm=wrong)  # type: ignore[arg-type]
    assert dataclasses.replace(RowFilter(), max_norm=float("inf"), first_position=np.int64(1)).max_norm


def test_what_is_no_filter_is_one_sentence(store: ActivationStore):
    asked: Any = store
    others: list[Any] = [{"prompt": False}, RowFilter, 5, "prompt", 0]
    for wrong in others:
        for read in (
            lambda wrong=wrong: asked.iterate(11, rows=wrong),
            lambda wrong=wrong: asked.to_dataframe(11, rows=wrong),
            lambda wrong=wrong: ShuffledBatches(asked, 11, 5, rows=wrong),
        ):
            with pytest.raises(StoreError, match=r"rows must be a RowFilter, such as"):
                read()
    for wrong in ({"task_ids": 5}, {"task_ids": [5]}, {"augmentations": 5}, {"task_ids": [["a"]]}):
        with pytest.raises(StoreError, match="must be a text or several, not"):
            list(asked.sequences(**wrong))
    with pytest.raises(StoreError, match="where must be a function of a record, not 'x'"):
        list(asked.sequences(where="x"))


# --- Short texts --------------------------------------------------------------------------------------------


def test_printing_is_short(store: ActivationStore, submitted: list[FinishedSequence]):
    record = first(store)
    columns = store.columns(record)
    n = record.n_rows
    texts = {
        f"ActivationStore('{store.directory}': 80 sequences, layers 10-12 of width 16, "
        "stored as bfloat16)": store,
        f"SequenceRecord('t0' test 0 identity sample 0: 5 + {n - 5} tokens, {n} rows, "
        f"{record.finish_reason}, key '{record.key}')": record,
        f"RowColumns(token_ids=int32[{n}], positions=int32[{n}], is_generated=bool[{n}], "
        f"logprobs=float32[{n}], norms={{10: float32[{n}], 11: float32[{n}], 12: float32[{n}]}})": columns,
    }
    for text, value in texts.items():
        assert repr(value) == text
    for value in (store.settings, store.statistics(11), submitted[0], submitted[0].id):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 250


def test_columns_are_a_pytree_of_jax(store: ActivationStore):
    doubled = jax.tree.map(lambda leaf: leaf * 2, store.columns(first(store)))
    np.testing.assert_array_equal(doubled.norms[11], 2 * store.columns(first(store), 11).norms)
    assert "norms={10:" in repr(jax.tree.map(lambda leaf: leaf.shape, doubled))


@pytest.mark.parametrize("first_position", [9, 10, 25, 10**6])
def test_a_filter_past_the_end_of_short_sequences_leaves_them_out(tmp_path: Path, first_position: int):
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit([sequence("long", prompt=20), sequence("short", prompt=4)])
    store, chosen = ActivationStore(tmp_path), RowFilter(first_position=first_position)
    long, short = store
    expected = np.arange(first_position, 26)
    found = [(record, columns.positions) for _, columns, record in store.iterate(10, rows=chosen)]
    assert [record for record, _ in found] == [long, short][: 2 if first_position < 10 else len(expected[:1])]
    if len(expected):
        np.testing.assert_array_equal(found[0][1], expected)
    assert chosen.row_range(short) == ((9, 10) if first_position == 9 else (10, 10))
