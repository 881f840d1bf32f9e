"""Making the prompts of a store's sequences again, from puzzles or own prompts as they are now.

The only module of the store that knows of ARC and of tokenizers; import it where it is used.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.format import SequenceId, SequenceRecord, StoreError, StoreSettings, sequence_key
from activation_store.reader import ActivationStore
from arc_puzzles import (
    ArcTask,
    Augmentation,
    build_messages,
    create_grid_encoder,
    encode_prompt,
    load_tasks,
)
from arc_puzzles.prompt_files import OWN_PROMPTS, OwnPrompt, encode_own, load_prompts
from qwen2_core.chat_template import BoundedTokenizer

Asked = ArcTask | OwnPrompt


def is_of_own_prompts(settings: StoreSettings) -> bool:
    """Tells whether a store's sequences were made of own prompts, not of puzzles."""
    return settings.prompt.get("prompt_version") == OWN_PROMPTS


def load_dataset(path: str, directory: str) -> tuple[ArcTask, ...] | tuple[OwnPrompt, ...]:
    """Reads what the store in a directory was made of: puzzles or, if it says so, a file of own prompts.

    Raises:
        ArcFormatError: it cannot be read as that.
        StoreError: the store cannot be opened.
    """
    if is_of_own_prompts(ActivationStore(directory).settings):
        return load_prompts(path).prompts
    return load_tasks(path).tasks


def expected_tests(asked: Iterable[Asked]) -> list[tuple[str, int]]:
    """Returns the (task id, test index) that a store of these puzzles or prompts should have."""
    return [(_name(one), test) for one in asked for test in range(_tests(one))]


def sequences_now(store: ActivationStore, tasks: Iterable[Asked], tokenizer: Any) -> dict[str, SequenceId]:
    """Returns the sequences of a store, by their keys, as they would be made of tasks as these are now.

    Raises:
        StoreError: no sequence of the store would be the same, so that it is not known whether the tokenizer
            is the one that made it; or its prompts cannot be made.
    """
    by_id = {_name(task): task for task in tasks}
    prompts: dict[tuple[str, int, str], np.ndarray] = {}
    now: dict[str, SequenceId] = {}
    for record in store.index.records():
        task = by_id.get(record.task_id)
        if task is None or record.test_index >= _tests(task):
            continue
        puzzle = record.task_id, record.test_index, record.augmentation
        if puzzle not in prompts:
            prompts[puzzle] = _prompt(store.settings, task, record, tokenizer)
        one = record.identity(prompts[puzzle])
        now[sequence_key(store.settings, one)] = one
    if now and not any(key in store.index for key in now):
        raise StoreError(
            f"no sequence in {store.directory} has the prompt that the data set and the tokenizer give now: "
            "are they those of this store?"
        )
    return now


def load_tokenizer(model_path: str | os.PathLike[str]) -> BoundedTokenizer:
    """Loads a checkpoint's tokenizer, to be closed after use; raises StoreError where it cannot be."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would warn that torch is missing
    from transformers import AutoTokenizer  # takes seconds

    directory = Path(model_path).expanduser()
    source = directory if directory.is_dir() else model_path
    try:
        return BoundedTokenizer(AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    except Exception as error:  # many kinds
        reason = " ".join(str(error).split())
        raise StoreError(f"the tokenizer of {model_path} cannot be used: {reason}") from error


def _name(asked: Asked) -> str:
    return asked.prompt_id if isinstance(asked, OwnPrompt) else asked.task_id


def _tests(asked: Asked) -> int:
    return 1 if isinstance(asked, OwnPrompt) else len(asked.test)


def _prompt(settings: StoreSettings, task: Asked, record: SequenceRecord, tokenizer: Any) -> np.ndarray:
    choice = settings.prompt.get("enable_thinking")  # not there where the template was left to itself
    enable_thinking = None if choice is None else choice == "true"
    if isinstance(task, OwnPrompt):
        [token_ids] = encode_own(tokenizer, [task.content], enable_thinking)
        if isinstance(token_ids, str):
            raise StoreError(f"the prompt of {record.label} cannot be made again: {task.place} {token_ids}")
        return token_ids
    try:
        encoder = create_grid_encoder(settings.prompt["grid_encoder"])
        augmented = task.augmented(Augmentation.parse(record.augmentation))
        version = settings.prompt["prompt_version"]
        messages = build_messages(augmented, record.test_index, encoder, version)
        return encode_prompt(tokenizer, messages, enable_thinking)
    except (ValueError, KeyError) as error:
        raise StoreError(f"the prompt of {record.label} cannot be made again: {error}") from error
