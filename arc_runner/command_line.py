"""The command line of the main job: its parser, its help, and the flags of old that are gone."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
from typing import Any, NoReturn

from arc_runner.console import command_name
from arc_runner.errors import UsageError
from arc_runner.option_checks import check_options
from arc_runner.options import CAPTURE, PROCESSES, Flag, RunOptions
from qwen2_core.messages import similar_name

_PACKAGE = "qwen2-jax-activations"
_MESSAGE_LENGTH = 400  # a number of thousands of digits is not repeated
_GROUP_NOTES = {PROCESSES: "detected on TPU pods, SLURM, Kubernetes and Open MPI"}
# Flags of the old runner that are gone, and what to do without them.
_RETIRED = {
    "--use_kv_cache": "the KV cache is always on",
    "--no_kv_cache": "the KV cache is always on",
    "--use_rope_cache": "rotary angles are always computed once per step",
    "--no_rope_cache": "rotary angles are always computed once per step",
    "--compile_prefill": "the prefill is always compiled",
    "--use_scan_loop": "the decode loop is always compiled; --generation python is the old loop",
    "--prefill_chunk_size": "long prompts are processed in blocks by themselves",
    "--save_every_n_batches": "every batch is stored as soon as it is done",
    "--upload_to_cloud": "give a URL as --activations_dir",
    "--cloud_bucket": "give a URL as --activations_dir",
}


def parse_options(argv: list[str] | None = None) -> RunOptions:
    """Parses the command line, by default that of this process, and checks it.

    Raises:
        UsageError: unknown or retired flags, and values that cannot be.
        SystemExit: after --help or --version.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(argv)
    for flag in (word.split("=")[0] for word in unknown):
        if flag in _RETIRED:
            raise UsageError(f"{flag} no longer exists: {_RETIRED[flag]}")
    if unknown:
        hint = similar_name(unknown[0].split("=")[0], parser.flags()) or "; --help lists the flags"
        raise UsageError(f"unknown argument {unknown[0]}{hint}")
    values: dict[str, Any] = vars(given)
    values["layers_to_extract"] = tuple(sorted(values["layers_to_extract"]))
    if values["mesh_shape"] is not None:
        values["mesh_shape"] = tuple(values["mesh_shape"])
    if values["augmentations"] is None:
        # Greedy samples of one prompt are all the same, so greedy predictions differ by augmentation.
        values["augmentations"] = values["predictions_per_task"] if values["temperature"] == 0 else 1
    options = RunOptions(**values)
    check_options(options)
    return options


class _Parser(argparse.ArgumentParser):
    """Raises ``UsageError`` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message if len(message) <= _MESSAGE_LENGTH else f"{message[:_MESSAGE_LENGTH]}...")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def _parser() -> _Parser:
    parser = _Parser(
        prog=command_name(),
        description="ARC tasks and a Qwen2 checkpoint in; activations, answers and a report out. "
        "The same command again continues where a run stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=_versions(), help="show this program's version and JAX's"
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(RunOptions):
        flag: Flag = field.metadata["flag"]
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group, _GROUP_NOTES.get(flag.group))
        _add(groups[flag.group], field.name, field.default, flag)
    groups[CAPTURE].add_argument(
        "--no_extract_activations",
        dest="extract_activations",
        action="store_false",
        default=argparse.SUPPRESS,
        help="store tokens and log-probabilities only",
    )
    parser.set_defaults(augmentations=None)  # it depends on the temperature
    return parser


def _add(group: Any, name: str, default: Any, flag: Flag) -> None:
    """Adds the flag of the field ``name`` to its group of the help."""
    arguments = {"default": default, **flag.arguments}
    text = flag.help
    if "action" not in arguments:
        arguments.setdefault("metavar", name.split("_")[-1].upper())
        shown = "%(default)s" if flag.default_text is None else flag.default_text
        if shown and default is not None:
            text = f"{text} (default: {shown})"
    group.add_argument(f"--{name}", help=text, **arguments)


def _versions() -> str:
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    return f"{_PACKAGE} {version}, jax {importlib.metadata.version('jax')}"
