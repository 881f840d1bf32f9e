"""Batches for torch's DataLoader. The only module of the store that imports torch."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, cast

import ml_dtypes
import numpy as np
import torch
import torch.utils.data
from torch.utils.data._utils import fetch
from torch.utils.data._utils.collate import default_collate_fn_map

from activation_store.format import StoreError

LOADER = fetch.__name__  # the module that iterates over a DataLoader's dataset


class Batches(Protocol):
    """Batches by epoch, as `ShuffledBatches`, which imports this module."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class TorchBatches(torch.utils.data.IterableDataset[Any]):
    """Yields batches of tensors, which the workers of a DataLoader share out among themselves."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __repr__(self) -> str:
        """Says in a line what there is."""
        return f"TorchBatches({self.batches!r})"

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Starts at the beginning of an epoch."""
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return as_tensors(iter(self.batches))


class Worker(NamedTuple):
    """The worker process of a DataLoader that this is."""

    number: int
    workers: int
    loader: str  # the same for all workers of a loader's iteration


def this_worker() -> Worker | None:
    """Returns which worker of a DataLoader this process is; None elsewhere."""
    info = torch.utils.data.get_worker_info()
    return None if info is None else Worker(info.id, info.num_workers, str(info.seed - info.id))


def register(batches: type, batch: type) -> None:
    """Lets a DataLoader take objects of type `batches` as they are, which yield `batch`, a named tuple."""
    cast(Any, torch.utils.data.IterableDataset).register(batches)
    default_collate_fn_map[batch] = _collate


def as_tensor(column: Any) -> torch.Tensor:
    """Returns an array as a tensor, bfloat16 too; numpy's own memory is not copied."""
    if isinstance(column, torch.Tensor):
        return column
    column = np.asarray(column)
    if not column.flags.writeable:
        column = column.copy()
    if column.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(column.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(column)


def as_tensors(batches: Iterator[Any]) -> Iterator[Any]:
    """Returns the batches with their arrays as tensors."""
    return map(_as_tensors, batches)


def _as_tensors(batch: Any) -> Any:
    def converted(value: Any) -> Any:
        if isinstance(value, dict):
            return {layer: as_tensor(rows) for layer, rows in value.items()}
        return as_tensor(value)

    return type(batch)(*map(converted, batch))


def _collate(batches: list[Any], *, collate_fn_map: Any = None) -> Any:
    """Makes one batch of those that a DataLoader with a batch size of its own has gathered."""
    first, *others = map(_as_tensors, batches)
    if not others:
        return first
    if any(len(batch.token_ids) != 1 for batch in (first, *others)):
        raise StoreError(
            f"a batch has {len(first.token_ids)} rows already, and the DataLoader puts {len(batches)} of "
            "them together: give batch_size to ShuffledBatches, and batch_size=None to the DataLoader"
        )

    def joined(*values: Any) -> Any:
        if isinstance(values[0], dict):
            return {layer: torch.cat([value[layer] for value in values]) for layer in values[0]}
        return torch.cat(values)

    return type(first)(*map(joined, first, *others))
