"""Programs that outlive the process which compiled them (``--compilation_cache_dir``)."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from arc_runner.errors import UsageError


def use_compilation_cache(directory: str) -> None:
    """Keeps what XLA compiles from now on in ``directory``, and loads from there what it already has.

    Makes the directory, for this user alone, if it does not exist.

    Raises:
        UsageError: it cannot be made, or other users may write there; a program found there is run.
    """
    path = Path(directory)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise UsageError(
            f"--compilation_cache_dir: {path} cannot be made a directory: {error.strerror}"
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UsageError(
            f"--compilation_cache_dir: {path} may be written by other users, whose programs would be run; "
            "name a directory that only you can write"
        )
    compilation_cache.reset_cache()  # JAX decides once per process whether there is a cache
    compilation_cache.set_cache_dir(str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
