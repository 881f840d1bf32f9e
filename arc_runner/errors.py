"""Exit codes of the main job, and the errors that it tells in a sentence.

Imports nothing: it is needed before the imports that take seconds.
"""

EXIT_DONE = 0
EXIT_TASKS_FAILED = 1  # some tasks or sequences failed; they are listed, all others are done
EXIT_USAGE = 2
EXIT_RESUMABLE = 75  # stopped early (EX_TEMPFAIL of sysexits.h); the same command continues


class UsageError(ValueError):
    """Says in one sentence why what was asked for cannot be done."""


class ClusterError(RuntimeError):
    """Says in one sentence why the processes of a run did not find each other."""
