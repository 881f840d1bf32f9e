"""The forms that values in a store's files must have, and the one way in which they are checked.

A field's form is its annotation in `format.py`. A file may come from anywhere, so nothing of it is used
before it has passed.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

Form = TypeVar("Form")

# Integers that every reader of JSON takes for the same number.
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Length = Annotated[int, Meta(ge=0, lt=1 << 31)]  # of what is counted in int32: rows, tokens
Positive = Annotated[int, Meta(ge=1, lt=1 << 31)]
Width = Annotated[int, Meta(ge=1, le=1 << 20)]  # of a row
Nanoseconds = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
# What is printed as it stands may not steer a terminal and must be encodable: no controls, no surrogates.
_PRINTABLE = r"\A[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*\Z"
Name = Annotated[str, Meta(max_length=1024, pattern=_PRINTABLE)]
Sentence = Annotated[str, Meta(max_length=4096, pattern=_PRINTABLE)]
Key = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
OptionalNumerics = Annotated[str, Meta(pattern=r"\A(?:[0-9a-f]{8})?\Z")]
OptionalSha256 = Annotated[str, Meta(pattern=r"\A(?:[0-9a-f]{64})?\Z")]  # "" where there is no shard


def form(name: str, types: Mapping[str, Any], defaults: Mapping[str, Any]) -> type[msgspec.Struct]:
    """Returns the form of a JSON object that has the fields of `types` and no others.

    A field in `defaults` may be missing, as in files of earlier versions.
    """
    required = [(field, kind) for field, kind in types.items() if field not in defaults]
    optional = [(field, types[field], value) for field, value in defaults.items() if field in types]
    return msgspec.defstruct(name, [*required, *optional], kw_only=True, forbid_unknown_fields=True)


def checked(value: Any, kind: Any) -> Any:
    """Returns plain Python values as `kind`; ValueError says which of them has another form."""
    try:
        return msgspec.convert(value, kind)
    except (ValueError, RecursionError) as error:
        raise ValueError(reason(error)) from error


def from_json(data: bytes) -> Any:
    """Returns the value of a JSON text of any shape; ValueError says why it is none."""
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(reason(error)) from error


def reason(error: BaseException) -> str:
    """Returns what is wrong in a few words, the field first: "row_start: expected int >= 0"."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if not isinstance(error, msgspec.MsgspecError):
        return str(error)
    words, _, place = str(error).replace("`", "").partition(" - at ")
    if "matching regex" in words:
        words = "a text of another form than is written there"
    words = words[:1].lower() + words[1:]
    field = place.removeprefix("$").removeprefix(".")
    return f"{field}: {words}" if field else words
