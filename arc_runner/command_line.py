"""The command line of the main job: its parser, its help, and the flags of old that are gone."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from arc_runner.console import command_name
from arc_runner.errors import UsageError
from arc_runner.hook_flags import names_of
from arc_runner.option_checks import check_options
from arc_runner.options import CAPTURE, PROCESSES, Flag, Limits, RunOptions, flag_of
from qwen2_core.messages import similar_name

_PACKAGE = "qwen2-jax-activations"
_DESCRIPTION = """\
ARC tasks, or prompts of your own, and a Qwen2 checkpoint in; activations, answers and a report out.
The same command again continues where a run stopped."""
_EXAMPLES = (
    "--n_tasks 2",
    "--model_path Qwen/Qwen2.5-0.5B-Instruct --dataset_path training.json --activations_dir run",
    "--temperature 1 --predictions_per_task 16 --layers_to_extract 10,12,20-23",
)
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})")
# Defaults beside --prompts, so that puzzles and own prompts can be run in one folder.
_WITH_PROMPTS = {
    "activations_dir": "prompt-activations",
    "output_filepath": "completions.jsonl",
    "predictions_per_task": 1,
}
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
    parser = make_parser()
    given, unknown = parser.parse_known_args(_spread(sys.argv[1:] if argv is None else argv))
    for flag in (word.split("=")[0] for word in unknown):
        if flag in _RETIRED:
            raise UsageError(f"{flag} no longer exists: {_RETIRED[flag]}")
    if unknown:
        word = unknown[0].split("=")[0]
        longer = [flag for flag in parser.flags() if flag.endswith(word.replace("--", "_", 1))]
        close = longer or difflib.get_close_matches(word, parser.flags(), 1)
        hint = f"did you mean {close[0]}?" if close else "--help lists the flags"
        raise UsageError(f"unknown argument {unknown[0]}; {hint}")
    values: dict[str, Any] = vars(given)
    values["layers_to_extract"] = tuple(sorted(values["layers_to_extract"]))
    if values["hook_points"]:
        try:
            values["hook_points"] = names_of(values["hook_points"])
        except ValueError as error:
            raise UsageError(f"--hook_points: {error}") from error
    if values["mesh_shape"] is not None:
        values["mesh_shape"] = tuple(values["mesh_shape"])
    own = values["prompts"] is not None
    for name, with_prompts in _WITH_PROMPTS.items():
        if values[name] is None:
            values[name] = with_prompts if own else getattr(RunOptions, name)
    if values["augmentations"] is None:
        # Greedy samples of one prompt are all the same, so greedy predictions differ by augmentation.
        is_greedy = values["temperature"] == 0 and not own
        values["augmentations"] = values["predictions_per_task"] if is_greedy else 1
    options = RunOptions(**values)
    check_options(options)
    return options


class _Parser(argparse.ArgumentParser):
    """Raises ``UsageError`` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message if len(message) <= _MESSAGE_LENGTH else f"{message[:_MESSAGE_LENGTH]}...")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = similar_name(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}{hint}") from None

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def make_parser() -> _Parser:
    """Returns the parser of the main job's flags, in the groups of its help."""
    name = command_name()
    parser = _Parser(
        prog=name,
        usage=f"{name} [-h] [--version] [--FLAG VALUE ...]",
        description=_DESCRIPTION,
        epilog="\n".join(["examples:", *(f"  {name} {words}" for words in _EXAMPLES)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    # These depend on the temperature and on --prompts.
    parser.set_defaults(augmentations=None, **dict.fromkeys(_WITH_PROMPTS))
    return parser


def _add(group: Any, name: str, default: Any, flag: Flag) -> None:
    """Adds the flag of the field ``name`` to its group of the help."""
    arguments = {"default": default, **flag.arguments}
    text = flag.help
    if "action" not in arguments:
        arguments.setdefault("metavar", name.split("_")[-1].upper())
        number = f"{default:g}" if isinstance(default, float) else str(default)
        shown = number if flag.default_text is None and default is not None else flag.default_text
        if shown:
            text = f"{text} (default: {shown})"
    group.add_argument(f"--{name}", help=text.replace("%", "%%"), **arguments)


def _spread(words: Sequence[str]) -> list[str]:
    """Returns a command line where lists are separate words: ``10,12-14`` after a flag of many numbers."""
    lists = {f"--{name}": flag_of(name) for name in RunOptions.__dataclass_fields__}
    lists = {name: flag for name, flag in lists.items() if "nargs" in flag.arguments and flag.limits}
    spread: list[str] = []
    flag = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flag = lists.get(name)
            spread += [name, *_numbers(value, flag)] if flag and equals else [word]
        else:
            spread += _numbers(word, flag) if flag else [word]
    return spread


def _numbers(word: str, flag: Flag) -> list[str]:
    """Returns the numbers of a list; what is none of these stays as it is, to be refused by its flag."""
    numbers: list[str] = []
    for part in filter(None, word.split(",")):
        ends = _RANGE.fullmatch(part) if flag.arguments["nargs"] == "+" else None
        if ends and int(ends[1]) <= int(ends[2]) <= cast(Limits, flag.limits).most:
            numbers += map(str, range(int(ends[1]), int(ends[2]) + 1))
        else:
            numbers.append(part)
    return numbers or [word]


def _versions() -> str:
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    return f"{_PACKAGE} {version}, jax {importlib.metadata.version('jax')}"
