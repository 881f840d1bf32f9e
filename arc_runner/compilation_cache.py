"""Programs that outlive the process which compiled them (``--compilation_cache_dir``).

Each kind of processor has a folder of its own: XLA on CPU compiles for the instructions of the machine that
it runs on, and machines may share a home.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from arc_runner.console import say
from arc_runner.errors import UsageError

_FOLDER = "qwen2-jax-activations"  # in the user's cache folder
_MOST_BYTES = 2**30  # of the programs kept there for one kind of processor
# What tells one kind of processor from another in /proc/cpuinfo, on x86 and on ARM.
_PROCESSOR = ("model name", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")


def use_compilation_cache(directory: str) -> None:
    """Keeps what XLA compiles from now on in ``directory``, and loads from there what it already has.

    Makes the directory, for this user alone, if it does not exist.

    Raises:
        UsageError: it cannot be made, or other users may write there; a program found there is run.
    """
    try:
        _use(Path(directory))
    except _UnusableError as error:
        raise UsageError(f"--compilation_cache_dir: {error}") from error


def use_own_cache() -> None:
    """Does it in the user's cache folder, with at most 1 GB; says so in a line where that cannot be used.

    A directory that JAX was told before (``JAX_COMPILATION_CACHE_DIR``) stays instead.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        _remove_oldest(_use(_user_cache() / _FOLDER))
    except _UnusableError as error:
        say(f"compiled programs are not kept for the next run: {error}")


class _UnusableError(Exception):
    """A directory cannot keep programs; the message says why."""


def _use(directory: Path) -> Path:
    """Keeps programs in a folder of ``directory`` from now on, and returns that folder."""
    folder = _own_directory(_own_directory(directory) / _processor())
    compilation_cache.reset_cache()  # JAX decides once per process whether there is a cache
    compilation_cache.set_cache_dir(str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _own_directory(path: Path) -> Path:
    """Makes a directory for this user alone if it does not exist, and returns it.

    Raises:
        _UnusableError: it cannot be made or written, or other users may write there.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise _UnusableError(f"{path} cannot be made a directory: {error.strerror}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise _UnusableError(
            f"{path} may be written by other users, whose programs would be run; name a directory that only "
            "you can write"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise _UnusableError(f"{path} cannot be written")
    return path


def _user_cache() -> Path:
    """Returns the user's cache folder, as the XDG base directory specification has it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # noqa: PTH117 - else it is to be ignored
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise _UnusableError("this user has no home directory") from error


def _processor() -> str:
    """Returns a name for the kind of processor of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    kind = [platform.processor(), *(found.get(name, "") for name in _PROCESSOR)]
    return f"{platform.machine()}-{hashlib.sha256(repr(kind).encode()).hexdigest()[:16]}"


def _remove_oldest(directory: Path) -> None:
    """Removes programs until the rest is small enough, beginning with those not used for longest."""
    programs = []
    for file in directory.glob("*-cache"):
        with contextlib.suppress(OSError):  # another run removes too
            status = file.stat()
            programs.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    excess = sum(size for _, size, _ in programs) - _MOST_BYTES
    for _, size, file in sorted(programs, key=lambda program: program[0]):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        excess -= size
