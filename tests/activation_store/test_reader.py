"""Reading a store: sequences by filter, rows as memory maps, statistics merged from the shards."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from activation_fakes import SETTINGS, batch, sequence, settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    RowFilter,
    SequenceRecord,
    StoreError,
    sequence_key,
    write_outcomes,
)
from activation_store.__main__ import main
from activation_store.statistics import LayerStatistics, measure


@pytest.fixture
def submitted() -> list[FinishedSequence]:
    return [*batch("a", "bb"), *batch("ccc")]


@pytest.fixture
def store(tmp_path: Path, submitted: list[FinishedSequence]) -> ActivationStore:
    for host, part in enumerate((submitted[:4], submitted[4:])):
        with ActivationWriter(tmp_path, SETTINGS, host_index=host, provenance={}) as writer:
            writer.submit(part)
    return ActivationStore(tmp_path)


def test_rows_and_columns_of_a_sequence_are_those_submitted(
    store: ActivationStore, submitted: list[FinishedSequence]
):
    for record, one in zip(store.sequences(), submitted, strict=True):
        assert one.rows is not None
        for place, layer in enumerate(store.layers):
            np.testing.assert_array_equal(store.rows(record, layer), one.rows[place])
            columns = store.columns(record, layer)
            norms = np.linalg.norm(one.rows[place].astype(np.float32), axis=1)
            np.testing.assert_allclose(columns.norms, norms, rtol=1e-5)
        columns = store.columns(record, 11)
        assert columns.is_generated.sum() == len(one.token_ids)
        np.testing.assert_array_equal(columns.token_ids[columns.is_generated], one.token_ids)
        last = len(one.id.prompt_token_ids) + len(one.token_ids)
        np.testing.assert_array_equal(columns.positions, np.arange(last - record.n_rows, last))
        np.testing.assert_array_equal(store.generated_tokens(record), one.token_ids)
        np.testing.assert_array_equal(store.generated_logprobs(record), one.logprobs)
        np.testing.assert_array_equal(store.prompt_token_ids(record), one.id.prompt_token_ids)


def test_a_layer_is_a_view_into_the_map_of_its_file(store: ActivationStore):
    """No copy: the rows of two sequences of a shard lie in one buffer, where the file has them."""
    first, second = list(store.sequences())[:2]
    one, two = (store.rows(record, 11, dtype="stored") for record in (first, second))
    address = one.__array_interface__["data"][0]
    assert two.__array_interface__["data"][0] - address == one.nbytes
    assert not one.flags.owndata
    assert not one.flags.writeable


def keys(records: Any) -> list[tuple[str, int]]:
    return [(record.task_id, record.sample_index) for record in records]


def test_sequences_are_filtered_by_task_augmentation_and_any_condition(store: ActivationStore):
    everything = [("a", 0), ("a", 1), ("bb", 0), ("bb", 1), ("ccc", 0), ("ccc", 1)]
    assert keys(store.sequences()) == everything
    assert keys(store.sequences(task_ids={"bb", "none"})) == everything[2:4]
    assert keys(store.sequences(augmentations={"identity"})) == everything
    assert keys(store.sequences(augmentations={"flip"})) == []
    assert keys(store.sequences(where=lambda r: r.sample_index == 1, task_ids=("ccc",))) == [("ccc", 1)]


def test_sequences_are_filtered_by_outcome_once_it_is_known(store: ActivationStore, tmp_path: Path):
    records = list(store.sequences())
    assert keys(store.sequences(solved=True)) == keys(store.sequences(solved=False)) == []
    write_outcomes(tmp_path, {records[0].key: True, records[1].key: False})
    write_outcomes(tmp_path, {records[1].key: True, records[2].key: False})
    assert keys(store.sequences(solved=True)) == [("a", 0), ("a", 1)]
    assert keys(store.sequences(solved=False)) == [("bb", 0)]


def test_a_failed_sequence_is_listed_apart_and_has_nothing_to_read(tmp_path: Path):
    bad = sequence("bad")
    assert bad.rows is not None
    bad.rows[0, 0, 0] = np.nan
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit([bad, sequence("good")])
    store = ActivationStore(tmp_path)
    assert keys(store.sequences()) == [("good", 0)]
    assert keys(store.sequences(failed=True)) == [("bad", 0)]
    record = next(store.sequences(failed=True))
    for read in (store.generated_tokens, store.prompt_token_ids, lambda r: store.rows(r, 11)):
        with pytest.raises(StoreError, match="failed and has nothing stored"):
            read(record)
    assert len(store.sequence_digest(record)) == 64
    assert [record.task_id for _, _, record in store.iterate(11)] == ["good"]


def test_rows_are_filtered_by_kind_and_position(store: ActivationStore, submitted: list[FinishedSequence]):
    def positions(rows: RowFilter) -> list[list[int]]:
        found = store.iterate(11, rows=rows, sequences=store.sequences(task_ids={"a"}))
        return [columns.positions.tolist() for _, columns, _ in found]

    lengths = [(len(s.id.prompt_token_ids), len(s.token_ids)) for s in submitted[:2]]
    (p, n), (q, m) = lengths
    assert positions(RowFilter()) == [list(range(p + n)), list(range(q, q + m))]
    assert positions(RowFilter(prompt=False)) == [list(range(p, p + n)), list(range(q, q + m))]
    assert positions(RowFilter(generated=False)) == [list(range(p))]  # sample 1 has no prompt rows
    assert positions(RowFilter(first_position=1, stop_position=p + 1)) == [list(range(1, p + 1)), [q]]
    assert positions(RowFilter(generated=False, first_position=2)) == [list(range(2, p))]
    assert positions(RowFilter(stop_position=0)) == []
    assert positions(RowFilter(generated=False, prompt=False)) == []


def test_attention_sinks_are_filtered_by_norm(tmp_path: Path):
    sink = sequence("sink")
    assert sink.rows is not None
    sink.rows[1, 4] *= 100
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit([sink])
    store = ActivationStore(tmp_path)
    limit = RowFilter(max_norm=20.0)
    rows, columns, record = next(store.iterate(11, rows=limit))
    assert columns.positions.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(rows, np.delete(store.rows(record, 11), 4, axis=0))
    untouched, *_ = next(store.iterate(10, rows=limit))  # the sink is one of layer 11 only
    assert len(untouched) == 10


def test_statistics_merge_over_shards_and_hosts(store: ActivationStore, submitted: list[FinishedSequence]):
    for group, wanted in (("generated", True), ("prompt", False)):
        rows = np.concatenate(
            [store.rows(r, 12)[store.columns(r, 12).is_generated == wanted] for r in store.sequences()]
        ).astype(np.float64)
        merged = store.statistics(12, group)
        assert merged.count == len(rows)
        np.testing.assert_allclose(merged.mean, rows.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(merged.variance, rows.var(axis=0), rtol=1e-5)
        np.testing.assert_allclose(merged.mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-6)


def test_statistics_of_no_rows_are_refused_and_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    without_prompts = settings(capture_prompt=False)
    with ActivationWriter(tmp_path / "b", without_prompts, provenance={}) as writer:
        writer.submit(batch("a", of=without_prompts))
    with ActivationWriter(tmp_path / "c", settings(), provenance={}):
        pass
    answers = ActivationStore(tmp_path / "b")
    assert answers.statistics(12).count == sum(record.n_rows for record in answers)
    for store, group in ((answers, "prompt"), (ActivationStore(tmp_path / "c"), "generated")):
        with pytest.raises(StoreError, match=f"has no {group} rows to take statistics of"):
            store.statistics(12, group)
    assert main(["stats", str(tmp_path / "b")]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["generated"] * 3
    assert main(["stats", str(tmp_path / "c")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_statistics_do_not_depend_on_how_rows_are_grouped():
    rows = np.random.default_rng(0).normal(50, 3, (1000, 8)).astype(np.float32)
    whole, norms = measure(rows)
    parts = LayerStatistics.empty(8)
    for start in (0, 1, 300, 999):
        parts = parts.merge(measure(rows[start : {0: 1, 1: 300, 300: 999, 999: 1000}[start]])[0])
    wide = rows.astype(np.float64)
    for found in (whole, parts):
        np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-7)
        np.testing.assert_allclose(found.variance, wide.var(axis=0), rtol=1e-4)
        np.testing.assert_allclose(found.mean_norm, np.linalg.norm(wide, axis=1).mean(), rtol=1e-6)
    np.testing.assert_allclose(norms, np.linalg.norm(wide, axis=1), rtol=1e-6)


def test_the_mean_of_no_rows_is_nan():
    nothing = LayerStatistics.empty(4)
    assert np.isnan(nothing.mean_norm)
    assert np.isnan(nothing.variance).all()
    assert nothing.merge(nothing).count == 0


def test_a_digest_covers_rows_tokens_and_end(tmp_path: Path):
    def digest(name: str, one: FinishedSequence) -> str:
        with ActivationWriter(tmp_path / name, SETTINGS, provenance={}) as writer:
            writer.submit([sequence("before"), one])
        store = ActivationStore(tmp_path / name)
        return store.sequence_digest(store[sequence_key(SETTINGS, one.id)])

    base = digest("base", sequence("a"))
    row, token, logprob = sequence("a"), sequence("a"), sequence("a")
    assert row.rows is not None
    row.rows[2, 9, 15] += 1
    token.token_ids[0] += 1
    logprob.logprobs[0] -= 1
    assert len({base, *(digest(str(i), one) for i, one in enumerate((row, token, logprob)))}) == 4
    assert digest("again", sequence("a")) == base


def test_a_digest_does_not_depend_on_the_batch(tmp_path: Path):
    with ActivationWriter(tmp_path / "one", SETTINGS, provenance={}) as writer:
        writer.submit(batch("a", "bb", "ccc"))
    with ActivationWriter(tmp_path / "two", SETTINGS, provenance={}) as writer:
        for one in reversed(batch("a", "bb", "ccc")):
            writer.submit([one])
    one, two = ActivationStore(tmp_path / "one"), ActivationStore(tmp_path / "two")
    assert {r.key: one.sequence_digest(r) for r in one.sequences()} == {
        r.key: two.sequence_digest(r) for r in two.sequences()
    }


def test_more_shards_than_stay_open_are_read(tmp_path: Path):
    of = settings(hook_names=SETTINGS.hook_names[:1])
    with ActivationWriter(tmp_path, of, provenance={}) as writer:
        for number in range(140):
            writer.submit([sequence(f"t{number}", of=of)])
    store = ActivationStore(tmp_path)
    first = store.rows(next(store.sequences()), 10)
    assert sum(len(rows) for rows, _, _ in store.iterate(10)) == 1400
    np.testing.assert_array_equal(first, sequence("t0", of=of).rows[0])  # type: ignore[index]


def test_a_store_travels_to_another_process(store: ActivationStore):
    record = next(store.sequences())
    store.rows(record, 11)
    copied = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copied.rows(record, 11), store.rows(record, 11))


def test_what_is_no_store_is_one_sentence(tmp_path: Path):
    with pytest.raises(StoreError, match=r"is not an activation store: it has no manifest\.json"):
        ActivationStore(tmp_path)


def test_a_layer_that_is_not_stored_is_one_sentence(store: ActivationStore):
    with pytest.raises(StoreError, match=r"layer 9 is not in .*; its layers: 10, 11, 12"):
        store.rows(next(store.sequences()), 9)


def test_a_shard_that_is_missing_or_cut_is_one_sentence(store: ActivationStore, tmp_path: Path):
    record: SequenceRecord = next(store.sequences())
    path = tmp_path / record.path
    data = path.read_bytes()
    for damage in (lambda: path.write_bytes(data[:200]), lambda: path.write_bytes(b""), path.unlink):
        damage()
        with pytest.raises(StoreError, match=r"shard-000000\.safetensors"):
            ActivationStore(tmp_path).rows(record, 11)
