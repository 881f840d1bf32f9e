"""The points of the model whose values can be read and written: their names, as TransformerLens', and widths.

A point of decoder block l has the full name `blocks.{l}.<point>`; the one after the last block has no layer.
The values of a point are rows, flat in their last axis: heads lie end to end.
"""

import re
from typing import Any, Protocol, runtime_checkable

RESID_POST = "hook_resid_post"
HEAD_OUTPUTS = "attn.hook_z"
LN_FINAL = "ln_final.hook_normalized"
_WIDTHS = {  # the field of `Sizes` that a row is as wide as
    "hook_resid_pre": "hidden",  # the residual stream before the block
    "hook_resid_mid": "hidden",  # ... after attention's addition
    RESID_POST: "hidden",  # ... after the block
    "hook_attn_out": "hidden",  # what attention adds
    "hook_mlp_out": "hidden",  # what the MLP adds
    "mlp.hook_post": "intermediate",  # silu(gate) * up, the input of down_proj
    "attn.hook_q": "heads",  # with bias, before RoPE
    "attn.hook_k": "kv_heads",  # with bias, before RoPE
    "attn.hook_v": "kv_heads",  # with bias
    HEAD_OUTPUTS: "heads",  # each head's weighted sum of values, the input of o_proj
    "ln1.hook_normalized": "hidden",  # x / rms(x), before the norm's weight
    "ln2.hook_normalized": "hidden",
    LN_FINAL: "hidden",
}
# No other digits, no second spelling of a number.
_IN_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,8})\.(.+)")


@runtime_checkable
class Sizes(Protocol):
    """What a model's configuration says of its widths."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


def point_names() -> tuple[str, ...]:
    """Returns the names of all points, without layers."""
    return tuple(_WIDTHS)


def check_point(name: Any) -> str:
    """Returns the name of a point, without a layer; raises ValueError where there is no such point."""
    if name not in _WIDTHS:
        raise ValueError(f"there is no point {name!r}; there are {', '.join(_WIDTHS)}")
    return name


def full_name(point: str, layer: int | None) -> str:
    """Returns `full_name("attn.hook_z", 10) == "blocks.10.attn.hook_z"`; the final norm's point has no layer.

    Raises:
        ValueError: there is no such point, or it has a layer where it needs none, or none where it needs one.
    """
    if (layer is None) != (check_point(point) == LN_FINAL):
        raise ValueError(f"{point} has {'no layer' if layer is not None else 'one of each layer: name it'}")
    return point if layer is None else f"blocks.{layer}.{point}"


def parse_name(name: str) -> tuple[str, int | None]:
    """Returns the point and the layer of a full name; raises ValueError for any other text."""
    match = _IN_BLOCK.fullmatch(name)
    point, layer = (name, None) if match is None else (match.group(2), int(match.group(1)))
    if point not in _WIDTHS or (layer is None) != (point == LN_FINAL):
        raise ValueError(
            f"{name!r} is not a hook name, such as blocks.10.{RESID_POST} or {LN_FINAL}; points of a layer "
            f"are {', '.join(one for one in _WIDTHS if one != LN_FINAL)}"
        )
    return point, layer


def width_of(point: str, config: Sizes) -> int:
    """Returns how many values a row of a point has; KeyError where there is no such point."""
    return {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads * config.head_dim,
        "kv_heads": config.num_key_value_heads * config.head_dim,
    }[_WIDTHS[point]]
