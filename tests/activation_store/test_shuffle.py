"""Training batches: every row once, in an order that follows from the seed, from any place on."""

import copy
import json
import pickle
import subprocess
import sys
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
ORDER = (1324, [547, 148, 1139, 1266, 1515], [2597, 1223, 1215])  # of the store below, seed 3, reader 1 of 2


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


def test_the_order_of_a_seed_never_changes(store: ActivationStore):
    """A saved state must mean the same place in later versions."""
    found = numbers(ShuffledBatches(store, 11, 50, seed=3, reader=1, readers=2))
    assert (len(found), found[:5], found[-3:]) == ORDER


def test_several_layers_come_aligned_and_in_the_order_of_one(store: ActivationStore):
    chosen = RowFilter(prompt=False, stop_position=90)
    several = ShuffledBatches(store, [12, 10], 64, seed=5, rows=chosen)
    for layer in (10, 12):
        alone = ShuffledBatches(store, layer, 64, seed=5, rows=chosen)
        for one, expected in zip(several, alone, strict=True):
            assert list(one.rows) == [12, 10]
            np.testing.assert_array_equal(one.rows[layer], expected.rows)
            for column, other in zip(one[1:], expected[1:], strict=True):
                np.testing.assert_array_equal(column, other)
        several.set_epoch(0)


def test_several_layers_are_filtered_by_the_norm_in_each(store: ActivationStore):
    norms = np.stack([np.concatenate([c.norms for _, c, _ in store.iterate(layer)]) for layer in (10, 12)])
    chosen = RowFilter(max_norm=float(np.median(norms)))
    found = np.concatenate([one.rows[12][:, 0] for one in ShuffledBatches(store, [10, 12], 64, rows=chosen)])
    in_order = np.concatenate([rows[12][:, 0] for rows, *_ in store.iterate([10, 12], rows=chosen)])
    assert 0 < len(found) < np.count_nonzero(norms[0] <= chosen.max_norm)
    assert sorted(found) == sorted(in_order)


@pytest.mark.parametrize("size", [1, 33, 300, 10**6])
@pytest.mark.parametrize("rows", [None, RowFilter(max_norm=1500.0), RowFilter(prompt=False)])
def test_the_number_of_batches_is_known_before(store: ActivationStore, size: int, rows: RowFilter | None):
    for readers in (1, 3):
        for reader in range(readers):
            batches = ShuffledBatches(store, 11, size, rows=rows, reader=reader, readers=readers)
            for _ in range(1 if size == 1 else 3):
                expected = len(batches)
                assert sum(1 for _ in batches) == expected


def test_the_number_of_batches_stays_while_they_are_read(store: ActivationStore):
    batches = ShuffledBatches(store, 11, 100)
    expected = len(batches)
    for _ in batches:
        assert len(batches) == expected


@pytest.mark.parametrize("before", [0, 17])
@pytest.mark.parametrize("parts", [1, 3, 50])
@pytest.mark.parametrize("rows", [None, RowFilter(max_norm=1500.0)])
def test_shares_have_the_batches_that_are_left(
    store: ActivationStore, before: int, parts: int, rows: RowFilter | None
):
    def content(one: Any) -> tuple[int, ...]:
        return tuple(numbers([one]))

    whole = ShuffledBatches(store, 11, 100, rows=rows)
    for _ in zip(range(before), whole, strict=False):
        pass
    shares = [whole.split(part, parts) for part in range(parts)]
    lengths = [sum(1 for _ in whole.split(part, parts)) for part in range(parts)]
    assert max(lengths) - min(lengths) <= 1
    for _ in range(2):  # what is left of the epoch, and the next one
        rest = [content(one) for one in whole]
        found = [content(one) for share in shares for one in share]
        assert found == rest


def test_a_share_goes_on_from_a_saved_state(store: ActivationStore):
    share = ShuffledBatches(store, 11, 100).split(1, 3)
    expected = [numbers([one]) for one in ShuffledBatches(store, 11, 100).split(1, 3)]
    for number in range(len(expected)):
        if number:
            next(iter(share))
        saved = json.loads(json.dumps(share.state_dict()))
        other = ShuffledBatches(store, 11, 100).split(1, 3)
        other.load_state_dict(saved)
        assert [numbers([one]) for one in other] == expected[number:]
    with pytest.raises(StoreError, match="shares was"):
        ShuffledBatches(store, 11, 100).load_state_dict(share.state_dict())


def test_two_iterations_at_a_time_are_refused(store: ActivationStore):
    batches = ShuffledBatches(store, 11, 50)
    with pytest.raises(StoreError, match="two iterations at a time need two ShuffledBatches"):
        for _ in zip(batches, batches, strict=True):
            pass
    with pytest.raises(StoreError, match="were set to another place while they were iterated over"):
        numbers(batches.set_epoch(3) or one for one in batches)
    assert sorted(numbers(batches)) == list(range(total(store)))


def test_copies_are_independent(store: ActivationStore):
    expected = numbers(ShuffledBatches(store, 11, 50))
    batches = ShuffledBatches(store, 11, 50)
    next(iter(batches))
    for other in (copy.deepcopy(batches), pickle.loads(pickle.dumps(batches))):
        assert numbers(other) == expected[50:]
    assert numbers(batches) == expected[50:]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"batch_size": "32"}, "batch_size must be a whole number of at least 0, not '32'"),
        ({"batch_size": 32.0}, "batch_size must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"reader": -1}, "reader must be a whole number"),
        ({"readers": 0}, "reader 0 of 0"),
        ({"dtype": "bfloat16"}, 'dtype must be "float32" or "stored"'),
        ({"layer": True}, "True names no layer"),
        ({"layer": []}, "layers are named once each"),
        ({"sequences": ["a"]}, "'a' is no record"),
    ],
)
def test_an_argument_of_another_kind_is_one_sentence(store: ActivationStore, wrong: Any, sentence: str):
    arguments: dict[str, Any] = {"layer": 11, "batch_size": 50}
    with pytest.raises(StoreError, match=sentence):
        ShuffledBatches(store, **(arguments | wrong))


@pytest.mark.parametrize("epoch", [-1, 0.0, None, "1"])
def test_an_epoch_that_is_none_is_one_sentence(store: ActivationStore, epoch: Any):
    with pytest.raises(StoreError, match="epoch must be a whole number"):
        ShuffledBatches(store, 11, 50).set_epoch(epoch)


@pytest.mark.parametrize(
    "change", [{"pool": -1}, {"row": 1.5}, {"epoch": None}, {"stop": "x"}, {"content": ""}]
)
def test_a_state_that_is_none_is_one_sentence(store: ActivationStore, change: Any):
    batches = ShuffledBatches(store, 11, 50)
    with pytest.raises(StoreError, match=r"must be a whole number|is of other batches"):
        batches.load_state_dict(batches.state_dict() | change)
    for state in ({}, None, [1]):
        with pytest.raises(StoreError, match=r"is of other batches|is no saved state"):
            batches.load_state_dict(state)  # type: ignore[arg-type]


def test_printing_is_short(store: ActivationStore):
    batches = ShuffledBatches(store, [10, 11, 12], 50, seed=np.int64(3))  # type: ignore[arg-type]
    json.dumps(batches.state_dict())
    where = f"'{store.directory}': layer 10-12, {total(store)} rows of 30 sequences, 50 a batch"
    assert repr(batches) == f"ShuffledBatches({where}, reader 0 of 1, epoch 0)"
    rows = ", ".join(f"{layer}: float32[50, 4]" for layer in (10, 11, 12))
    expected = f"RowBatch(rows={{{rows}}}, token_ids=int32[50], positions=int32[50], is_generated=bool[50], "
    assert repr(next(iter(batches))) == expected + "sequences=int32[50])"


def test_a_batch_by_number_is_one_sentence(store: ActivationStore):
    with pytest.raises(TypeError, match=r"batches come in their own order, none by number"):
        ShuffledBatches(store, 11, 50)[0]


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


def test_bfloat16_stays_bfloat16_where_it_is_asked_for_as_stored(bfloat16_store: ActivationStore):
    torch = pytest.importorskip("torch")
    one, for_jax, for_torch = (
        next(iter(ShuffledBatches(bfloat16_store, 11, 50, framework=name, dtype="stored")))
        for name in ("numpy", "jax", "torch")
    )
    assert one.rows.dtype == bfloat16_store.dtype
    assert for_jax.rows.dtype == jnp.bfloat16
    assert for_torch.rows.dtype == torch.bfloat16
    np.testing.assert_array_equal(for_jax.rows, one.rows)
    np.testing.assert_array_equal(for_torch.rows.float().numpy(), one.rows.astype(np.float32))
    assert for_torch.is_generated.dtype == torch.bool


@pytest.mark.parametrize("framework", ["numpy", "jax", "torch"])
def test_rows_are_float32_by_default(bfloat16_store: ActivationStore, framework: str):
    if framework == "torch":
        pytest.importorskip("torch")
    stored = list(ShuffledBatches(bfloat16_store, 11, 50, dtype="stored"))
    for one, expected in zip(
        ShuffledBatches(bfloat16_store, 11, 50, framework=framework), stored, strict=True
    ):
        assert str(one.rows.dtype).removeprefix("torch.") == "float32"
        np.testing.assert_array_equal(np.asarray(one.rows), expected.rows.astype(np.float32))


def test_torch_is_imported_only_when_it_is_used(tmp_path: Path):
    program = "import sys; from activation_store import *; assert not {'torch', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(shuffle.__file__).parents[1])


@pytest.mark.parametrize(
    "place",
    [
        {"row": 100, "stop": 5},
        {"row": 10**9},
        {"pool": 99},
        {"row": 10**30, "pool": 10**30},
        {"stop": 10**9},
        {"pool": "last", "row": 1},
    ],
)
@pytest.mark.parametrize("rows", [None, RowFilter(max_norm=2000.0)])
def test_a_place_that_an_epoch_does_not_have_is_one_sentence(
    store: ActivationStore, place: dict[str, Any], rows: RowFilter | None
):
    batches = ShuffledBatches(store, 11, 50, rows=rows)
    if place.get("pool") == "last":
        place = place | {"pool": len(batches._pools())}
    before = batches.state_dict()
    with pytest.raises(StoreError, match="the saved state is damaged: epoch 0, of"):
        batches.load_state_dict(before | place)
    assert batches.state_dict() == before
    for good in ({"pool": len(batches._pools())}, {"stop": 0}, {"row": 1, "stop": 1}, {"pool": 1, "row": 2}):
        batches.load_state_dict(before | good)
        assert len(list(batches)) < len(batches)
