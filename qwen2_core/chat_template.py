"""Runs a checkpoint's chat template bounded in time, memory and length, whatever it does.

A chat template is a program that comes with a checkpoint. A loop in it can be stopped from outside only, so
it runs in a process of its own, for every prompt: see ``template_worker``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2_core.errors import CheckpointError

SECONDS = 10  # for one prompt, which takes milliseconds
CHARACTERS = 4_000_000  # more than any context holds
_START_SECONDS = 120  # for Python itself, on a machine that is busy
_WORKER = Path(__file__).with_name("template_worker.py")
_CLOCKS = ("2001-02-03T04:05:06", "2019-12-28T17:48:59")
Messages = Sequence[Mapping[str, str]]


class BoundedTokenizer:
    """A tokenizer of Transformers whose chat template runs in a process of its own, within limits.

    Everything but ``apply_chat_template`` is the tokenizer's. The process is started when it is needed and
    ends with ``close``.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._process: subprocess.Popen[bytes] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tokenizer"], name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Tokenizes, as the tokenizer does."""
        return self._tokenizer(*arguments, **named)

    def apply_chat_template(
        self, chats: Sequence[Messages], *, add_generation_prompt: bool, tokenize: bool, **choices: Any
    ) -> list[str]:
        """Returns the texts of chats, as Transformers' method with these arguments does.

        ``choices`` are handed to the template, such as Qwen3's ``enable_thinking``.

        Raises:
            CheckpointError: the template fails, or takes or writes too much.
            ValueError: it is to return something else than texts.
        """
        if tokenize:
            raise ValueError("the chat template gives texts; tokenize them by calling the tokenizer")
        return [self.render(messages, add_generation_prompt, **choices) for messages in chats]

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        clock: str | None = None,
        **choices: Any,
    ) -> str:
        """Returns the text of a chat; ``clock`` is the time that the template is told, else now.

        ``choices`` are as for ``apply_chat_template``.

        Raises:
            CheckpointError: as ``apply_chat_template``.
        """
        variables = {
            **self._tokenizer.special_tokens_map,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **choices,
        }
        try:
            if self._process is None:
                self._process = self._start()
            answer = _ask(self._process, {"variables": variables, "clock": clock}, SECONDS)
        except (TimeoutError, BrokenPipeError) as error:
            self.close()
            raise CheckpointError(
                f"the chat template takes longer than {SECONDS} seconds for a prompt, or too much memory"
            ) from error
        except OSError as error:
            self.close()
            raise CheckpointError(f"no process can be started for the chat template: {error}") from error
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            raise CheckpointError(" ".join(f"the chat template fails: {answer['error']}".split()))
        return answer["text"]

    def tells_the_time(self, messages: Messages) -> bool:
        """Tells whether the text of a chat depends on when it is made."""
        early, late = (self.render(messages, clock=clock) for clock in _CLOCKS)
        return early != late

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER), *_folders("jinja2", "markupsafe")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for us
        )
        weakref.finalize(self, _end, process)
        _read_line(process, _START_SECONDS)
        template = self._tokenizer.get_chat_template()
        _write_line(process, {"template": template, "limit": CHARACTERS, "seconds": SECONDS + 5})
        return process


def _folders(*modules: str) -> list[str]:
    """Returns the folders that modules are imported from."""
    found = [importlib.util.find_spec(name) for name in modules]
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin))


def _ask(process: subprocess.Popen[bytes], question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    _write_line(process, question)
    return json.loads(_read_line(process, seconds))


def _write_line(process: subprocess.Popen[bytes], value: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{json.dumps(value)}\n".encode())
    process.stdin.flush()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Reads a line; raises TimeoutError or, when the process has ended, BrokenPipeError."""
    assert process.stdout is not None
    line, deadline = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        piece = os.read(process.stdout.fileno(), 1 << 20)
        if not piece:
            raise BrokenPipeError
        line += piece
    return line


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # of what it was not told yet
                pipe.close()
