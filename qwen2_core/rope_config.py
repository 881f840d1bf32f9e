"""Reads ``rope_scaling`` (Transformers 4) or ``rope_parameters`` (5) of a Hugging Face config.

What Transformers passes over with a warning, such as a name that the type does not know, is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from qwen2_core.errors import CheckpointError
from qwen2_core.messages import shown
from qwen2_core.rope import Dynamic, Linear, Llama3, LongRope, Proportional, RopeScaling, Yarn

_MOST = 1e6  # the largest factor that is believed
_MOST_POSITIONS = 1 << 30
_ORIGINAL = "original_max_position_embeddings"
_OF_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_NAMES = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "proportional": {"factor"},
}
_WITH_ORIGINAL = ("yarn", "llama3", "longrope")  # the others have max_position_embeddings


def rope_settings(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the RoPE settings of a config as one mapping: those of ``rope_scaling``, if any, come first.

    What stands beside them, as older configs have it, is added as Transformers does it.
    """
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = hf.get(name)
        if given is not None and not isinstance(given, Mapping):
            raise CheckpointError(f"{name} must be an object, not {shown(given)}.")
        if given and not rope:
            rope = dict(given)
    if "rope_theta" in hf:
        rope.setdefault("rope_theta", hf["rope_theta"])
    if hf.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", hf["partial_rotary_factor"])
    if _ORIGINAL in hf and _type_of(rope) in _WITH_ORIGINAL:
        rope[_ORIGINAL] = hf[_ORIGINAL]
    return rope


def read_rope_scaling(rope: Mapping[str, Any], max_position_embeddings: int) -> RopeScaling | None:
    """Returns the scaling that RoPE settings ask for; None for RoPE as it was published.

    Args:
        rope: settings by their names in Transformers.
        max_position_embeddings: of the model.

    Raises:
        CheckpointError: a type, a name or a value that is not one of Transformers' for Qwen2.
    """
    kind = _type_of(rope)
    if "full_attention" in rope or "sliding_attention" in rope:
        raise CheckpointError("RoPE of its own for each kind of layer is not implemented.")
    if not isinstance(kind, str) or kind not in _NAMES:
        raise CheckpointError(f"RoPE of type {shown(kind)} is not one of {', '.join(_NAMES)}.")
    known = _OF_ALL | _NAMES[kind] | ({_ORIGINAL} if kind in _WITH_ORIGINAL else set())
    unknown = sorted(shown(name) for name in rope if name not in known)
    if unknown:
        raise CheckpointError(
            f"RoPE of type {kind!r} has no {', '.join(unknown)}. Name another rope_type, or remove it."
        )
    if kind == "default":  # Qwen2 passes over partial_rotary_factor here
        return None
    settings = _Settings(kind, rope, max_position_embeddings)
    partial = settings.number("partial_rotary_factor", 1.0, least=0.0, most=1.0)
    if kind == "proportional":
        return Proportional(
            original_max_position_embeddings=max_position_embeddings,
            factor=settings.number("factor", 1.0),
            partial_rotary_factor=partial,
        )
    if partial != 1:
        raise CheckpointError(f"partial_rotary_factor is not implemented with RoPE of type {kind!r}.")
    return _READERS[kind](settings)


def _type_of(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


class _Settings:
    """The settings of one type, checked as they are read. Null is as if they were not there."""

    def __init__(self, kind: str, rope: Mapping[str, Any], max_position_embeddings: int):
        self._kind, self._rope = kind, rope
        self.max_positions = max_position_embeddings

    def names(self, name: str) -> bool:
        return name in self._rope

    def given(self, name: str, default: Any = None) -> Any:
        value = self._rope.get(name)
        return default if value is None else value

    def required(self, name: str) -> Any:
        value = self.given(name)
        if value is None:
            raise CheckpointError(f"RoPE of type {self._kind!r} needs {name}.")
        return value

    def number(
        self, name: str, default: float | None = None, least: float = 1.0, most: float = _MOST
    ) -> float:
        value = self.required(name) if default is None else self.given(name, default)
        if type(value) not in (int, float) or not least <= value <= most:
            raise CheckpointError(
                f"{name} of RoPE must be a number from {least:g} to {most:g}, not {shown(value)}."
            )
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self.required(name)
        if not isinstance(values, list | tuple) or not all(
            type(value) in (int, float) and 0 < value <= _MOST for value in values
        ):
            raise CheckpointError(f"{name} of RoPE must be a list of positive numbers, not {shown(values)}.")
        return tuple(map(float, values))

    def original(self) -> int:
        value = self.given(_ORIGINAL, self.max_positions)
        if type(value) is not int or not 2 <= value <= _MOST_POSITIONS:
            raise CheckpointError(
                f"{_ORIGINAL} of RoPE must be an integer from 2 to {_MOST_POSITIONS}, not {shown(value)}."
            )
        return value

    def factor_or_ratio(self) -> float:
        """Returns the factor, or how much longer the model's context is than the original one."""
        ratio = self.max_positions / self.original()
        return self.number("factor", ratio, least=min(1.0, ratio))


def _linear(of: _Settings) -> RopeScaling:
    return Linear(original_max_position_embeddings=of.max_positions, factor=of.number("factor"))


def _dynamic(of: _Settings) -> RopeScaling:
    return Dynamic(original_max_position_embeddings=of.max_positions, factor=of.number("factor"))


def _yarn(of: _Settings) -> RopeScaling:
    if not of.names("factor"):  # null is a value here: the ratio
        of.required("factor")
    factor = of.factor_or_ratio()
    scale, scale_all = (of.number(name, 0.0, least=0.0) for name in ("mscale", "mscale_all_dim"))
    attention = (
        _mscale(factor, scale) / _mscale(factor, scale_all) if scale and scale_all else _mscale(factor)
    )
    # Zero is as if it were not there, too.
    fast, slow = (
        of.number(name, 0.0, least=0.0) or usual for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if fast < slow:
        raise CheckpointError(f"beta_fast of RoPE must be at least beta_slow, not {fast:g} and {slow:g}.")
    truncate = of.given("truncate", True)
    if not isinstance(truncate, bool):
        raise CheckpointError(f"truncate of RoPE must be true or false, not {shown(truncate)}.")
    return Yarn(
        original_max_position_embeddings=of.original(),
        factor=factor,
        attention_factor=of.number("attention_factor", attention, least=1e-6),
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
    )


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(of: _Settings) -> RopeScaling:
    low, high = (of.number(name, least=1e-6) for name in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise CheckpointError(
            f"high_freq_factor of RoPE must be above low_freq_factor, not {high:g} and {low:g}."
        )
    return Llama3(
        original_max_position_embeddings=of.original(),
        factor=of.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _longrope(of: _Settings) -> RopeScaling:
    original, factor = of.original(), of.factor_or_ratio()
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRope(
        original_max_position_embeddings=original,
        factor=factor,
        attention_factor=of.number("attention_factor", attention, least=1e-6),
        short_factor=of.numbers("short_factor"),
        long_factor=of.numbers("long_factor"),
    )


_READERS: dict[str, Callable[[_Settings], RopeScaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
