"""The command line of `python -m activation_store`: its commands, their flags and help. Quick to import."""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from activation_store.hook_labels import hook_label
from qwen2_core.messages import did_you_mean, masked, printable, similar_name

PACKAGE = "qwen2-jax-activations"
_MESSAGE_LENGTH = 400
_Add = Callable[["_Parser"], None]


def shown(text: str) -> str:
    """Returns what is printed of a text that may quote a store or a URL."""
    return masked(printable(text))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of a command line, by default that of this process; `.command` is the command.

    Raises:
        SystemExit: after --help and --version, and with code 2 and one sentence for bad usage.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    if words and not words[0].startswith("-") and words[0] not in _COMMANDS:
        hint = similar_name(words[0], _COMMANDS) or "; --help lists the commands"
        parser.error(f"there is no command {words[0]}{hint}")
    options, unknown = parser.parse_known_args(words)
    if unknown:
        of_command: _Parser = options.parser
        word = unknown[0].split("=")[0]
        hint = similar_name(word, of_command.flags()) or f"; {options.command} --help lists the flags"
        of_command.error(f"unknown argument {word}{hint}")
    return options


class _Parser(argparse.ArgumentParser):
    """Ends with one sentence where argparse would print its usage first."""

    def error(self, message: str) -> NoReturn:
        text = message if len(message) <= _MESSAGE_LENGTH else f"{message[:_MESSAGE_LENGTH]}..."
        self.exit(2, f"{self.prog}: error: {shown(text)}\n")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = _Parser(
        prog="python -m activation_store",
        usage="%(prog)s COMMAND DIR [flags]",
        description="Look after a store of activations.",
        epilog="\n".join(_overview()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show this program's version")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", help=argparse.SUPPRESS, dest="command", prog=parser.prog
    )
    for group in _GROUPS.values():
        for name, (text, add) in group.items():
            one = commands.add_parser(name, description=f"{text[:1].upper()}{text[1:]}.", allow_abbrev=False)
            one.set_defaults(parser=one)
            add(one)
    return parser


def _overview() -> Iterator[str]:
    """Yields the lines that name all commands."""
    for title, group in _GROUPS.items():
        yield f"{title}:"
        for name, (text, _) in group.items():
            yield f"  {name:<15}{text}"
        yield ""
    yield "COMMAND --help names the flags of a command."


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            version = importlib.metadata.version(PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"{PACKAGE} {version}")
        parser.exit()


# --- Values -------------------------------------------------------------------------------------------------


def _path(text: str) -> str:
    """Returns a path or URL of the command line, with a leading ``~`` expanded."""
    if not text or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"{text!a} is no path")
    return os.path.expanduser(text)  # noqa: PTH111 - a URL would not outlive a Path


def _place(text: str) -> str:
    """Returns the path of a directory, or a URL."""
    path = _path(text)
    if "://" not in path and not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {shown(path + did_you_mean(path))}")
    return path


def _existing(text: str) -> str:
    """Returns the path of a file or directory that is there."""
    path = _path(text)
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"there is no file {shown(path + did_you_mean(path))}")
    return path


def _whole(least: int, most: int) -> Callable[[str], int]:
    """Returns what reads a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!a} is no whole number from {least} to {most}")
        return number

    return read


def _several(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Returns what reads one value or several between commas."""
    return lambda text: tuple(read(one.strip()) for one in text.split(","))


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("there is a name missing between the commas")
    return text


_layer = _whole(0, 9_999)


def _hook(text: str) -> int | str:
    """Returns the number of a layer, or a hook's name as it is."""
    try:
        return hook_label(text)
    except ValueError:
        return _layer(text)


# --- Commands -----------------------------------------------------------------------------------------------


def _add_store(parser: _Parser) -> None:
    parser.add_argument("directory", metavar="DIR", type=_place, help="the store: a directory or a URL")


def _add_verify(parser: _Parser) -> None:
    _add_store(parser)
    beside = parser.add_argument_group("what the store is compared with")
    beside.add_argument("--dataset", type=_existing, help="puzzles or own prompts to be covered")
    beside.add_argument(
        "--report", type=_existing, help="a run's report, to be checked with the answers beside it"
    )
    beside.add_argument(
        "--replay",
        type=_whole(0, 10**9),
        metavar="N",
        default=0,
        help="recompute N random sequences (default: %(default)s)",
    )
    beside.add_argument(
        "--seed",
        type=_whole(0, 2**32 - 1),
        default=0,
        help="which sequences --replay draws (default: %(default)s)",
    )
    beside.add_argument(
        "--model_path",
        type=_path,
        help="checkpoint, a directory or hub id: to recompute with, and to make the prompts of --dataset "
        "again (default for these: the one that the store was made with, if it is there)",
    )
    parser.add_argument_group("repair").add_argument(
        "--repair",
        action="store_true",
        help="first drop what is damaged, and with --dataset what was made of prompts that have changed",
    )


def _add_plot(parser: _Parser) -> None:
    _add_store(parser)
    parser.add_argument(
        "--output",
        type=_path,
        metavar="FOLDER",
        default="plots",
        help="where the PNG files go (default: %(default)s)",
    )
    parser.add_argument(
        "--layer",
        type=_several(_layer),
        metavar="L[,L]",
        help="layers to draw a PCA of (default: the middle one that is stored)",
    )


def _add_view(parser: _Parser) -> None:
    _add_store(parser)
    parser.add_argument("--output", type=_path, required=True, metavar="PAGE.html", help="the page to write")
    which = parser.add_argument_group("which sequences")
    which.add_argument(
        "--task", type=_several(_name), metavar="ID[,ID]", help="only these tasks or prompts (default: all)"
    )
    which.add_argument(
        "--n",
        type=_whole(1, 10_000),
        default=50,
        help="at most so many sequences, of as many tasks as can be (default: %(default)s)",
    )
    text = parser.add_argument_group("text, grids and right answers")
    text.add_argument(
        "--model_path",
        type=_path,
        help="checkpoint whose tokenizer makes text of tokens (default: the one that the store was made "
        "with, if it is there)",
    )
    text.add_argument(
        "--dataset",
        type=_existing,
        help="ARC data set with the right answers (default: the one that the store was made of, if it is "
        "there)",
    )
    tints = parser.add_argument_group("what tokens can be tinted by, besides their log-probability")
    tints.add_argument(
        "--layers",
        type=_several(_layer),
        metavar="L[,L]",
        help="the norm of these layers (default: all that are stored)",
    )
    tints.add_argument(
        "--direction",
        type=_existing,
        action="append",
        default=[],
        metavar="FILE",
        help="directions in a safetensors file, each tensor [hidden] or [n, hidden]; may be given again",
    )
    tints.add_argument(
        "--layer",
        type=_layer,
        metavar="L",
        help="the layer of directions, and of an SAE, whose file does not name it",
    )
    tints.add_argument(
        "--sae",
        type=_existing,
        metavar="DIR",
        help="an SAE as SAELens saves it: a folder with sae_weights.safetensors and cfg.json",
    )
    tints.add_argument(
        "--feature",
        type=_several(_whole(0, 2**31 - 1)),
        metavar="I[,I]",
        help="which features of --sae",
    )


def _add_export(parser: _Parser) -> None:
    _add_store(parser)
    parser.add_argument("--output", type=_path, required=True, help="new directory")
    rows = parser.add_argument_group("which rows")
    rows.add_argument(
        "--layer",
        type=_hook,
        required=True,
        metavar="L",
        help="a layer's number, or another hook's name, such as blocks.12.attn.hook_z",
    )
    rows.add_argument("--context_size", type=_whole(1, 2**20), required=True, help="rows in a window")
    rows.add_argument(
        "--first_position",
        type=_whole(0, 2**31 - 1),
        default=0,
        help="leave out earlier positions (default: %(default)s)",
    )
    rows.add_argument("--generated_only", action="store_true", help="leave out prompt rows")


def _add_import_legacy(parser: _Parser) -> None:
    parser.add_argument("source", type=_place, help="directory of the pickles")
    parser.add_argument("--output", type=_path, required=True, help="new store")
    parser.add_argument(
        "--hidden_size", type=_whole(1, 2**20), required=True, help="the model's; other widths are refused"
    )


_GROUPS: dict[str, dict[str, tuple[str, _Add]]] = {
    "look at a store": {
        "stats": ("rows, mean norm and variance of each layer", _add_store),
        "plot": ("draw norms, a PCA and the run's timeline as PNG files (extra `plots`)", _add_plot),
        "view": ("write one HTML page to look at tokens, grids and answers", _add_view),
    },
    "check it": {"verify": ("check every byte and row; one line a finding", _add_verify)},
    "take it elsewhere": {
        "export": ("write one layer as a SAELens cached-activations dataset (extra `sae`)", _add_export),
        "import-legacy": ("make a store of layer_<l>_batch_<n>.pkl files", _add_import_legacy),
    },
}
_COMMANDS = [name for group in _GROUPS.values() for name in group]
