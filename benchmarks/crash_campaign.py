"""Kill the runner at random moments, again and again, and show that nothing is lost.

    python benchmarks/crash_campaign.py [--kills 100] [--generation task] [--model_path M --dataset_path D]

One uninterrupted run gives the expected result. Then the same command is started, killed with SIGKILL and
started again, until it ends by itself; that is repeated in new directories until there were enough kills.
Most kills fall where they can do harm: within the time in which batches are committed. After each round the
store must verify without a finding, hold every sequence once with the expected bytes, and the submission
must be the expected one. Exit code 1 when any of that fails.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from activation_store import ActivationStore, verify_store
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS

RUNNER = Path(__file__).parent.parent / "distributed_kv_cached_inference.py"
# The more commits, the more moments in which a kill may fall into one: many small calls, or many sequences.
FLAGS = {
    "task": ["--predictions_per_task=16", "--batch_size=4"],
    "continuous": ["--predictions_per_task=160", "--batch_size=32"],
}
COMMON = ["--max_output_tokens=24", "--temperature=1.0", "--extract_prompt"]


class Campaign:
    """One command in directories of its own, started as often as needed."""

    def __init__(self, scratch: Path, options: argparse.Namespace) -> None:
        self._scratch = scratch
        self._options = options
        # Programs are compiled once for the whole campaign; what is killed is then mostly generating.
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._environment = os.environ | cache

    def start(self, name: str) -> subprocess.Popen[bytes]:
        directory = self._scratch / name
        directory.mkdir(exist_ok=True)
        command = [
            sys.executable,
            str(RUNNER),
            f"--model_path={self._options.model_path}",
            f"--dataset_path={self._options.dataset_path}",
            f"--activations_dir={directory / 'activations'}",
            f"--output_filepath={directory / 'submission.json'}",
            f"--generation={self._options.generation}",
            *COMMON,
            *FLAGS[self._options.generation],
        ]
        with (directory / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)

    def result(self, name: str) -> tuple[dict[str, str], bytes]:
        """(digest of each sequence, the submission's bytes) of a finished run."""
        store = ActivationStore(self._scratch / name / "activations")
        findings = list(verify_store(store))
        if findings:
            raise SystemExit(f"{name}: {len(findings)} findings, the first: {findings[0]}")
        digests = {key: store.sequence_digest(store[key]) for key in store.index}
        return digests, (self._scratch / name / "submission.json").read_bytes()

    def commits(self, name: str) -> int:
        """A number that changes with every step of a commit."""
        folder = self._scratch / name / "activations" / "host-00000"
        try:
            return folder.stat().st_mtime_ns + (folder / "index.jsonl").stat().st_size
        except FileNotFoundError:
            return 0


def interrupt(campaign: Campaign, name: str, rng: random.Random, committing: float) -> bool:
    """Start the run and kill it at a random moment; False when it ended before."""
    process = campaign.start(name)
    before = campaign.commits(name)
    if rng.random() < 0.8:  # wait for it to commit something, then a random while
        while process.poll() is None and campaign.commits(name) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, committing / 5))
    else:  # while it starts, or whenever
        time.sleep(rng.uniform(0, 10))
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill the runner again and again.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model_path", default=str(EXAMPLE_MODEL))
    parser.add_argument("--dataset_path", default=str(EXAMPLE_TASKS))
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where to make the runs")
    parser.add_argument("--generation", choices=list(FLAGS), default="continuous")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    scratch = Path(tempfile.mkdtemp(prefix="crash-campaign-", dir=options.directory))
    campaign = Campaign(scratch, options)

    if campaign.start("whole").wait() not in (0, 1):
        raise SystemExit(f"the uninterrupted run failed: {(scratch / 'whole' / 'log').read_text()[-2000:]}")
    expected = campaign.result("whole")
    files = sorted((scratch / "whole" / "activations" / "host-00000").glob("shard-*"))
    committing = files[-1].stat().st_mtime - files[0].stat().st_mtime
    print(
        f"{len(expected[0])} sequences in {len(files)} shards, committed within {committing:.1f} s",
        flush=True,
    )

    kills = rounds = 0
    while kills < options.kills:
        name = f"round{rounds}"
        in_round = 0
        while interrupt(campaign, name, rng, committing):
            in_round += 1
        kills, rounds = kills + in_round, rounds + 1
        digests, submission = campaign.result(name)
        lost, changed = (
            set(expected[0]) - set(digests),
            sum(digest != expected[0].get(key) for key, digest in digests.items()),
        )
        print(
            f"round {rounds}: killed {in_round} times, {kills} in all; {len(digests)} sequences", flush=True
        )
        if lost or changed or submission != expected[1]:
            raise SystemExit(
                f"{name} in {scratch}: {len(lost)} sequences lost, {changed} changed, "
                f"submission {'equal' if submission == expected[1] else 'not equal'}"
            )
        shutil.rmtree(scratch / name)
    print(f"{kills} kills in {rounds} runs: no sequence lost, none twice, every byte equal, submission equal")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
