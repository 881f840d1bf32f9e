"""Hook points: their names, and how wide they are."""

import pytest

from qwen2_core.config import QwenConfig
from qwen2_core.hook_points import LN_FINAL, full_name, parse_name, point_names, width_of


def test_every_point_has_one_full_name_that_says_all():
    names = {full_name(point, None if point == LN_FINAL else 10) for point in point_names()}
    assert len(names) == len(point_names()) == 13
    assert "blocks.10.attn.hook_z" in names
    for name in names:
        assert full_name(*parse_name(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "hook_resid_post",
        "blocks.hook_resid_post",
        "blocks.01.hook_resid_post",
        "blocks.-1.hook_resid_post",
        "blocks.1.hook_resid",
        "blocks.1.ln_final.hook_normalized",
        "blocks.1.hook_resid_post\n",
        "blocks.٣.hook_resid_post",
        "blocks.9999999999.hook_resid_post",
    ],
)
def test_other_names_are_refused(name: str):
    with pytest.raises(ValueError, match=r"is not a hook name, such as blocks\.10\.hook_resid_post"):
        parse_name(name)


@pytest.mark.parametrize(
    ("point", "layer", "message"),
    [
        ("hook_z", 1, "there is no hook point 'hook_z'; there are hook_resid_pre, "),
        ("attn.hook_z", None, "attn.hook_z has one of each layer: name it"),
        (LN_FINAL, 3, "ln_final.hook_normalized has no layer"),
    ],
)
def test_points_without_their_layer_and_layers_of_no_point_are_refused(point, layer, message: str):
    with pytest.raises(ValueError, match=message):
        full_name(point, layer)


def test_widths_are_those_of_the_model():
    config = QwenConfig()
    widths = {point: width_of(point, config) for point in point_names()}
    assert widths.pop("mlp.hook_post") == 4864
    assert widths.pop("attn.hook_k") == widths.pop("attn.hook_v") == 128
    assert set(widths.values()) == {896}
    narrow = QwenConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=1)
    assert width_of("attn.hook_q", narrow) == width_of("attn.hook_z", narrow) == 64
    assert width_of("attn.hook_v", narrow) == 16
    with pytest.raises(ValueError, match="there is no hook point"):
        width_of("hook_scale", config)
