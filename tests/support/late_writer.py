"""A process that commits made-up sequences as one host, and says where it is in its commits.

    python late_writer.py DIRECTORY HOST [STEP]

With a step of `LocalFiles` ("commit", "begin_commit", "append_index") it prints "here" and waits for a line
on stdin before it takes it for the first time. "temporary" is within a commit, when the shard is a `.tmp`.
"""

import sys
from typing import Any

from activation_fakes import batch, settings

from activation_store import ActivationWriter, local_files, sequence_key

SETTINGS = settings(hidden_size=32)
TASKS = [f"task{number}" for number in range(6)]


def pause_at(owner: Any, name: str) -> None:
    real = getattr(owner, name)
    paused: list[bool] = []

    def pausing(*args: Any, **kwargs: Any) -> Any:
        if not paused:
            paused.append(True)
            print("here", flush=True)
            sys.stdin.readline()
        return real(*args, **kwargs)

    setattr(owner, name, pausing)


def main() -> None:
    directory, host, *step = sys.argv[1:]
    with ActivationWriter(directory, SETTINGS, host_index=int(host), provenance={}) as writer:
        if step == ["temporary"]:
            pause_at(local_files.os, "fsync")
        elif step:
            pause_at(local_files.LocalFiles, step[0])
        print("open", flush=True)
        for task in TASKS:
            todo = [
                s for s in batch(task, of=SETTINGS) if sequence_key(SETTINGS, s.id) not in writer.committed
            ]
            writer.submit(todo)
    print(writer.sequences_written)


if __name__ == "__main__":
    main()
