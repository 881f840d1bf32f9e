"""Training batches: every row once, in an order that follows from the seed, from any place on."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activation_fakes import batch, sequence, settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    RowFilter,
    ShuffledBatches,
    StoreError,
    shuffle,
)

# Rows whose first column is their number in the store: what a batch holds is then plain to see.
SETTINGS = settings(dtype="float32", hidden_size=4, max_output_tokens=200)
TASKS = [f"t{number}" for number in range(30)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    directory = tmp_path_factory.mktemp("store")
    number = 0
    with ActivationWriter(directory, SETTINGS, provenance={}) as writer:
        for at in range(0, len(TASKS), 4):
            part = [sequence(task, of=SETTINGS, generated=20 + 5 * at) for task in TASKS[at : at + 4]]
            for one in part:
                assert one.rows is not None
                count = one.rows.shape[1]
                one.rows[1, :, 0] = np.arange(number, number + count)
                number += count
            writer.submit(part)
    return ActivationStore(directory)


@pytest.fixture(autouse=True)
def _small_pools(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shuffle, "BLOCK_ROWS", 16)
    monkeypatch.setattr(shuffle, "POOL_ROWS", 256)


def numbers(batches: Any) -> list[int]:
    return [int(number) for one in batches for number in np.asarray(one.rows)[:, 0]]


def total(store: ActivationStore) -> int:
    return sum(record.n_rows for record in store.sequences())


def test_an_epoch_holds_every_row_once_and_mixed(store: ActivationStore):
    found = numbers(ShuffledBatches(store, 11, 50))
    assert sorted(found) == list(range(total(store)))
    # Neighbours in a batch are far apart in the store: a third of it on average, as in a true shuffle.
    assert np.abs(np.diff(found)).mean() > 0.2 * total(store)


def test_short_sequences_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sixty sequences of five rows in three files are no sixty reads: what lies together comes as a block."""
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        for shard in range(3):
            part = [sequence(f"s{shard}-{n}", of=SETTINGS, prompt=1, generated=4) for n in range(20)]
            writer.submit(part)
    opened: list[str] = []
    real = ActivationStore.open_shard
    monkeypatch.setattr(
        ActivationStore,
        "open_shard",
        lambda self, path, size: (opened.append(path), real(self, path, size))[1],
    )
    monkeypatch.setattr(shuffle, "POOL_ROWS", 16)  # nearly every block is a pool of its own
    found = numbers(ShuffledBatches(ActivationStore(tmp_path), 11, 50))
    assert len(found) == 300
    assert len(opened) <= 3 * 100 / 16 + 6


def test_batches_have_the_size_asked_for_but_the_last(store: ActivationStore):
    sizes = [len(one.rows) for one in ShuffledBatches(store, 11, 300)]
    assert set(sizes[:-1]) == {300}
    assert sizes[-1] == total(store) % 300


def test_a_batch_says_what_its_rows_are(store: ActivationStore):
    batches = ShuffledBatches(store, 11, 64)
    for one in batches:
        for place in range(0, len(one.rows), 13):
            record = store[batches.keys[one.sequences[place]]]
            row = int(np.flatnonzero(store.columns(record, 11).positions == one.positions[place])[0])
            np.testing.assert_array_equal(store.rows(record, 11)[row], one.rows[place])
            assert store.columns(record, 11).token_ids[row] == one.token_ids[place]
            assert store.columns(record, 11).is_generated[row] == one.is_generated[place]


def test_the_order_follows_from_the_seed_and_the_epoch(store: ActivationStore):
    batches = ShuffledBatches(store, 11, 50, seed=3)
    first, second = numbers(batches), numbers(batches)
    assert first != second
    assert sorted(first) == sorted(second)
    assert numbers(ShuffledBatches(store, 11, 50, seed=3)) == first
    assert numbers(ShuffledBatches(store, 11, 50, seed=4)) != first


@pytest.mark.parametrize("stop_after", [0, 1, 7, 20, 40, 41, 55])
def test_a_saved_state_goes_on_with_the_next_batch(store: ActivationStore, stop_after: int):
    def stream(batches: ShuffledBatches, count: int) -> list[list[int]]:
        found: list[list[int]] = []
        while len(found) < count:
            for one in batches:
                found.append(numbers([one]))
                if len(found) == count:
                    break
        return found

    whole = stream(ShuffledBatches(store, 11, 100), 60)
    first = ShuffledBatches(store, 11, 100)
    assert stream(first, stop_after) == whole[:stop_after]
    saved = json.loads(json.dumps(first.state_dict()))
    second = ShuffledBatches(store, 11, 100)
    second.load_state_dict(saved)
    assert stream(second, 60 - stop_after) == whole[stop_after:]


@pytest.mark.parametrize(
    "rows", [None, RowFilter(prompt=False), RowFilter(first_position=3, stop_position=40)]
)
def test_readers_share_the_rows_out(store: ActivationStore, rows: RowFilter | None):
    parts = [numbers(ShuffledBatches(store, 11, 50, rows=rows, reader=r, readers=3)) for r in range(3)]
    whole = numbers(ShuffledBatches(store, 11, 50, rows=rows))
    assert sorted(number for part in parts for number in part) == sorted(whole)
    assert max(map(len, parts)) - min(map(len, parts)) < 0.2 * len(whole)


def test_filters_choose_the_same_rows_as_reading_in_order(store: ActivationStore):
    median = float(np.median(np.concatenate([c.norms for _, c, _ in store.iterate(11)])))
    chosen = RowFilter(prompt=False, first_position=6, stop_position=90, max_norm=median)
    in_order = [int(row[0]) for rows, _, _ in store.iterate(11, rows=chosen) for row in rows]
    assert 0 < len(in_order) < total(store)
    assert sorted(numbers(ShuffledBatches(store, 11, 50, rows=chosen))) == in_order


def test_sequences_are_chosen_by_the_caller(store: ActivationStore):
    chosen = [record for record in store.sequences() if record.task_id in TASKS[:3]]
    found = numbers(ShuffledBatches(store, 11, 50, sequences=chosen))
    assert sorted(found) == list(range(sum(record.n_rows for record in chosen)))


def test_a_state_of_other_rows_is_refused(store: ActivationStore):
    saved = ShuffledBatches(store, 11, 50).state_dict()
    for other in (
        ShuffledBatches(store, 11, 50, seed=1),
        ShuffledBatches(store, 11, 50, readers=2),
        ShuffledBatches(store, 11, 50, rows=RowFilter(prompt=False)),
    ):
        with pytest.raises(StoreError, match="the saved state is of other batches"):
            other.load_state_dict(saved)


def test_a_state_may_go_on_with_another_batch_size(store: ActivationStore):
    first = ShuffledBatches(store, 11, 100)
    head = numbers([next(iter(first))])
    second = ShuffledBatches(store, 11, 33)
    second.load_state_dict(first.state_dict())
    assert head + numbers(second) == numbers(ShuffledBatches(store, 11, 100))


def test_an_empty_selection_has_no_batches(store: ActivationStore):
    assert list(ShuffledBatches(store, 11, 50, sequences=[])) == []


def test_bad_arguments_are_one_sentence(store: ActivationStore):
    with pytest.raises(StoreError, match="no batches of 0 rows"):
        ShuffledBatches(store, 11, 0)
    with pytest.raises(StoreError, match="reader 2 of 2"):
        ShuffledBatches(store, 11, 1, reader=2, readers=2)
    with pytest.raises(StoreError, match="layer 99 is not in"):
        ShuffledBatches(store, 99, 1)
    with pytest.raises(StoreError, match="framework 'tensorflow' is none of numpy, jax, torch"):
        ShuffledBatches(store, 11, 1, framework="tensorflow")


def test_batches_for_jax_are_jax_arrays(store: ActivationStore):
    one = next(iter(ShuffledBatches(store, 11, 50, framework="jax")))
    expected = next(iter(ShuffledBatches(store, 11, 50)))
    assert isinstance(one.rows, jax.Array)
    np.testing.assert_array_equal(one.rows, expected.rows)


@pytest.fixture(scope="module")
def bfloat16_store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    directory = tmp_path_factory.mktemp("bfloat16")
    of = settings()
    with ActivationWriter(directory, of, provenance={}) as writer:
        writer.submit(batch(*TASKS[:8], of=of))
    return ActivationStore(directory)


def test_bfloat16_stays_bfloat16(bfloat16_store: ActivationStore):
    torch = pytest.importorskip("torch")
    one = next(iter(ShuffledBatches(bfloat16_store, 11, 50)))
    for_jax = next(iter(ShuffledBatches(bfloat16_store, 11, 50, framework="jax")))
    for_torch = next(iter(ShuffledBatches(bfloat16_store, 11, 50, framework="torch")))
    assert for_jax.rows.dtype == jnp.bfloat16
    assert for_torch.rows.dtype == torch.bfloat16
    np.testing.assert_array_equal(for_jax.rows, one.rows)
    np.testing.assert_array_equal(for_torch.rows.float().numpy(), one.rows.astype(np.float32))
    assert for_torch.is_generated.dtype == torch.bool


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torch_data_loader_reads_every_row_once_an_epoch(store: ActivationStore, workers: int):
    pytest.importorskip("torch")
    from torch.utils.data import DataLoader

    dataset = ShuffledBatches(store, 11, 50, framework="torch").torch_dataset()
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None
    )
    orders = []
    for epoch in range(2 if workers == 0 else 1):
        dataset.set_epoch(epoch)
        orders.append(numbers(loader))
        assert sorted(orders[-1]) == list(range(total(store)))
    assert len(orders) == 1 or orders[0] != orders[1]


def test_a_state_survives_a_loader_without_workers(store: ActivationStore):
    pytest.importorskip("torch")
    from torch.utils.data import DataLoader

    batches = ShuffledBatches(store, 11, 50, framework="torch")
    loader = DataLoader(batches.torch_dataset(), batch_size=None)
    head: list[int] = []
    for one in loader:
        head += numbers([one])
        if len(head) >= 500:
            break
    rest = ShuffledBatches(store, 11, 50)
    rest.load_state_dict(batches.state_dict())
    assert head + numbers(rest) == numbers(ShuffledBatches(store, 11, 50))


def test_torch_is_imported_only_when_it_is_used(tmp_path: Path):
    import subprocess
    import sys

    program = "import sys, activation_store; assert 'torch' not in sys.modules and 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(shuffle.__file__).parents[1])
