"""The words of ``--hook_points``: ``attn.hook_z:10,12-14``, ``blocks.12.hook_resid_mid``, and back again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qwen2_core.hook_points import LN_FINAL, RESID_POST, full_name, parse_name, point_names

_LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def names_of(words: Iterable[str]) -> tuple[str, ...]:
    """Returns the full names of points and layers, in the order of computation.

    A word is a full name, or a point, a colon and layers. Commas part words, and layers too.

    Raises:
        ValueError: one sentence, for a word that is neither, and for a point that is named twice.
    """
    names: list[str] = []
    for word in words:
        point = None
        for part in filter(None, (part.strip() for part in word.split(","))):
            if point is None or not _LAYERS.fullmatch(part):
                point, colon, layers = part.partition(":")
                if not colon:
                    names.append(_full(point))
                    point = None
                    continue
                part = layers
            names += [full_name(_in_block(point), layer) for layer in _layers(point, part)]
    if not names:
        raise ValueError("it names no point")
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    return tuple(sorted(names, key=_place))


def words_of(names: Iterable[str]) -> list[str]:
    """Returns words that ``names_of`` turns into these names, a point each."""
    layers: dict[str, list[str]] = {}
    for name in names:
        point, layer = parse_name(name)
        layers.setdefault(point, []).extend([] if layer is None else [str(layer)])
    return [f"{point}:{','.join(of_point)}" if of_point else point for point, of_point in layers.items()]


def points_of(names: Iterable[str]) -> dict[str, Any]:
    """Returns layers by point, as ``create_model_with_hooks`` takes them."""
    points: dict[str, Any] = {}
    for name in names:
        point, layer = parse_name(name)
        if layer is None:
            points[point] = True
        else:
            points.setdefault(point, []).append(layer)
    return points


def beyond(names: Sequence[str], depth: int) -> list[str]:
    """Returns the names whose layer a model with so many layers does not have."""
    return [name for name in names if (parse_name(name)[1] or 0) >= depth]


def _full(name: str) -> str:
    if name in point_names() and name != LN_FINAL:
        _in_block(name)
        raise ValueError(f"{name} needs layers: write {name}:10 or {name}:10-12")
    _in_block(parse_name(name)[0])
    return name


def _in_block(point: str) -> str:
    if point == RESID_POST:
        raise ValueError(f"the layers of {RESID_POST} are --layers_to_extract")
    return point


def _layers(point: str, text: str) -> Iterator[int]:
    found = _LAYERS.fullmatch(text)
    if not found or int(found[1]) > int(found[2] or found[1]):
        raise ValueError(f"{point}:{text} does not name layers as 10, 10,12 or 10-12")
    yield from range(int(found[1]), int(found[2] or found[1]) + 1)


def _place(name: str) -> tuple[int, int]:
    point, layer = parse_name(name)
    return point_names().index(point), layer or 0
