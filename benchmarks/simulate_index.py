"""Opening and resuming a store of a million sequences, without generating them.

    python benchmarks/simulate_index.py --directory /some/disk [--sequences 1000000 --hosts 32 --per_shard 20]

Writes the index lines as the writer would, and shards that are empty but for their size (sparse files, with
the time stamps that the lines name). Each figure is of a fresh process; memory is its peak.
"""

import argparse
import hashlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from activation_store import ActivationStore, ActivationWriter, StoreSettings, hook_name
from activation_store.format import (
    MANIFEST,
    SequenceRecord,
    encode_line,
    host_name,
    shard_name,
)
from activation_store.manifest import encode_manifest

SHARD_BYTES = 22_000_000
SETTINGS = StoreSettings(
    model_fingerprint="0" * 64,
    hook_names=tuple(map(hook_name, range(10, 24))),
    hidden_size=896,
    dtype="bfloat16",
    capture_prompt=False,
    max_output_tokens=1100,
    sampling={"temperature": 1.0},
    seed=0,
    eos_token_ids=(151645,),
    tokenizer_sha256="0" * 64,
    prompt={},
)


def make(root: Path, sequences: int, hosts: int, per_shard: int) -> None:
    (root / MANIFEST).write_bytes(encode_manifest(SETTINGS, {}))
    for host in range(hosts):
        folder = root / host_name(host)
        folder.mkdir()
        first, end = sequences * host // hosts, sequences * (host + 1) // hosts
        with (folder / "index.jsonl").open("wb") as index:
            for shard, start in enumerate(range(first, end, per_shard)):
                index.writelines(shard_lines(folder / shard_name(shard), host, range(start, end)[:per_shard]))


def shard_lines(path: Path, host: int, numbers: range) -> Iterator[bytes]:
    with path.open("wb") as file:
        file.truncate(SHARD_BYTES)
    mtime_ns = path.stat().st_mtime_ns
    rows = SHARD_BYTES // (14 * 896 * 2 * len(numbers))
    for place, number in enumerate(numbers):
        yield encode_line(
            SequenceRecord(
                key=hashlib.md5(str(number).encode()).hexdigest(),
                shard=path.name,
                task_id=f"{number:08x}",
                test_index=0,
                sample_index=0,
                augmentation="identity",
                seed=0,
                row_start=place * rows,
                n_rows=rows,
                prompt_start=place * 2000,
                prompt_length=2000,
                generated_length=rows,
                finish_reason="stop",
                shard_bytes=SHARD_BYTES,
                shard_sha256="0" * 64,
                shard_sequences=len(numbers),
                shard_mtime_ns=mtime_ns,
                failure=None,
                host=host,
            )
        )


def measure(what: str, root: Path) -> None:
    started = time.perf_counter()
    if what == "open":
        count = len(ActivationStore(root))
    elif what == "list":
        count = sum(1 for _ in ActivationStore(root).sequences())
    elif what == "refresh":
        store = ActivationStore(root)
        started, count = time.perf_counter(), len(store)
        store.index.refresh()
    else:
        with ActivationWriter(root, SETTINGS, host_index=0, provenance={}) as writer:
            if writer.dropped:
                raise RuntimeError(f"the simulation is wrong: {writer.dropped[0]}")
            count = len(writer.committed)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:8s} {count} sequences   {seconds:6.2f} s   {peak:6.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Open and resume a store of very many sequences.")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where to make the files")
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--hosts", type=int, default=32)
    parser.add_argument("--per_shard", type=int, default=20)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, Path(options.directory))
        return
    root = Path(tempfile.mkdtemp(prefix="simulate-index-", dir=options.directory))
    try:
        make(root, options.sequences, options.hosts, options.per_shard)
        size = sum(path.stat().st_size for path in root.rglob("index.jsonl"))
        print(f"{size / 1e6:.0f} MB of index in {options.hosts} files", flush=True)
        for what in ("open", "resume", "refresh", "list"):
            command = [sys.executable, __file__, "--measure", what, "--directory", str(root)]
            subprocess.run(command, check=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
