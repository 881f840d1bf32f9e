"""A process to kill: writes made-up sequences through the real writer, skipping those that are committed.

    python activation_crash_writer.py DIRECTORY [LIMIT_BYTES]

With a limit no file can grow beyond it, as on a full disk. Exit code 3 and one sentence when writing failed.
"""

import resource
import signal
import sys

from activation_fakes import batch, settings

from activation_store import ActivationWriter, StoreError, sequence_key

SETTINGS = settings(hidden_size=32)
TASKS = [f"task{number}" for number in range(40)]


def main() -> int:
    if len(sys.argv) > 2:
        limit = int(sys.argv[2])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then write() fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with ActivationWriter(sys.argv[1], SETTINGS, provenance={}) as writer:
            print("open", flush=True)
            for task in TASKS:
                todo = batch(task, of=SETTINGS)
                writer.submit([one for one in todo if sequence_key(SETTINGS, one.id) not in writer.committed])
    except StoreError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
