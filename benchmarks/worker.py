"""A process of its own for each peer that compares, under the interpreter that the peer lives in.

Thread pools of torch, JAX and others then never meet, and the peak memory of one is not the other's. A worker
holds its weights once and answers the parent's calls one at a time; only one worker works at any time.

    python -m benchmarks.worker FD FRAMEWORK CHECKPOINT DTYPE DEVICE      # how Worker starts it
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.foreign_peers import FOREIGN
from benchmarks.make_peers import interpreter, variables
from benchmarks.peers import JaxPeer, TorchPeer

ROOT = Path(__file__).parent.parent
PATIENCE = 1200.0  # seconds for one answer: loading, compiling or a whole round


class Worker:
    """A peer in a process of its own; ``call`` runs one of its methods there and returns the result.

    Raises:
        RuntimeError: with the worker's own traceback, for whatever failed there; where it died, or does not
            answer within ``PATIENCE``.
    """

    def __init__(self, framework: str, checkpoint: str, dtype: str, device: str):
        python, more = sys.executable, {}
        if framework in FOREIGN:
            found = interpreter(framework)
            if found is None:
                raise RuntimeError(f"{framework} has no environment.")
            python, more = str(found), variables(framework)
        # An accelerator is shared with the other workers; nothing is looked up in a hub.
        more = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1"} | more
        self._connection, theirs = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", str(theirs.fileno()), framework, checkpoint, dtype, device],
            cwd=ROOT,
            env=os.environ | more,
            pass_fds=[theirs.fileno()],
            stdout=sys.stderr.fileno(),  # ours is for the table
        )
        theirs.close()
        self.weight_bytes: int
        self.versions: dict[str, str]
        self.weight_bytes, self.versions = self._answer()

    def call(self, method: str, *args: Any) -> Any:
        try:
            self._connection.send((method, args))
        except OSError:
            raise RuntimeError(f"The worker died (exit code {self._process.wait()}).") from None
        return self._answer()

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Any:
        if not self._connection.poll(PATIENCE):
            self._process.kill()
            raise RuntimeError(f"The worker gave no answer in {PATIENCE:.0f} s and was ended.")
        try:
            fine, answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"The worker died (exit code {self._process.wait()}).") from None
        if not fine:
            raise RuntimeError(answer)
        return answer


def serve(connection: Connection, framework: str, checkpoint: str, dtype: str, device: str) -> None:
    """Makes the peer, says what it is, and answers calls until the parent closes the connection."""
    kinds: dict[str, Any] = {"jax": JaxPeer, "torch": TorchPeer} | FOREIGN
    try:
        peer = kinds[framework](checkpoint, dtype, device)
        connection.send((True, (peer.weight_bytes, peer.versions())))
    except Exception:
        connection.send((False, traceback.format_exc()))
        return
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(peer, method)(*args)))
        except Exception:
            connection.send((False, traceback.format_exc()))


def jax_platform() -> str:
    """JAX's default backend here, asked in a process that then ends: this one must not hold the device."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_jax_platform)


def _jax_platform() -> str:
    import jax

    return jax.default_backend()


def torch_reaches(device: str) -> bool:
    """Whether torch is installed and can use ``device``, asked in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_torch_reaches, (device,))


def _torch_reaches(device: str) -> bool:
    try:
        import torch
    except ImportError:
        return False
    return device == "cpu" or torch.cuda.is_available()


if __name__ == "__main__":
    descriptor, *told = sys.argv[1:]
    serve(Connection(int(descriptor)), *told)
