"""Checks of batches in a DataLoader's workers: `python torch_workers.py STORE fork|spawn few|some|all`."""

import contextlib
import gc
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.utils.data
from torch.utils.data import DataLoader, IterableDataset

from activation_store import ActivationStore, RowFilter, ShuffledBatches, StoreError, shuffle

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than this machine has cores
shuffle.BLOCK_ROWS, shuffle.POOL_ROWS = 16, 256
STORE = ActivationStore(sys.argv[1])
METHOD, PART = sys.argv[2:4]
ROWS = sum(record.n_rows for record in STORE)


def make(layer: Any = 11, **arguments: Any) -> Any:
    return ShuffledBatches(STORE, layer, 200, **arguments)


def load(dataset: Any, workers: int = 2, **arguments: Any) -> Any:
    gc.collect()  # torch complains, in a forked worker, of an earlier loader that is collected there
    settings = {"batch_size": None, "num_workers": workers, "multiprocessing_context": METHOD} | arguments
    return DataLoader(dataset, **settings)


def numbers(rows: Any) -> tuple[int, ...]:
    """The rows' numbers in the store, which their first two columns hold."""
    return tuple((torch.as_tensor(rows)[:, :2] @ torch.tensor([128.0, 1.0])).int().tolist())


def same(batches: Iterable[Any]) -> list[tuple[int, ...]]:
    """What the batches hold, whichever order they come in."""
    return sorted(numbers(one.rows) for one in batches)


def everything(rows: Iterable[Any]) -> bool:
    return sorted(number for one in rows for number in numbers(one)) == list(range(ROWS))


ALONE = make()
EPOCHS = [same(ALONE) for _ in range(3)]  # as one process reads them


class Wrapped(IterableDataset[Any]):
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield torch.as_tensor(batch.rows)


class SplitByHand(Wrapped):
    def __iter__(self) -> Iterator[Any]:
        info: Any = torch.utils.data.get_worker_info()
        return (torch.as_tensor(one.rows) for one in self.batches.split(info.id, info.num_workers))


class MadeInTheWorker(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        info: Any = torch.utils.data.get_worker_info()
        return (torch.as_tensor(one.rows) for one in make(reader=info.id, readers=info.num_workers))


def each_iteration_is_the_next_epoch(workers: int, persistent: bool) -> None:
    loader = load(make(), workers, persistent_workers=persistent)
    count = len(loader)
    for expected in EPOCHS:
        found = list(loader)
        assert len(found) == count
        assert same(found) == expected


def an_epoch_that_is_set_is_read(persistent: bool) -> None:
    dataset = make().torch_dataset()
    loader = load(dataset, persistent_workers=persistent)
    for epoch in (2, 0, 0, 1):
        dataset.set_epoch(epoch)
        assert same(loader) == EPOCHS[epoch]
    assert same(loader) == EPOCHS[2]


def after_a_break_the_next_epoch_is_whole(persistent: bool) -> None:
    loader = load(make(), persistent_workers=persistent)
    for _ in zip(range(3), loader, strict=False):
        pass
    assert same(loader) == EPOCHS[1]
    assert same(loader) == EPOCHS[2]


def a_state_in_the_middle_goes_on(persistent: bool) -> None:
    first = make()
    head = [one for _, one in zip(range(5), first, strict=False)]
    given = make()
    loader = load(given, persistent_workers=persistent)
    assert same(loader) == EPOCHS[0]  # so that persistent workers run already
    given.load_state_dict(first.state_dict())
    found = same(loader)
    assert len(found) == len(EPOCHS[0]) - len(head)
    assert sorted(found + same(head)) == EPOCHS[0]
    assert same(loader) == EPOCHS[1]


def what_this_process_began_the_workers_end() -> None:
    batches = make()
    iterator = iter(batches)
    head = [next(iterator) for _ in range(5)]
    iterator.close()  # type: ignore[attr-defined]
    loader = load(batches)
    assert sorted(same(head) + same(loader)) == EPOCHS[0]
    assert same(loader) == EPOCHS[1]


def two_loaders_at_once_read_an_epoch_each() -> None:
    batches = make()
    loaders = [iter(load(batches)) for _ in range(2)]
    found: list[list[Any]] = [[], []]
    for _ in range(len(batches)):
        for loader, into in zip(loaders, found, strict=True):
            into.append(next(loader))
    assert sorted(map(same, found)) == sorted(EPOCHS[:2])


def few_rows_and_filters_are_shared_out_whole() -> None:
    by_norm = {"rows": RowFilter(max_norm=100.0, prompt=False)}
    loader = load(make(**by_norm), 3)
    found = list(loader)
    assert 0 < len(found) == len(loader) < len(EPOCHS[0])
    assert same(found) == same(make(**by_norm))
    assert same(load(make(sequences=STORE[:1]), 4)) == same(make(sequences=STORE[:1]))
    assert list(load(make(sequences=[]))) == []


def readers_and_ranks_have_workers_of_their_own() -> None:
    assert everything(one.rows for reader in range(2) for one in load(make(reader=reader, readers=2)))
    ranks = [make().split(rank, 2) for rank in range(2)]
    for expected in EPOCHS[:2]:
        assert sorted(one for rank in ranks for one in same(load(rank))) == expected
        for rank in ranks:
            rank.set_epoch(1)


def datasets_of_ones_own_have_every_row_once() -> None:
    for dataset in (Wrapped(make()), SplitByHand(make()), MadeInTheWorker()):
        assert everything(load(dataset)), dataset


def the_loader_may_have_its_own_batch_size() -> None:
    assert everything(one.rows for one in load(make(), batch_size=1))
    with contextlib.suppress(StoreError):  # the sentence is that of a loader without workers
        list(load(make(), batch_size=32))
        raise AssertionError("two batch sizes were taken")


def tensors_come_as_stored_and_of_several_layers() -> None:
    one = next(iter(load(make([11, 12], dtype="stored", framework="torch"))))
    assert {layer: rows.dtype for layer, rows in one.rows.items()} == dict.fromkeys((11, 12), torch.bfloat16)
    assert (one.rows[11][:, 1] == -one.rows[12][:, 1]).all()


def row_sum(number: Any) -> torch.Tensor:
    return torch.as_tensor(STORE.rows(STORE[int(number)], 11).sum())


def a_store_is_read_in_workers() -> None:
    chosen = [0, 7, 29]
    assert list(load(chosen, collate_fn=row_sum)) == [row_sum(number) for number in chosen]


def main() -> None:
    each_iteration_is_the_next_epoch(2, persistent=True)
    an_epoch_that_is_set_is_read(persistent=True)
    if PART == "few":
        return
    each_iteration_is_the_next_epoch(2, persistent=False)
    datasets_of_ones_own_have_every_row_once()
    if PART == "some":
        return
    an_epoch_that_is_set_is_read(persistent=False)
    for persistent in (False, True):
        after_a_break_the_next_epoch_is_whole(persistent)
        a_state_in_the_middle_goes_on(persistent)
    each_iteration_is_the_next_epoch(1, False)
    each_iteration_is_the_next_epoch(3, True)
    two_loaders_at_once_read_an_epoch_each()
    what_this_process_began_the_workers_end()
    few_rows_and_filters_are_shared_out_whole()
    readers_and_ranks_have_workers_of_their_own()
    tensors_come_as_stored_and_of_several_layers()
    the_loader_may_have_its_own_batch_size()
    a_store_is_read_in_workers()


if __name__ == "__main__":
    main()
