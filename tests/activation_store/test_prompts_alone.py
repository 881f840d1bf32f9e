"""A store of prompts of which nothing was generated: every reader, check and export takes it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from activation_fakes import batch, read_index, sequence, settings, write_index

from activation_store import ActivationStore, ActivationWriter, RowFilter, ShuffledBatches, StoreError
from activation_store.__main__ import main
from activation_store.format import StoreUsageError
from activation_store.packing import pack_batch
from activation_store.verify import verify_store

PROMPTS = settings(max_output_tokens=0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    with ActivationWriter(store, PROMPTS, provenance={}) as writer:
        writer.submit([sequence(task, of=PROMPTS, prompt=3 + len(task), generated=0) for task in ("a", "bb")])
        writer.submit([sequence("ccc", of=PROMPTS, prompt=1, generated=0)])
    return store


def test_it_holds_the_rows_of_prompts_and_no_tokens(directory: Path):
    store = ActivationStore(directory)
    assert list(verify_store(store)) == []
    assert [(one.prompt_length, one.generated_length, one.n_rows) for one in store] == [
        (4, 0, 4),
        (5, 0, 5),
        (1, 0, 1),
    ]
    for record in store:
        expected = sequence(record.task_id, of=PROMPTS, prompt=record.prompt_length, generated=0)
        assert record.finish_reason == "length"
        for place, layer in enumerate(store.layers):
            assert expected.rows is not None
            np.testing.assert_array_equal(store.rows(record, layer, dtype="stored"), expected.rows[place])
        columns = store.columns(record)
        assert columns.positions.tolist() == list(range(record.prompt_length))
        assert columns.token_ids.tolist() == expected.id.prompt_token_ids.tolist()
        assert not columns.is_generated.any()
        assert np.isnan(columns.logprobs).all()
        assert len(store.generated_tokens(record)) == len(store.generated_logprobs(record)) == 0
        assert store.tokens(record).tolist() == expected.id.prompt_token_ids.tolist()


def test_its_rows_are_read_for_training(directory: Path):
    store = ActivationStore(directory)
    assert sum(len(rows) for rows, *_ in store.iterate(10)) == 10
    batches = ShuffledBatches(store, 10, batch_size=5)
    assert sum(len(one.rows) for one in batches) == 10
    assert not sum(len(rows) for rows, *_ in store.iterate(10, rows=RowFilter(prompt=False)))
    assert store.statistics(10, "prompt").count == 10
    with pytest.raises(StoreUsageError, match="has no generated rows"):
        store.statistics(10)


def test_it_is_continued_and_its_failed_sequences_are_told(directory: Path):
    failed = sequence("nan", of=PROMPTS, prompt=3, generated=0)
    assert failed.rows is not None
    failed.rows[1, 2] = np.nan
    with ActivationWriter(directory, PROMPTS, provenance={}) as writer:
        assert len(writer.committed) == 3
        writer.submit([failed])
    store = ActivationStore(directory)
    assert [one.failure for one in store.sequences(failed=True)] == [
        "blocks.11.hook_resid_post is not finite at position 2"
    ]
    assert list(verify_store(store)) == []


def test_its_command_line_works(directory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for words in (["verify"], ["stats"], ["view", "--output", str(tmp_path / "page.html")]):
        command, *flags = words
        assert main([command, str(directory), *flags]) == 0
    assert "prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capture_prompt": False}, "captures the rows of prompts"),
        ({"hook_names": ()}, "captures the rows of prompts"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
    ],
    ids=str,
)
def test_settings_that_would_store_nothing_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(StoreError, match=message):
        settings(**({"max_output_tokens": 0} | changes))


def test_what_does_not_fit_the_settings_is_refused():
    empty, no_rows = sequence("a", of=PROMPTS, generated=0), sequence("a", 1, of=PROMPTS, generated=0)
    for of, one, message in (
        (settings(), empty, "0 generated tokens, expected 1 to 12"),
        (PROMPTS, sequence("a"), "6 generated tokens, expected 0 to 0"),
        (PROMPTS, no_rows, "0 rows for 4 prompt and 0 generated tokens"),
    ):
        with pytest.raises(StoreError, match=message):
            pack_batch(of, [one])


def test_a_line_that_says_no_tokens_of_a_sequence_with_some_is_found(tmp_path: Path):
    with ActivationWriter(tmp_path, settings(), provenance={}) as writer:
        writer.submit(batch("a", samples=1))
    assert list(verify_store(ActivationStore(tmp_path))) == []
    (line,) = read_index(tmp_path)
    line |= {"prompt_length": line["n_rows"], "generated_length": 0}
    write_index(tmp_path, [line])
    assert list(verify_store(ActivationStore(tmp_path)))
