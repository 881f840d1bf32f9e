"""The command before the imports that take seconds: --help, --version and bad usage are answered at once."""

from __future__ import annotations

import sys

from arc_runner.command_line import parse_options
from arc_runner.console import open_closed_streams, refuse
from arc_runner.errors import EXIT_USAGE, UsageError
from arc_runner.waiting import Waiting

importing = Waiting("importing JAX")


def begin() -> None:
    """Checks the command line of this process; then says if the imports that follow take long.

    Raises:
        SystemExit: after --help and --version, and after bad usage.
    """
    open_closed_streams()
    try:
        parse_options()
    except UsageError as error:
        refuse(str(error))
        raise SystemExit(EXIT_USAGE) from None
    # Transformers would import it where it is installed, for a second. A run has no use for it.
    sys.modules.setdefault("torch", None)  # pyright: ignore[reportArgumentType]
    importing.begin()
