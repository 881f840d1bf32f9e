"""Real processes, really stopped in their commits for longer than the others wait, and continued."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from activation_fakes import batch, read_index
from late_writer import SETTINGS, TASKS

from activation_store import ActivationStore, sequence_key, verify_store
from activation_store.store_files import COMMIT_SECONDS

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1] / "support"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parents[1]), str(TESTS)])}
KEYS = {sequence_key(SETTINGS, one.id) for task in TASKS for one in batch(task, of=SETTINGS)}


def start(directory: Path, host: int, *step: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TESTS / "late_writer.py"), str(directory), str(host), *step],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> int:
    """How many sequences a process has stored."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.close()
    with process:  # not communicate, which misses what `wait_for` has read ahead
        out, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0, errors
    return int(out.split()[-1])


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    while process.stdout.readline().strip() != word:
        assert process.poll() is None


def assert_once(directory: Path, hosts: int, made: int) -> None:
    indexes = [host for host in range(hosts) if (directory / f"host-{host:05d}" / "index.jsonl").exists()]
    counts = Counter(line["key"] for host in indexes for line in read_index(directory, host))
    assert set(counts) == KEYS
    assert set(counts.values()) == {1}
    assert made == len(KEYS)  # what the processes say they have stored
    store = ActivationStore(directory)
    assert len(store) == len(KEYS)
    assert list(verify_store(store)) == []
    assert not list(directory.rglob("*.tmp"))


@pytest.mark.parametrize("step", ["temporary", "begin_commit", "append_index"])
@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_was_stopped_while_another_took_its_work_over_stores_nothing_twice(
    tmp_path: Path, step: str, late: int
):
    stopped = start(tmp_path, late, step)
    wait_for(stopped, "here")
    stopped.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    other = finish(start(tmp_path, 1 - late))
    assert other == len(KEYS)
    waited = time.monotonic() - began
    assert (
        waited > COMMIT_SECONDS or step != "append_index"
    )  # only there the others are locked out, for a while
    stopped.send_signal(signal.SIGCONT)
    assert stopped.stdin is not None
    stopped.stdin.write("\n")
    stopped.stdin.flush()
    assert_once(tmp_path, 2, finish(stopped) + other)


def test_three_processes_on_the_same_sequences_that_are_stopped_at_random_store_each_once(tmp_path: Path):
    rng = random.Random(0)
    processes = [start(tmp_path, host) for host in range(3)]
    for process in processes:
        wait_for(process, "open")
    for _ in range(12):
        process = rng.choice(processes)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGCONT)
    assert_once(tmp_path, 3, sum(finish(process) for process in processes))
