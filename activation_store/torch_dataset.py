"""Batches for torch's DataLoader. The only module of the store that imports torch."""

from collections.abc import Iterator
from typing import Any, Protocol, Self

import torch.utils.data


class SplitBatches(Protocol):
    """Batches by epoch that several readers can share, as `ShuffledBatches`, which imports this module."""

    def set_epoch(self, epoch: int) -> None: ...

    def split(self, part: int, parts: int) -> Self: ...

    def __iter__(self) -> Iterator[Any]: ...


class TorchBatches(torch.utils.data.IterableDataset[Any]):
    """Yields batches that the workers of a DataLoader share out among themselves.

    Each worker starts at the beginning of the epoch that `set_epoch` last named, so call it before every
    epoch, as with torch's DistributedSampler. Without workers the batches also go on from a saved state.
    """

    def __init__(self, batches: SplitBatches) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return iter(self.batches)
        return iter(self.batches.split(worker.id, worker.num_workers))
