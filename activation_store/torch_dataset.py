"""Batches for torch's DataLoader. The only module of the store that imports torch."""

from collections.abc import Iterator

import torch.utils.data

from activation_store.shuffle import RowBatch, ShuffledBatches


class TorchBatches(torch.utils.data.IterableDataset[RowBatch]):
    """Batches that the workers of a DataLoader share out among themselves.

    Each worker starts at the beginning of the epoch that `set_epoch` last named, so call it before every
    epoch, as with torch's DistributedSampler. Without workers the batches also go on from a saved state.
    """

    def __init__(self, batches: ShuffledBatches) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[RowBatch]:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return iter(self.batches)
        return iter(self.batches.split(worker.id, worker.num_workers))
