"""Names the places in the model whose values can be read and written, as TransformerLens does.

Of layer l the full name is ``blocks.{l}.<point>``. In the order of computation:

======================  ====================================================  =========================
point                   what                                                  width
======================  ====================================================  =========================
hook_resid_pre          the residual stream before the block                  hidden
ln1.hook_normalized     that over its root mean square, before the weight     hidden
attn.hook_q             queries as projected, with their bias                 heads * head_dim
attn.hook_k             keys as projected, with their bias                    kv_heads * head_dim
attn.hook_v             values as projected, with their bias                  kv_heads * head_dim
attn.hook_z             each head's weighted sum of values                    heads * head_dim
hook_attn_out           what attention adds                                   hidden
hook_resid_mid          the residual stream after that                        hidden
ln2.hook_normalized     that over its root mean square, before the weight     hidden
mlp.hook_post           silu(gate) * up, the input of the down projection     intermediate
hook_mlp_out            what the MLP adds                                     hidden
hook_resid_post         the residual stream after the block                   hidden
======================  ====================================================  =========================

Queries and keys are those before RoPE and, in Qwen3, before the norm of each head. Biases are Qwen2's; Qwen3
has none. ``ln_final.hook_normalized`` (hidden) is the model's own: it has no layer. Values are flat in their
last axis: heads lie end to end.
"""

from __future__ import annotations

import re
from typing import Any

RESID_POST = "hook_resid_post"
HEAD_OUTPUTS = "attn.hook_z"
LN_FINAL = "ln_final.hook_normalized"
_POINTS = (
    "hook_resid_pre",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    HEAD_OUTPUTS,
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_normalized",
    "mlp.hook_post",
    "hook_mlp_out",
    RESID_POST,
    LN_FINAL,
)
# No other digits, no second spelling of a number.
_IN_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,8})\.(.+)")


def point_names() -> tuple[str, ...]:
    """Returns the names of all points, without layers, in the order of computation."""
    return _POINTS


def check_point(name: Any) -> str:
    """Returns the name of a point, without a layer; raises ValueError where there is no such point."""
    if name not in _POINTS:
        raise ValueError(f"there is no hook point {name!r}; there are {', '.join(_POINTS)}")
    return name


def full_name(point: str, layer: int | None) -> str:
    """Returns ``full_name("attn.hook_z", 10) == "blocks.10.attn.hook_z"``; the final norm's has no layer.

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
    if point not in _POINTS or (layer is None) != (point == LN_FINAL):
        raise ValueError(
            f"{name!r} is not a hook name, such as blocks.10.{RESID_POST} or {LN_FINAL}; points of a layer "
            f"are {', '.join(one for one in _POINTS if one != LN_FINAL)}"
        )
    return point, layer


def width_of(point: str, config: Any) -> int:
    """Returns how many values a point has for each token; ``config`` is a ``QwenConfig``.

    Raises:
        ValueError: there is no such point.
    """
    match check_point(point):
        case "attn.hook_q" | "attn.hook_z":
            return config.num_attention_heads * config.head_dim
        case "attn.hook_k" | "attn.hook_v":
            return config.num_key_value_heads * config.head_dim
        case "mlp.hook_post":
            return config.intermediate_size
        case _:
            return config.hidden_size
