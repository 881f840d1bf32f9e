"""Many hosts sharing many tasks by lease, with a sleep in the place of the generation.

    python benchmarks/simulate_claims.py [--directory D --hosts 32 --tasks 100000 --kill 4 --scale 50]

Every host is a process that claims as the main job does, on real files; what it has made it appends to a
file of its own, and reads what the others have appended, as the store's index does. A task's eight answers
have the lengths of real ARC answers. All times run ``scale`` times faster than they would, leases and
heartbeats too, and are printed as they would be: what file operations cost is overstated by as much.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import arc_runner.cluster.claims
import arc_runner.cluster.work
from arc_runner.cluster.claims import Claims
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.shared_files import SharedFiles
from arc_runner.cluster.work import Shared, Unit
from arc_runner.signals import StopRequest

# Tokens of an answer grid over the public ARC tasks: quantiles, and the lengths there.
QUANTILES = ((0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0), (2, 12, 42, 110, 272, 728, 930, 930))
ANSWERS, TOKENS_PER_SECOND = 8, 1000.0


class Made:
    """What all hosts have made, by key: one file of lines a host, of which the new ones are read."""

    def __init__(self, root: Path, host: int, hosts: int) -> None:
        self._files = [root / f"made-{index}" for index in range(hosts)]
        self._read = [0] * hosts
        self._own = self._files[host].open("ab", buffering=0)
        self.committed: set[str] = set()
        self.refreshing = 0.0

    def commit(self, key: str) -> None:
        self._own.write(f"{key}\n".encode())
        self.committed.add(key)

    def submit(self, _batch: object) -> None:
        """There is nothing that could have gone wrong."""

    def refresh(self) -> None:
        started = time.monotonic()
        for index, path in enumerate(self._files):
            if path.exists() and path.stat().st_size > self._read[index]:
                with path.open("rb") as file:
                    file.seek(self._read[index])
                    lines = file.read()
                self._read[index] += len(lines)
                self.committed.update(lines.decode().split())
        self.refreshing += time.monotonic() - started


class CountedClaims(Claims):
    """Counts how often another host was met, and how long claims take."""

    claimed, met, claiming = 0, 0, 0.0

    def acquire(self, name: str) -> bool:
        started = time.monotonic()
        got = super().acquire(name)
        self.claiming += time.monotonic() - started
        self.claimed += got
        self.met += not got
        return got


def plan(tasks: int, seed: int) -> tuple[list[Unit], np.ndarray]:
    """The units, and how long each takes in seconds."""
    rng = np.random.default_rng(seed)
    lengths = np.interp(rng.random((tasks, ANSWERS)), *QUANTILES)
    units = [Unit((hashlib.sha256(str(task).encode()).hexdigest()[:32],), task) for task in range(tasks)]
    return units, lengths.sum(axis=1) / TOKENS_PER_SECOND


def host(root: Path, index: int, options: argparse.Namespace) -> None:
    """One host's run; leaves its figures."""
    arc_runner.cluster.claims.LEASE_SECONDS /= options.scale
    arc_runner.cluster.claims.HEARTBEAT_SECONDS /= options.scale
    arc_runner.cluster.work.POLL_SECONDS /= options.scale
    units, seconds = plan(options.tasks, options.seed)
    made: Any = Made(root, index, options.hosts)
    process = ProcessInfo(index, options.hosts, claims=True)
    with CountedClaims(SharedFiles(str(root)), index) as claims:
        work = Shared(made, claims, process, StopRequest())
        count, waiting = 0, 0.0
        while True:
            for unit in work.take(units, 1):
                time.sleep(seconds[unit.work] / options.scale)
                made.commit(unit.keys[0])
                count += 1
            ended = time.time()
            started = time.monotonic()
            more = work.wait(units)
            waiting += time.monotonic() - started
            if not more:
                break
        figures = {
            "made": count,
            "ended": ended,
            "claimed": claims.claimed,
            "met": claims.met,
            "claiming": claims.claiming,
            "refreshing": made.refreshing,
            "waiting": waiting,
        }
    (root / f"figures-{index}").write_text(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    parser.add_argument("--hosts", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--kill", type=int, default=0, help="hosts that are killed half-way")
    parser.add_argument("--scale", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="claims-", dir=options.directory))
    try:
        simulate(root, options)
    finally:
        shutil.rmtree(root)


def simulate(root: Path, options: argparse.Namespace) -> None:
    units, seconds = plan(options.tasks, options.seed)
    ideal = seconds.sum() / options.hosts
    context = multiprocessing.get_context("fork")
    started = time.time()
    hosts = [context.Process(target=host, args=(root, index, options)) for index in range(options.hosts)]
    for process in hosts:
        process.start()
    killed = started
    if options.kill:
        time.sleep(ideal / options.scale / 2)
        killed = time.time()
        for process in hosts[: options.kill]:
            assert process.pid is not None
            process.kill()
    for process in hosts:
        process.join()
    codes = [process.exitcode for process in hosts]
    assert codes == [-signal.SIGKILL] * options.kill + [0] * (options.hosts - options.kill), codes
    figures = [json.loads(path.read_text()) for path in root.glob("figures-*")]
    lines = [line for path in root.glob("made-*") for line in path.read_text().split()]
    assert set(lines) == {unit.keys[0] for unit in units}, "tasks are missing"

    def scaled(span: float) -> str:
        return f"{span * options.scale:.1f} s"

    ends = sorted(one["ended"] for one in figures)
    total = {name: sum(one[name] for one in figures) for name in figures[0]}
    print(f"{options.hosts} hosts, {options.tasks} tasks of {seconds.mean():.2f} s, x{options.scale:g}")
    print(f"  made twice                {len(lines) - len(set(lines))}")
    tried = total["claimed"] + total["met"]
    print(f"  claims won / met another  {total['claimed']} / {total['met']}")
    print(f"  a claim                   {total['claiming'] / tried * 1e3:.2f} ms (real)")
    print(f"  learning what is made     {total['refreshing'] / total['claimed'] * 1e3:.2f} ms a claim (real)")
    print(f"  whole run                 {scaled(ends[-1] - started)}, {ideal:.1f} s of work for each host")
    print(f"  tail, first to last end   {scaled(ends[-1] - ends[0])}; longest task {seconds.max():.1f} s")
    print(f"  waiting at the end        {scaled(total['waiting'] / len(figures))} a host")
    if options.kill:
        print(f"  after the kill            {scaled(ends[-1] - killed)} until all was made by the others")


if __name__ == "__main__":
    main()
