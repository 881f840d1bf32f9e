"""What a store that is there has to do with what is asked for: its settings, as flags, and its prompts."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from activation_store import SequenceId, SequenceRecord, StoreSettings
from activation_store.format import MANIFEST
from activation_store.hook_labels import hook_label
from activation_store.index import SequenceIndex
from activation_store.manifest import MANIFEST_BYTES, decode_manifest
from activation_store.prompts import is_of_own_prompts
from activation_store.remote_files import open_files
from arc_runner.cluster.work import keys_of
from arc_runner.console import say_error
from arc_runner.errors import UsageError
from arc_runner.options import RunOptions
from qwen2_core.requests import SequenceRequest

_TASKS_NAMED = 3
# Settings that are no flags themselves; all others have the names of theirs.
_FLAG_OF = {"capture_prompt": "extract_prompt", "hook_names": "layers_to_extract", "seed": "random_seed"}
_OF_THE_MODEL = ("model_fingerprint", "tokenizer_sha256", "eos_token_ids", "hidden_size")


def check_store(directory: str, asked: StoreSettings) -> bool:
    """Checks that a store in ``directory``, if there is one, was made with the settings that are asked for.

    A model fingerprint of "" is not known yet, and is not compared. Returns whether there is a store.

    Raises:
        UsageError: it was made with others; says which flags would continue it.
        StoreError: its manifest cannot be used.
    """
    files = open_files(directory)
    try:
        data = files.read(MANIFEST, 0, MANIFEST_BYTES + 1)
    except OSError:  # most often there is none; whoever opens the store says what else it is
        return False
    there, provenance = decode_manifest(data, f"{files.location}/{MANIFEST}")
    if is_of_own_prompts(there) != is_of_own_prompts(asked):
        holds, others = ("own prompts", "puzzles") if is_of_own_prompts(there) else ("puzzles", "own prompts")
        raise UsageError(
            f"{files.location} holds {holds}, and a store has one kind; choose another --activations_dir for "
            f"{others}"
        )
    if not asked.model_fingerprint:
        asked = dataclasses.replace(asked, model_fingerprint=there.model_fingerprint)
    differences = list(_differences(there.to_json(), asked.to_json()))
    if not differences:
        return True
    said, flags = [], []
    for name, old, new in differences:
        is_flag = name in RunOptions.__dataclass_fields__
        said.append(
            f"{'--' if is_flag else ''}{name} is {_value(name, old)} there and {_value(name, new)} here"
        )
        if is_flag:
            flags.append(_flag(name, old))
        elif name in _OF_THE_MODEL:
            flags.append(f"with --model_path {shlex.quote(str(provenance.get('model_id', 'of that model')))}")
    again = f", or continue it {' '.join(dict.fromkeys(flags))}" if flags else ""
    raise UsageError(
        f"{files.location} was made with other settings ({'; '.join(said)}); choose another "
        f"--activations_dir{again}"
    )


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the name of each setting that differs, with its value there and here."""
    for name in there | asked:  # a setting that is empty is not among them
        old, new = there.get(name), asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            yield _FLAG_OF.get(name, name), old, new


def _value(name: str, value: Any) -> str:
    if name == "layers_to_extract":
        return " ".join(str(hook_label(hook)) for hook in value) or "none"
    return "nothing" if value is None else json.dumps(value)


def _flag(name: str, value: Any) -> str:
    """Returns the words of the command line that give a setting its value, after "with" or "without"."""
    if name == "layers_to_extract":
        return f"with --{name} {_value(name, value)}" if value else "with --no_extract_activations"
    if isinstance(value, bool):
        return f"{'with' if value else 'without'} --{name}"
    number = isinstance(value, float) and value.is_integer()
    return f"with --{name} {int(value) if number else shlex.quote(str(value))}"


def say_changed_prompts(
    requests: Sequence[SequenceRequest], committed: SequenceIndex, asked: str = "tasks"
) -> None:
    """Says how many of the sequences that are left to make are in the store under another prompt.

    They have the same task, test, augmentation and sample, and the same settings. So the data set has changed
    since, or what lays out the prompts. ``asked`` is what they are of, "tasks" or "prompts".
    """
    left = {_name(one.id) for one in requests if one.key not in committed}
    if not left or len(committed) == len(requests) - len(left):  # the store has nothing else
        return
    keys = set(keys_of(requests))
    changed = left.intersection(_name(record) for record in committed.records() if record.key not in keys)
    if changed:
        tasks = sorted({name[0] for name in changed})
        more = f" and {len(tasks) - _TASKS_NAMED} more" if len(tasks) > _TASKS_NAMED else ""
        names = ", ".join(tasks[:_TASKS_NAMED])
        say_error(
            f"{len(changed)} of {len(requests)} sequences are in the store with other prompts, of the "
            f"{asked} {names}{more}: the data set has changed since, or the tokenizer's chat template; they "
            "are made anew, and the old ones stay until "
            "`python -m activation_store verify ... --dataset ... --repair` drops them"
        )


def _name(sequence: SequenceId | SequenceRecord) -> tuple[Any, ...]:
    return (
        sequence.task_id,
        sequence.test_index,
        sequence.augmentation,
        sequence.sample_index,
        sequence.strengths,
    )
