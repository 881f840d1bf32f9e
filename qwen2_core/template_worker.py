"""Renders a chat template in a process of its own: this file is run as a script, and imports jinja2 alone.

Its arguments are the folders to import from. It reads lines of JSON on stdin and answers each with one on
stdout: first ``{"template": ..., "limit": ..., "seconds": ...}``, then for each rendering
``{"variables": {...}, "clock": ...}``, answered by ``{"text": ...}`` or ``{"error": ...}``. Memory and the
time of each rendering are limited; beyond them the system ends the process.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import sys
from typing import Any

_MEMORY = 1 << 30  # bytes of address space


def main() -> None:
    """Serves until stdin ends."""
    sys.path += sys.argv[1:]
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none; a limit may be lower
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment = make_environment()
    say({"ready": True})
    asked = json.loads(sys.stdin.readline() or "null")
    template = None
    for line in sys.stdin:
        if hasattr(signal, "alarm"):
            signal.alarm(asked["seconds"])  # ends the process, whatever it is doing
        try:
            if template is None:
                template = environment.from_string(asked["template"])
            answer = {"text": render(template, asked["limit"], **json.loads(line))}
        except MemoryError:
            answer = {"error": f"it takes more than {_MEMORY >> 30} GB of memory"}
        except RecursionError:
            answer = {"error": "it is nested too deep"}
        except Exception as error:  # whatever the template does wrong
            answer = {"error": f"{error}" or type(error).__name__}
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        say(answer)


def say(answer: dict[str, Any]) -> None:
    """Answers with one line."""
    print(json.dumps(answer), flush=True)


def make_environment() -> Any:
    """Returns a sandbox with all that chat templates of Transformers may use."""
    from jinja2 import Undefined, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """Leaves out ``{% generation %}``, which marks what an assistant wrote, and keeps what is inside."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's interface

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PlainNamespace(Namespace):
        """A namespace without attributes that begin with an underscore."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace may not have {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **attributes: Any) -> PlainNamespace:
        made = PlainNamespace()
        for name, value in dict(*args, **attributes).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        if isinstance(value, Undefined):
            raise TypeError("an undefined value has no JSON")
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = namespace
    return environment


def render(template: Any, limit: int, variables: dict[str, Any], clock: str | None) -> str:
    """Returns what a template writes, of at most ``limit`` characters.

    ``clock`` is the time that the template is told, in ISO format; None stands for now.
    """

    def strftime_now(layout: str) -> str:
        now = datetime.datetime.now() if clock is None else datetime.datetime.fromisoformat(clock)
        return now.strftime(layout)

    pieces, length = [], 0
    for piece in template.generate(strftime_now=strftime_now, **variables):
        length += len(piece)
        if length > limit:
            raise ValueError(f"it writes more than {limit:,} characters")
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    main()
