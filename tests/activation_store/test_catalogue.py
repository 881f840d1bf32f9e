"""Which sequences a store has: by number, by key, by task; and what there is where something is missing."""

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from activation_fakes import SETTINGS, batch, sequence, settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    SequenceRecord,
    ShuffledBatches,
    StoreError,
)
from activation_store.format import DTYPES


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Seven sequences of three tasks; the one of "bad" failed."""
    directory = tmp_path_factory.mktemp("catalogue")
    bad = sequence("bad")
    assert bad.rows is not None
    bad.rows[0, 0, 0] = np.nan
    for host, part in enumerate((batch("a", "bb"), [bad, *batch("a-")])):
        with ActivationWriter(directory, SETTINGS, host_index=host, provenance={}) as writer:
            writer.submit(part)
    return ActivationStore(directory)


def test_a_store_is_a_sequence_of_its_records(store: ActivationStore):
    records = list(store)
    assert all(isinstance(record, SequenceRecord) for record in records)
    assert len(store) == len(records) == 7
    for number, record in enumerate(records):
        assert store[number] == store[number - 7] == store[np.int64(number)] == store[record.key] == record
        assert record in store
        assert record.key in store
    assert store[2:5] == records[2:5]
    assert store[::-3] == records[::-3]
    assert list(reversed(store)) == records[::-1]
    assert [record.failed for record in records].count(True) == 1
    assert list(store.sequences()) == [record for record in records if not record.failed]


@pytest.mark.parametrize("number", [7, -8, 10**30])
def test_a_number_past_the_last_sequence_is_one_sentence(store: ActivationStore, number: int):
    with pytest.raises(IndexError, match=r"has 7 sequences, counted from 0: there is no -?\d+"):
        store[number]


@pytest.mark.parametrize("key", ["", "a", "0" * 32, "F" * 32, " " * 32, True, None, 1.0, (1, 2), b"0" * 32])
def test_a_key_that_is_not_stored_is_one_sentence(store: ActivationStore, key: Any):
    with pytest.raises(KeyError, match=r"no sequence of .* has the key .*; those of a task are"):
        store[key]
    assert key not in store


def test_the_tasks_are_listed_once_each_in_stored_order(store: ActivationStore):
    assert store.tasks() == ["a", "bb", "bad", "a-"]


def test_a_single_name_is_not_taken_for_its_letters(store: ActivationStore):
    assert [r.task_id for r in store.sequences(task_ids="bb")] == ["bb", "bb"]
    assert list(store.sequences(task_ids="a-bb")) == []
    assert len(list(store.sequences(augmentations="identity"))) == 6
    names: Any = iter(["a", "bb"])  # is not used up by the first record
    assert len(list(store.sequences(task_ids=names))) == 4


def test_a_store_that_was_copied_or_pickled_reads_the_same(store: ActivationStore):
    expected = store.rows(store[0], 11)
    for other in (copy.copy(store), copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert list(other) == list(store)
        np.testing.assert_array_equal(other.rows(store[0], 11), expected)


# --- Text and tokens ----------------------------------------------------------------------------------------


class Words:
    """A tokenizer that says what it was asked."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert all(type(token) is int for token in tokens)
        return f"{tokens} {skip_special_tokens}"


def test_text_and_tokens_need_no_layer(store: ActivationStore):
    one = batch("a", "bb")[1]
    record = store[1]
    assert store.answer(record, Words()) == f"{one.token_ids.tolist()} True"
    everything = np.concatenate([one.id.prompt_token_ids, one.token_ids])
    np.testing.assert_array_equal(store.tokens(record), everything)
    columns = store.columns(record)
    np.testing.assert_array_equal(
        columns.token_ids, one.token_ids
    )  # sample 1: the prompt's rows are sample 0's
    assert sorted(columns.norms) == [10, 11, 12]


@pytest.mark.parametrize("tokenizer", [None, "Qwen/Qwen2.5-0.5B-Instruct", object(), {"decode": 1}])
def test_what_is_no_tokenizer_is_one_sentence(store: ActivationStore, tokenizer: Any):
    with pytest.raises(
        StoreError, match=r"is no tokenizer; AutoTokenizer\.from_pretrained\(\.\.\.\) makes one"
    ):
        store.answer(store[0], tokenizer)


# --- What is missing ----------------------------------------------------------------------------------------


def test_a_failed_sequence_says_so_in_every_accessor(store: ActivationStore):
    (record,) = store.sequences(failed=True)
    for read in (
        store.tokens,
        store.columns,
        lambda r: store.answer(r, Words()),
        lambda r: store.rows(r, 11),
    ):
        with pytest.raises(StoreError, match=r"failed and has nothing stored: .*store\.sequences\(\) leaves"):
            read(record)
    assert "blocks.10.hook_resid_post is not finite at position 0, failed" in repr(record)
    assert list(store.iterate(11, sequences=[record])) == []
    assert list(ShuffledBatches(store, 11, 4, sequences=[record])) == []


def test_an_empty_store_is_empty(tmp_path: Path):
    ActivationWriter(tmp_path, SETTINGS, provenance={}).close()
    store = ActivationStore(tmp_path)
    assert (len(store), list(store), store.tasks(), store[:3], list(store.iterate(11))) == (0, [], [], [], [])
    assert "0 sequences, layers 10-12" in repr(store)
    with pytest.raises(IndexError, match="has 0 sequences"):
        store[0]
    assert list(ShuffledBatches(store, 11, 4)) == []
    with pytest.raises(StoreError, match="has no generated rows to take statistics of"):
        store.statistics(11)


def test_a_store_without_capture_has_tokens_and_text(tmp_path: Path):
    of = settings(hook_names=())
    one = sequence("a", of=of)
    with ActivationWriter(tmp_path, of, provenance={}) as writer:
        writer.submit([one])
    store = ActivationStore(tmp_path)
    record = store[0]
    assert store.answer(record, Words()) == f"{one.token_ids.tolist()} True"
    assert len(store.tokens(record)) == 10
    columns = store.columns(record)
    np.testing.assert_array_equal(columns.token_ids, one.token_ids)
    np.testing.assert_array_equal(columns.logprobs, one.logprobs)
    assert columns.norms == {}
    assert "layers none" in repr(store)
    for read in (
        lambda: store.rows(record, 11),
        lambda: store.iterate(11),
        lambda: store.statistics(11),
        lambda: ShuffledBatches(store, 11, 4),
    ):
        with pytest.raises(StoreError, match=r"layer 11 is not in .*; it was made without activations"):
            read()


def test_an_imported_sequence_has_rows_but_no_text(tmp_path: Path):
    of = settings(capture_prompt=False, eos_token_ids=())
    rows = np.ones((3, 4, 16), DTYPES[SETTINGS.dtype])
    one = sequence("a", of=of)
    unknown = FinishedSequence(
        one.id, np.full(4, -1, np.int32), np.full(4, np.nan, np.float32), "imported", rows
    )
    with ActivationWriter(tmp_path, of, provenance={}) as writer:
        writer.submit([unknown])
    store = ActivationStore(tmp_path)
    assert store.generated_tokens(store[0]).tolist() == [-1] * 4
    assert store.rows(store[0], 11).shape == (4, 16)
    with pytest.raises(StoreError, match="was imported without its tokens, so it has no text"):
        store.answer(store[0], Words())


def test_a_store_that_is_being_written_shows_what_was_committed(tmp_path: Path):
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit(batch("a"))
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        store = ActivationStore(tmp_path)
        assert store.tasks() == ["a"]
        writer.submit(batch("bb"))
        while len(writer.committed) == 2:
            time.sleep(0.01)
        assert len(store) == 2
        assert store.index.refresh() == 2
        assert store[-1].task_id == "bb"
        np.testing.assert_array_equal(store.tokens(store[3]), ActivationStore(tmp_path).tokens(store[3]))


def test_a_shard_that_was_replaced_is_read_anew(tmp_path: Path):
    """A reader stays open while a repair removes a shard and the run writes another under its name."""
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit(batch("a"))
    store = ActivationStore(tmp_path)
    before = store[0]
    store.rows(before, 11)
    for file in ("index.jsonl", before.shard):
        (tmp_path / "host-00000" / file).unlink()
    expected = [sequence("b"), *batch("a")]
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit(expected)
    store.index.refresh()
    for one, record in zip(expected, store, strict=True):
        assert record.path == before.path
        np.testing.assert_array_equal(store.rows(record, 11), one.rows[1])  # type: ignore[index]
    with pytest.raises(StoreError, match="or was replaced there"):
        store.rows(before, 11)
