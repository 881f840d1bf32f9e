"""The checkpoint's tokenizer: loaded and tried out, and the hash that a store keeps of it."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np

from arc_puzzles import encode_prompt
from arc_puzzles.thinking import takes_enable_thinking
from arc_runner.errors import UsageError
from arc_runner.options import RunOptions
from qwen2_core.chat_template import BoundedTokenizer
from qwen2_core.checkpoint_files import optional_file, resolve_file
from qwen2_jax import CheckpointError

_logger = logging.getLogger(__name__)

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_PROBE = "Input 0123456789"
_MOST_BYTES = 1 << 30  # of a file; the largest vocabularies have a hundredth


def load_tokenizer(
    model_path: str, vocab_size: int, *, chats: bool = True, revision: str | None = None
) -> BoundedTokenizer:
    """Loads the tokenizer of the checkpoint (transformers' ``AutoTokenizer``) and tries it out.

    Trying is needed: where the vocabulary is missing transformers makes an empty one. Warns of a chat
    template that puts the time into prompts. Without ``chats`` it needs no chat template.

    Raises:
        CheckpointError: it cannot be loaded, has no chat template, does not give back the text that it
            encoded, or has token ids of ``vocab_size`` and above.
    """
    # It would warn that torch is missing, which is not needed, and of prompts beyond the tokenizer's limit,
    # where the model's counts.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer  # takes seconds; bad usage is told at once

    directory = resolve_file(model_path, "tokenizer_config.json", revision=revision).parent
    _check_kinds(directory)
    messages = [{"role": role, "content": _PROBE} for role in ("system", "user")]
    tokenizer, expected = None, 2 if chats else 1
    try:
        tokenizer = BoundedTokenizer(AutoTokenizer.from_pretrained(directory, trust_remote_code=False))
        token_ids = encode_prompt(tokenizer, messages) if chats else np.array(tokenizer(_PROBE)["input_ids"])
        if chats and tokenizer.tells_the_time(messages):
            _logger.warning(
                "the chat template of %s puts the time into the prompts: a later run makes other prompts, "
                "and finds nothing of this one done",
                model_path,
            )
        if tokenizer.decode(token_ids.tolist()).count(_PROBE) != expected:
            raise ValueError(f"it does not give back the text {_PROBE!r} (is its vocabulary there?)")
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # many kinds, of transformers, tokenizers and the chat template
        if tokenizer is not None:
            tokenizer.close()
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the tokenizer of {model_path} cannot be used: {reason}") from error
    if largest >= vocab_size:
        tokenizer.close()
        raise CheckpointError(
            f"the tokenizer of {model_path} has token ids up to {largest}, the model a vocabulary of "
            f"{vocab_size}: they do not belong together"
        )
    return tokenizer


def check_thinking(options: RunOptions, tokenizer: BoundedTokenizer, *, chats: bool) -> None:
    """Checks that ``--enable_thinking``, if it is given, has a chat template to be given to.

    Raises:
        UsageError: the template does not take it, or no prompt goes through one.
    """
    if options.enable_thinking is None:
        return
    if not chats:
        raise UsageError(
            f"--enable_thinking is for chat templates, and {options.prompts} has texts alone; leave it out"
        )
    if not takes_enable_thinking(tokenizer):
        raise UsageError(
            f"--enable_thinking: the chat template of {options.model_path} does not take it; leave it out"
        )


def tokenizer_sha256(model_path: str, *, revision: str | None = None) -> str:
    """Returns the SHA-256 of the tokenizer's files, those that there are, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in _FILES:
        path = optional_file(model_path, name, revision=revision)
        if path is not None:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _check_kinds(directory: Path) -> None:
    """Checks that what a tokenizer may be read from are regular files of a size that one may have.

    Raises:
        CheckpointError: one is something else, which may never end, or is far too large.
    """
    for file in sorted(directory.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model"):
            path = optional_file(directory, file.name)
            if path is not None and path.stat().st_size > _MOST_BYTES:
                raise CheckpointError(f"{path} is larger than any tokenizer's file ({_MOST_BYTES >> 30} GB)")
