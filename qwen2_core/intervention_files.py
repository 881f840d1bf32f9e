"""Interventions as the bytes of one safetensors file, which holds values only and can be read by anybody.

Its metadata has one entry, ``interventions``: a JSON list of what is done where, in order, such as

    [{"kind": "Add", "point": "hook_resid_post", "layers": [12], "positions": "generated", "strength": 4.0}]

``layers`` are numbers, true for all, or null for a point of the model. ``positions`` are "all", "prompt",
"generated" or a list. AblateHeads has ``heads``, and no point. The arrays of the first are the tensors
``0.vector`` and so on, with the names and shapes that ``interventions`` gives them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np
import safetensors.numpy

from qwen2_core.interventions import INTERVENTIONS, Custom, Intervention, as_list

_ENTRY = "interventions"
_KINDS = {kind.__name__: kind for kind in INTERVENTIONS if kind is not Custom}
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """The form of one intervention in the metadata."""

    kind: str
    layers: list[_Index] | bool | None
    point: str | msgspec.UnsetType = msgspec.UNSET
    positions: str | list[_Index] = "all"
    strength: Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)] = 1.0
    heads: list[_Index] | msgspec.UnsetType = msgspec.UNSET


def encode_interventions(interventions: Any) -> bytes:
    """Returns the file of one intervention or several; the same ones give the same bytes.

    Raises:
        ValueError: something is no intervention, there is none, or one cannot be kept: a function is code and
            no value, and strengths of single rows are for those who ask for the rows.
    """
    entries, tensors = [], {}
    for number, one in enumerate(as_list(interventions)):
        name = type(one).__name__
        if isinstance(one, Custom):
            raise ValueError("Custom cannot be written to a file: it is a function, and a file holds values.")
        if np.ndim(one.strength):
            raise ValueError(
                f"{name}.strength must be one number in a file, not one for each row: give each request "
                "its own."
            )
        static, arrays = _fields(type(one))
        entry = {field: _json_value(getattr(one, field)) for field in static}
        entries.append({"kind": name, "strength": float(one.strength)} | entry)
        for field in arrays:
            tensors[f"{number}.{field}"] = np.array(_float32(getattr(one, field)), order="C")
    if not entries:
        raise ValueError("There are no interventions to write.")
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return safetensors.numpy.save(tensors, {_ENTRY: text})


def decode_interventions(data: bytes, where: str) -> list[Intervention]:
    """Returns the interventions of a file, whose values ``steer`` compares with a model.

    Args:
        data: the file's bytes, from wherever.
        where: its name, for errors.

    Raises:
        ValueError: one sentence that says where it is not such a file.
    """
    try:
        tensors = {name: _tensor(name, one) for name, one in safetensors.deserialize(data)}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header.get("__metadata__", {}).get(_ENTRY)
        if text is None:
            raise ValueError(f"its metadata has no entry {_ENTRY!r}")
        entries = msgspec.json.decode(text, type=list[_Entry])
        found = [_intervention(number, entry, tensors) for number, entry in enumerate(entries)]
        if not found:
            raise ValueError("it has none")
        if tensors:
            raise ValueError(f"tensor {min(tensors)!r} belongs to none of them")
    except (ValueError, TypeError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where} is no file of interventions: {reason}") from error
    return found


def _tensor(name: str, one: dict[str, Any]) -> np.ndarray:
    """Returns a tensor as the safetensors library gives it."""
    if one["dtype"] not in _DTYPES:
        raise ValueError(f"tensor {name!r} is {one['dtype']}, not one of {', '.join(_DTYPES)}")
    return _float32(np.frombuffer(one["data"], _DTYPES[one["dtype"]]).reshape(one["shape"]))


def _intervention(number: int, entry: _Entry, tensors: dict[str, np.ndarray]) -> Intervention:
    """Returns an intervention, and takes its arrays out of ``tensors``."""
    kind: Any = _KINDS.get(entry.kind)
    if kind is None:
        raise ValueError(f"{entry.kind!r} is none of {', '.join(_KINDS)}")
    static, arrays = _fields(kind)
    given = {
        name: value for name, value in msgspec.structs.asdict(entry).items() if value is not msgspec.UNSET
    }
    if odd := (given.keys() - {"kind", "strength"}) ^ set(static):
        raise ValueError(f"{entry.kind} has, or lacks, {', '.join(sorted(odd))}")
    values = {name: tensors.pop(key) for name in arrays if (key := f"{number}.{name}") in tensors}
    missing = [
        field.name for field in dataclasses.fields(kind) if _is_required(field) and field.name in arrays
    ]
    if lacking := [f"{number}.{name}" for name in missing if name not in values]:
        raise ValueError(f"tensor {lacking[0]!r} is missing")
    del given["kind"]
    return kind(**given, **values)


def _fields(kind: Any) -> tuple[list[str], list[str]]:
    """Returns the fields that say what is done where, but for the strength, and those that are arrays."""
    fields = [field for field in dataclasses.fields(kind) if field.name != "strength"]
    static = [field.name for field in fields if field.metadata.get("static")]
    return static, [field.name for field in fields if field.name not in static]


def _is_required(field: Any) -> bool:
    return field.default is dataclasses.MISSING


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    return [int(one) for one in value] if isinstance(value, Iterable) else [int(value)]


def _float32(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise ValueError(f"values are {array.dtype}, not numbers")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("values are not finite")
    return array
