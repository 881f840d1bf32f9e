"""What a store that is there has to do with what is asked for: its settings, as flags, and its prompts."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from activation_store import SequenceId, SequenceRecord, StoreSettings
from activation_store.format import INTERVENTIONS, MANIFEST
from activation_store.hook_labels import hook_label
from activation_store.index import SequenceIndex
from activation_store.manifest import MANIFEST_BYTES, decode_manifest
from activation_store.prompts import is_of_own_prompts
from activation_store.remote_files import open_files
from arc_runner.cluster.work import keys_of
from arc_runner.console import say_error
from arc_runner.errors import UsageError
from arc_runner.hook_flags import words_of
from arc_runner.options import RunOptions
from qwen2_core.requests import SequenceRequest

_TASKS_NAMED = 3
# Settings that are no flags themselves; all others have the names of theirs.
_FLAG_OF = {"capture_prompt": "extract_prompt", "seed": "random_seed", "interventions": "steer"}
_LISTS = ("layers_to_extract", "hook_points")
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
    differences = list(_differences(_values(there), _values(asked)))
    if not differences:
        return True
    said, flags = [], []
    for name, old, new in differences:
        is_flag = name in RunOptions.__dataclass_fields__
        said.append(
            f"{'--' if is_flag else ''}{name} is {_value(name, old)} there and {_value(name, new)} here"
        )
        if is_flag:
            flags.append(_flag(name, old, files.location))
        elif name in _OF_THE_MODEL:
            flags.append(f"with --model_path {shlex.quote(str(provenance.get('model_id', 'of that model')))}")
            if (commit := provenance.get("model_commit")) is not None:
                flags.append(f"--revision {shlex.quote(str(commit))}")
    again = f", or continue it {' '.join(dict.fromkeys(flags))}" if flags else ""
    raise UsageError(
        f"{files.location} was made with other settings ({'; '.join(said)}); choose another "
        f"--activations_dir{again}"
    )


def _values(settings: StoreSettings) -> dict[str, Any]:
    """Returns the settings as the manifest has them, and one that it leaves out but that has a value."""
    values = settings.to_json()
    return values | {"residual_dtype": values.get("residual_dtype", settings.dtype)}


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the name of each setting that differs, with its value there and here."""
    for name in there | asked:  # a setting that is empty is not among them
        old, new = there.get(name), asked.get(name)
        if name == "hook_names":
            yield from _hook_differences(there[name], asked[name])
        elif name == "widths" and there["hook_names"] != asked["hook_names"]:  # that says it
            continue
        elif isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            yield _FLAG_OF.get(name, name), old, new


def _hook_differences(there: Sequence[str], asked: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yields what differs of the two flags that say which hooks are stored, their words there and here."""
    old, new = (_hook_words(names) for names in (there, asked))
    for name in old:
        if old[name] != new[name]:
            yield name, old[name], new[name]


def _hook_words(names: Sequence[str]) -> dict[str, list[str]]:
    labels = {name: hook_label(name) for name in names}
    return {
        "layers_to_extract": [str(label) for label in labels.values() if isinstance(label, int)],
        "hook_points": words_of(name for name, label in labels.items() if not isinstance(label, int)),
    }


def _value(name: str, value: Any) -> str:
    if isinstance(value, list) and name in _LISTS:
        return " ".join(value) or "none"
    if name == "steer" and value is not None:
        return f"the file of checksum {value[:12]}"
    return "nothing" if value is None else json.dumps(value)


def _flag(name: str, value: Any, location: str) -> str:
    """Returns the words of the command line that give a setting its value, after "with" or "without"."""
    if name == "layers_to_extract" and not value:
        return "with --no_extract_activations"
    unset = ("hook_points", "steer", "capture_before", "min_p", "repetition_penalty", "enable_thinking")
    if not value and name in unset:
        return f"without --{name}"
    if name in _LISTS:
        return f"with --{name} {_value(name, value)}"
    if name == "steer":
        return f"with --{name} {shlex.quote(f'{location}/{INTERVENTIONS}')}"
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
