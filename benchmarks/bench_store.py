"""How fast the store writes, and how reading it compares with reading a plain file.

    python benchmarks/bench_store.py --directory /some/disk [--shards 200]

Makes a store of 22 MB shards (14 layers of 896 bfloat16 columns, 880 rows each) and a plain file of as many
bytes as one layer has, and prints:

- what one shard costs the writer's thread: packing and statistics, then checksum, write and fsync;
- bytes per second of one layer in stored order, and of training batches in the seeded shuffle, beside
  those of the plain file read into an array: from disk (the page cache emptied of these files first) and
  from the page cache. Every byte is copied into the reader's memory in each case.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    SequenceId,
    ShuffledBatches,
    StoreSettings,
    hook_name,
)
from activation_store.packing import pack_batch

HIDDEN, SEQUENCES, STEPS, LAYER = 896, 4, 220, 12
SETTINGS = StoreSettings(
    model_fingerprint="0" * 64,
    hook_names=tuple(map(hook_name, range(10, 24))),
    hidden_size=HIDDEN,
    dtype="bfloat16",
    capture_prompt=False,
    max_output_tokens=STEPS,
    sampling={"temperature": 0.0},
    seed=0,
    eos_token_ids=(),
    tokenizer_sha256="0" * 64,
    prompt={},
)


def batch(rng: np.random.Generator, number: int) -> list[FinishedSequence]:
    """As the runner hands it over: each sequence a strided view of [layers, steps, batch, hidden]."""
    shape = (len(SETTINGS.hook_names), STEPS, SEQUENCES, HIDDEN)
    buffer = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    return [
        FinishedSequence(
            SequenceId(f"task{number}", 0, row, "identity", np.arange(200, dtype=np.int32)),
            np.arange(STEPS, dtype=np.int32),
            np.full(STEPS, -1, np.float32),
            "length",
            buffer[:, :, row],
        )
        for row in range(SEQUENCES)
    ]


def write(directory: Path, shards: int) -> None:
    rng = np.random.default_rng(0)
    packing, committing = [], []
    with ActivationWriter(directory, SETTINGS, provenance={}) as writer:
        for number in range(shards):
            one = batch(rng, number)
            if number % 10 == 0:
                started = time.perf_counter()
                pack_batch(SETTINGS, one)
                packing.append(time.perf_counter() - started)
            started = time.perf_counter()
            before = len(writer.committed)
            writer.submit(one)
            while len(writer.committed) == before:
                time.sleep(0.0005)
            committing.append(time.perf_counter() - started)
    size = writer.bytes_written / shards / 1e6
    whole, pack = statistics.median(committing), statistics.median(packing)
    print(f"write   {size:.1f} MB a shard: {whole * 1e3:.0f} ms, of which packing {pack * 1e3:.0f} ms")
    print(f"        {size / whole:.0f} MB/s, durable")


def evict(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_plain(path: Path) -> int:
    return np.fromfile(path, np.uint8).nbytes


def read_in_order(directory: Path) -> int:
    into = np.empty((STEPS, HIDDEN), ml_dtypes.bfloat16)
    total = 0
    for rows, _, _ in ActivationStore(directory).iterate(LAYER, dtype="stored"):
        np.copyto(into, rows)
        total += rows.nbytes
    return total


def read_shuffled(directory: Path) -> int:
    batches = ShuffledBatches(ActivationStore(directory), LAYER, 4096, dtype="stored")
    return sum(one.rows.nbytes for one in batches)


def rate(read: Callable[[], int], directory: Path, cold: bool, repeats: int) -> float:
    """Median MB/s."""
    found = []
    for _ in range(repeats):
        if cold:
            evict(directory)
        started = time.perf_counter()
        total = read()
        found.append(total / (time.perf_counter() - started) / 1e6)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write and read throughput of the activation store.")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where to make the files")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="bench-store-", dir=options.directory))
    try:
        write(root / "store", options.shards)
        plain = root / "plain"
        plain.write_bytes(os.urandom(options.shards * SEQUENCES * STEPS * HIDDEN * 2))
        os.sync()
        reads: dict[str, Callable[[], int]] = {
            "plain file": lambda: read_plain(plain),
            "in order": lambda: read_in_order(root / "store"),
            "shuffled": lambda: read_shuffled(root / "store"),
        }
        for cold, name in ((True, "disk"), (False, "page cache")):
            of_plain = 0.0
            for what, read in reads.items():
                found = rate(read, root, cold, options.repeats)
                of_plain = of_plain or found
                print(f"read from {name:10s}  {what:10s}  {found:7.0f} MB/s   {found / of_plain:.2f}")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
