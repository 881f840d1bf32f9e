"""Own prompts instead of puzzles: a file of chats and texts, one a line, and their token ids.

    {"id": "sum", "prompt": "What is 2 + 2?"}
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    {"text": "The capital of France is"}

A chat (`messages`, or `prompt` for one user message) is laid out by the tokenizer's chat template. A `text`
is continued as it is.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arc_puzzles.chat import encode_prompts
from arc_puzzles.data_files import parse_json, read_text, shown
from arc_puzzles.grids import ArcFormatError
from arc_puzzles.tasks import TaskFailure

# What a store's manifest says of its prompts as "prompt_version": another layout gets another name.
OWN_PROMPTS = "own-prompts-v0"
Messages = list[dict[str, str]]

_FORMS = ("messages", "prompt", "text")
_ID_LENGTH = 256


@dataclass(frozen=True)
class OwnPrompt:
    """Holds a chat, or a text to continue. `place` is where it stands in its file: "line 3"."""

    prompt_id: str
    content: Messages | str
    place: str


@dataclass(frozen=True)
class LoadedPrompts:
    """Holds the usable prompts of a file, and a failure for each other line, both in the file's order."""

    prompts: tuple[OwnPrompt, ...]
    failures: tuple[TaskFailure, ...]
    notices: tuple[str, ...] = ()

    @property
    def outline(self) -> tuple[tuple[str, int], ...]:
        """Returns (id, 1) of all lines, as a data set of puzzles has (task id, number of tests)."""
        names = (
            *(one.prompt_id for one in self.prompts),
            *(failure.task_id for failure in self.failures),
        )
        return tuple((name, 1) for name in names)

    @property
    def has_chats(self) -> bool:
        """Tells whether any prompt needs a chat template."""
        return any(not isinstance(one.content, str) for one in self.prompts)


def load_prompts(path: str | Path, limit: int | None = None) -> LoadedPrompts:
    """Reads a file of prompts, or its first `limit`: one JSON object a line, or one JSON list of them.

    It may be packed with gzip. An object has exactly one of "messages", "prompt" and "text"; null counts as
    missing, and other keys are not read. Its "id" is a text or a whole number; without one it is the number
    of the line, or of the item in a list, counted from 1.

    A line that cannot be used is a failure, whose reason begins with the line's number. Raises ArcFormatError
    where the file cannot be read or has nothing that can be used, or where an id occurs twice.
    """
    path = Path(path)
    name = shown(str(path))
    prompts: list[OwnPrompt] = []
    failures: list[TaskFailure] = []
    place_of: dict[str, str] = {}
    for place, number, content in itertools.islice(
        _items(read_text(path), name), None if limit is None else min(limit, sys.maxsize)
    ):
        prompt_id = None
        try:
            if isinstance(content, ArcFormatError):
                raise content
            prompt_id = _id_of(content, number)
            if prompt_id in place_of:
                raise _Twice(
                    f"{name} has the id '{shown(prompt_id)}' twice, on {place_of[prompt_id]} and {place}"
                    f"{'' if _given(content, 'id') else ', where it is the number of the line'}"
                )
            place_of[prompt_id] = place
            prompts.append(OwnPrompt(prompt_id, _content_of(content), place))
        except _Twice:
            raise
        except ArcFormatError as error:
            failures.append(TaskFailure(prompt_id or place, f"{place} {error}"))
    if not prompts:
        why = f" that can be used: {failures[0].reason}" if failures else " in it"
        raise ArcFormatError(f"{name} has no prompt{why}")
    return LoadedPrompts(tuple(prompts), tuple(failures))


def encode_own(
    tokenizer: Any, contents: Sequence[Messages | str], enable_thinking: bool | None = None
) -> list[np.ndarray | str]:
    """Returns the token ids, int32 `[n]`, of each chat or text; for one that has none, a sentence why.

    A chat ends with the opening of the assistant's turn, and `enable_thinking` is as for `encode_prompts`. A
    text is tokenized as `tokenizer(text)` does.
    """
    try:
        return _encode(tokenizer, contents, enable_thinking)  # all at once: a tokenizer may have threads
    except Exception:  # of one of them
        return [_encode_one(tokenizer, content, enable_thinking) for content in contents]


def check_messages(value: object) -> Messages:
    """Returns a chat that may come from anywhere; raises ArcFormatError with what is wrong after "has"."""
    if not isinstance(value, list) or not value:
        raise ArcFormatError('has "messages" that are no list of {"role": ..., "content": ...}')
    messages: Messages = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        given = message if isinstance(message, dict) else {}
        given = {key: one for key, one in given.items() if one is not None}
        for key in ("role", "content"):
            if not isinstance(given.get(key), str):
                raise ArcFormatError(f'has no text "{key}" in {where}')
        if odd := set(given) - {"role", "content"}:
            raise ArcFormatError(
                f"has {_quoted(odd)} in {where}; a message is its role and its content, and nothing else"
            )
        messages.append({key: _encodable(given[key], f"{where}.{key}") for key in ("role", "content")})
    if messages[-1]["role"] == "assistant":
        raise ArcFormatError(
            "has the assistant's turn as its last message; end with the user's, or lay the chat out yourself "
            'and give it as "text"'
        )
    return messages


def check_text(value: object, name: str = "text") -> str:
    """Returns a text that may come from anywhere; raises ArcFormatError with what is wrong after "has"."""
    if not isinstance(value, str):
        raise ArcFormatError(f'has a "{name}" that is no text')
    if not value:
        raise ArcFormatError(f'has an empty "{name}"')
    return _encodable(value, name)


class _Twice(ArcFormatError):
    """Says which id occurs twice, which fails the file and not the line."""


def _items(text: str, name: str) -> Iterator[tuple[str, int, object]]:
    """Yields the place, the number and the content, or what is wrong, of each prompt of a file."""
    if text.lstrip().startswith("["):
        content = parse_json(text, name, several="a file has one list, or one object a line")
        assert isinstance(content, list)
        yield from ((f"item {number}", number, item) for number, item in enumerate(content, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                content = parse_json(line, "", several="a line has one object")
            except ArcFormatError as error:
                content = ArcFormatError(str(error).strip().replace("line 1 column", "column"))
            yield f"line {number}", number, content


def _id_of(content: object, number: int) -> str:
    value = _given(content, "id")
    if value is None:
        return str(number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ArcFormatError('has an "id" that is neither a text nor a whole number')
    name = str(value)
    if not 1 <= len(name) <= _ID_LENGTH or not name.isprintable():
        raise ArcFormatError(f'has an "id" that is not 1 to {_ID_LENGTH} printable characters')
    return name


def _content_of(content: object) -> Messages | str:
    if not isinstance(content, dict):
        raise ArcFormatError('is no JSON object such as {"prompt": "..."}')
    given = [form for form in _FORMS if _given(content, form) is not None]
    if len(given) != 1:
        found = f"has {_quoted(given)}" if given else f"has neither of {_quoted(_FORMS)}"
        raise ArcFormatError(f"{found}; a line has exactly one of them")
    value = content[given[0]]
    if given == ["messages"]:
        return check_messages(value)
    text = check_text(value, given[0])
    return text if given == ["text"] else [{"role": "user", "content": text}]


def _encode(
    tokenizer: Any, contents: Sequence[Messages | str], enable_thinking: bool | None
) -> list[np.ndarray | str]:
    chats = iter(
        encode_prompts(tokenizer, [one for one in contents if not isinstance(one, str)], enable_thinking)
    )
    texts = [one for one in contents if isinstance(one, str)]
    of_texts = iter(
        tokenizer(texts, truncation=False, return_attention_mask=False)["input_ids"] if texts else ()
    )
    encoded = [
        np.asarray(next(of_texts), np.int32) if isinstance(one, str) else next(chats) for one in contents
    ]
    return [token_ids if len(token_ids) else "has no tokens" for token_ids in encoded]


def _encode_one(tokenizer: Any, content: Messages | str, enable_thinking: bool | None) -> np.ndarray | str:
    try:
        return _encode(tokenizer, [content], enable_thinking)[0]
    except Exception as error:  # many kinds, of tokenizers and of what a chat template raises
        return f"cannot be tokenized: {' '.join(str(error).split())}"


def _given(content: object, key: str) -> object:
    return content.get(key) if isinstance(content, dict) else None


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArcFormatError(f'has half a character ({error.object[error.start]!a}) in "{name}"') from error
    return text


def _quoted(names: Sequence[str] | set[str]) -> str:
    ordered = sorted(names) if isinstance(names, set) else names
    return ", ".join(f'"{shown(name)}"' for name in ordered)
