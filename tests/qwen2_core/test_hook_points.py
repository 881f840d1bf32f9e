"""The names of hook points and the widths of their values."""

import pytest

from qwen2_core.config import QwenConfig
from qwen2_core.hook_points import LN_FINAL, full_name, parse_name, point_names, width_of

CONFIG = QwenConfig(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2)


@pytest.mark.parametrize("point", point_names())
def test_a_full_name_is_parsed_to_what_it_was_made_of(point: str):
    layer = None if point == LN_FINAL else 12
    assert parse_name(full_name(point, layer)) == (point, layer)
    with pytest.raises(ValueError, match="layer"):
        full_name(point, 12 if layer is None else None)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "attn.hook_z",
        "blocks.012.attn.hook_z",
        "blocks.-1.attn.hook_z",
        "blocks.1.attn.hook_zz",
        "blocks.1.attn.hook_z\n",
        "blocks.\N{ARABIC-INDIC DIGIT ONE}.attn.hook_z",
        "blocks.1000000000.attn.hook_z",
        "blocks.1.ln_final.hook_normalized",
        "blocks.1.",
        "12",
    ],
)
def test_what_is_no_full_name_is_refused(name: str):
    with pytest.raises(ValueError, match="is not a hook name"):
        parse_name(name)


def test_widths_are_those_of_the_model():
    widths = {point: width_of(point, CONFIG) for point in point_names()}
    assert widths.pop("mlp.hook_post") == 4864
    assert widths.pop("attn.hook_k") == widths.pop("attn.hook_v") == 128
    assert set(widths.values()) == {896}
