"""The command line that looks after a store.

    python -m activation_store verify DIR [--dataset D] [--replay N] [--model_path M] [--report R] [--repair]
    python -m activation_store stats DIR
    python -m activation_store plot DIR [--output FOLDER] [--layer L]
    python -m activation_store view DIR --output page.html [--dataset D] [--direction F] [--sae S --feature I]
    python -m activation_store export DIR --layer 12 --context_size 128 --output OUT
    python -m activation_store import-legacy PICKLES --output DIR --hidden_size 896

Exit codes: 0 all well, 1 findings or an error, 2 bad usage, 130 interrupted.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from activation_store.command_line import parse, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    if sys.stdout is None:  # it was closed, as in `... >&-`
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot print is no error
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    try:
        from activation_store.commands import COMMANDS  # after --help and bad usage, as it takes long

        code = COMMANDS[options.command](options)
        sys.stdout.flush()
        return code
    except ValueError as error:  # StoreError, and those of the data set and the checkpoint
        from activation_store.format import StoreUsageError

        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, StoreUsageError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output is gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
