"""A table of tokens for pandas, line by line what the store holds."""

import sys
from pathlib import Path

import numpy as np
import pytest
from activation_fakes import SETTINGS, batch, settings

from activation_store import ActivationStore, ActivationWriter, RowFilter, StoreError

pandas = pytest.importorskip("pandas")
OF_SEQUENCE = ["task_id", "test_index", "sample_index", "augmentation", "key"]
OF_ROW = ["position", "token_id", "is_generated", "logprob"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    directory = tmp_path_factory.mktemp("tables")
    with ActivationWriter(directory, SETTINGS, provenance={}) as writer:
        writer.submit(batch("a", "bb"))
        writer.submit(batch("ccc"))
    return ActivationStore(directory)


def test_each_row_has_a_line_with_its_token_and_sequence(store: ActivationStore):
    table = store.to_dataframe()
    assert list(table) == [*OF_SEQUENCE, *OF_ROW, "norm_10", "norm_11", "norm_12"]
    assert len(table) == sum(record.n_rows for record in store)
    start = 0
    for record in store:
        lines, columns = table[start : start + record.n_rows], store.columns(record)
        for name in OF_SEQUENCE:
            assert set(lines[name]) == {getattr(record, name)}
        known = (columns.positions, columns.token_ids, columns.is_generated, columns.logprobs)
        for name, values in zip(OF_ROW, known, strict=True):
            np.testing.assert_array_equal(lines[name], values)
            assert lines[name].dtype == values.dtype
        for layer in store.layers:
            np.testing.assert_array_equal(lines[f"norm_{layer}"], columns.norms[layer])
        start += record.n_rows


def test_its_lines_are_the_rows_that_iterate_yields(store: ActivationStore):
    chosen = RowFilter(prompt=False, stop_position=9, max_norm=4.0)
    table = store.to_dataframe(11, rows=chosen, sequences=store.sequences(task_ids={"bb", "ccc"}))
    rows = [
        rows for rows, *_ in store.iterate(11, rows=chosen, sequences=store.sequences(task_ids={"bb", "ccc"}))
    ]
    assert 0 < len(table) == len(np.concatenate(rows))
    assert list(table)[-1] == "norm_11"
    np.testing.assert_allclose(table["norm_11"], np.linalg.norm(np.concatenate(rows), axis=1), rtol=1e-5)
    assert table["is_generated"].all()
    assert (table["norm_11"] <= 4.0).all()
    assert list(store.to_dataframe([12, 10]))[-2:] == ["norm_12", "norm_10"]


def test_it_is_grouped_and_joined_as_tables_are(store: ActivationStore):
    table = store.to_dataframe()
    counted = table.groupby("key", observed=True).size()
    assert counted.to_dict() == {record.key: record.n_rows for record in store}
    sequences = pandas.DataFrame(store)
    assert list(sequences.columns) == list(store[0]._fields)
    joined = table.merge(sequences[["key", "finish_reason"]], on="key")
    assert len(joined) == len(table)


def test_tables_without_lines_have_all_columns(store: ActivationStore, tmp_path: Path):
    empty = store.to_dataframe(11, sequences=[])
    assert len(empty) == 0
    assert {name: empty[name].dtype for name in empty} == {
        name: column.dtype for name, column in store.to_dataframe(11)[:0].items() if name not in OF_SEQUENCE
    } | {name: empty[name].dtype for name in OF_SEQUENCE}
    of = settings(hook_names=())
    with ActivationWriter(tmp_path, of, provenance={}) as writer:
        writer.submit(batch("a", of=of))
    without = ActivationStore(tmp_path).to_dataframe()
    assert list(without) == [*OF_SEQUENCE, *OF_ROW]
    assert len(without) == sum(record.generated_length for record in ActivationStore(tmp_path))


def test_a_missing_pandas_is_one_sentence(store: ActivationStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(StoreError, match="a DataFrame needs pandas: pip install pandas"):
        store.to_dataframe()
    with pytest.raises(StoreError, match="layer 9 is not in"):
        store.to_dataframe(9)
