"""Batches in torch's DataLoader: every row once an epoch, in a new order each epoch, however it is used."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from activation_fakes import sequence, settings

import activation_store
from activation_store import ActivationStore, ActivationWriter, ShuffledBatches, StoreError, shuffle

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

WORKERS = Path(__file__).parents[1] / "support" / "torch_workers.py"
OF = settings(hidden_size=4, max_output_tokens=200)
ROWS = 30 * (4 + 120)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """The rows of layer 11 hold their number in the store, those of layer 12 its negative, in two columns."""
    directory = tmp_path_factory.mktemp("torch")
    with ActivationWriter(directory, OF, provenance={}) as writer:
        for task in range(30):
            one = sequence(f"t{task}", of=OF, generated=120)
            assert one.rows is not None
            first = task * one.rows.shape[1]
            number = np.arange(first, first + one.rows.shape[1])
            for place, sign in ((1, 1), (2, -1)):
                one.rows[place, :, 0], one.rows[place, :, 1] = sign * (number // 128), sign * (number % 128)
            writer.submit([one])
    return ActivationStore(directory)


@pytest.fixture(autouse=True)
def _small_pools(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shuffle, "BLOCK_ROWS", 16)
    monkeypatch.setattr(shuffle, "POOL_ROWS", 256)


def loaded(loader: Any) -> Any:
    """A DataLoader of anything, for the type checker."""
    return DataLoader(loader, batch_size=None)


def numbers(batches: Any, layer: int | None = None) -> list[int]:
    found: list[int] = []
    for one in batches:
        rows = one.rows if layer is None else one.rows[layer]
        assert rows.dtype == torch.float32
        found += (abs(rows[:, 0]) * 128 + abs(rows[:, 1])).int().tolist()
    return found


def test_a_loader_takes_the_batches_as_they_are(store: ActivationStore):
    expected = numbers(ShuffledBatches(store, 11, 50, framework="torch"))
    assert sorted(expected) == list(range(ROWS))
    batches = [ShuffledBatches(store, 11, 50, framework=framework) for framework in ("numpy", "torch")]
    datasets: list[Any] = [*batches, ShuffledBatches(store, 11, 50).torch_dataset()]
    for one in datasets:
        one.set_epoch(0)
        loader: Any = DataLoader(one)  # whose batch size is 1
        assert len(loader) == len(one) == -(-ROWS // 50)
        assert numbers(loader) == expected
        again = numbers(loader)
        assert sorted(again) == list(range(ROWS))
        assert again != expected
        one.set_epoch(0)
        assert numbers(loaded(one)) == expected


def test_a_batch_has_tensors_of_their_own_types(store: ActivationStore):
    stored = next(iter(loaded(ShuffledBatches(store, 11, 50, dtype="stored").torch_dataset())))
    assert stored.rows.dtype == torch.bfloat16
    one = next(iter(loaded(ShuffledBatches(store, [11, 12], 50))))
    assert {layer: rows.dtype for layer, rows in one.rows.items()} == {11: torch.float32, 12: torch.float32}
    assert (one.rows[11][:, 1] == -one.rows[12][:, 1]).all()
    dtypes = [column.dtype for column in one[1:]]
    assert dtypes == [torch.int32, torch.int32, torch.bool, torch.int32]
    assert "rows={11: float32[50, 4], 12: float32[50, 4]}" in repr(one)


def test_rows_gathered_by_the_loader_are_a_batch(store: ActivationStore):
    """Batches of one row, of which the loader makes larger ones."""
    chosen: Any = ShuffledBatches(store, [11, 12], 1, sequences=store[:3])
    loader = DataLoader(chosen, batch_size=32)
    sizes = [len(one.token_ids) for one in loader]
    assert sizes == [32] * 11 + [20]
    assert len(loader) == 12
    assert sorted(numbers(loader, 12)) == list(range(3 * 124))


def test_two_batch_sizes_are_one_sentence(store: ActivationStore):
    batches: Any = ShuffledBatches(store, 11, 50)
    for drop_last in (False, True):
        with pytest.raises(
            StoreError, match=r"a batch has 50 rows already, .* puts 32 of them together: give"
        ):
            next(iter(DataLoader(batches, batch_size=32, drop_last=drop_last)))


def test_what_orders_rows_by_number_is_refused(store: ActivationStore):
    batches: Any = ShuffledBatches(store, 11, 50)
    with pytest.raises(ValueError, match="expected unspecified shuffle option, but got shuffle=True"):
        DataLoader(batches, batch_size=None, shuffle=True)
    with pytest.raises(ValueError, match="expected unspecified sampler option"):
        DataLoader(batches, batch_size=None, sampler=torch.utils.data.SequentialSampler([1]))


def test_a_break_goes_on_and_a_state_survives_without_workers(store: ActivationStore):
    expected = numbers(ShuffledBatches(store, 11, 50, framework="torch"))
    batches = ShuffledBatches(store, 11, 50, framework="torch")
    loader = loaded(batches.torch_dataset())
    head: list[int] = []
    for one in loader:
        head += numbers([one])
        if len(head) >= 500:
            break
    rest = ShuffledBatches(store, 11, 50, framework="torch")
    rest.load_state_dict(batches.state_dict())
    assert head + numbers(rest) == expected
    assert head + numbers(loader) == expected


def test_two_loaders_at_a_time_are_refused_without_workers(store: ActivationStore):
    batches = ShuffledBatches(store, 11, 50)
    with pytest.raises(StoreError, match="two iterations at a time need two ShuffledBatches"):
        for _ in zip(loaded(batches), loaded(batches), strict=True):
            pass


def test_a_missing_torch_is_one_sentence(store: ActivationStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "activation_store.torch_dataset")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch.utils.data")
    with pytest.raises(StoreError, match="batches for torch need torch: pip install torch"):
        ShuffledBatches(store, 11, 50, framework="torch")


# --- Workers ------------------------------------------------------------------------------------------------

# Forking is for processes without jax, so the checks run in one of its own.


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("fork", "some"),
        pytest.param("fork", "all", marks=pytest.mark.slow),
        pytest.param("spawn", "few", marks=pytest.mark.slow),
    ],
)
def test_workers_read_every_row_once_an_epoch(store: ActivationStore, tmp_path: Path, method: str, part: str):
    root = Path(activation_store.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, WORKERS, store.directory, method, part],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert [path.name for path in tmp_path.glob("batches-*")] == []  # nothing is left behind


@pytest.mark.parametrize("layer", [11, [11, 12]])
def test_stored_rows_are_bfloat16_tensors_in_a_loader_of_the_batches_themselves(
    store: ActivationStore, layer: Any
):
    batches: Any = ShuffledBatches(store, layer, 500, dtype="stored")
    expected = list(batches)
    batches.set_epoch(0)
    found = list(DataLoader(batches, batch_size=None))
    assert len(found) == len(expected)
    for one in found:
        for rows in one.rows.values() if isinstance(one.rows, dict) else [one.rows]:
            assert rows.dtype == torch.bfloat16
    rows = [row.float() for one in found for row in first_layer(one)]
    numbers = [int(abs(row[0]) * 128 + abs(row[1])) for row in rows]
    assert sorted(numbers) == list(range(ROWS))
    batches.set_epoch(0)
    assert isinstance(first_layer(next(iter(batches))), np.ndarray)  # outside of a loader


def first_layer(batch: Any) -> Any:
    return batch.rows[11] if isinstance(batch.rows, dict) else batch.rows
