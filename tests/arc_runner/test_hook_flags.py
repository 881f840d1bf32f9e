"""The words of --hook_points, and back again."""

from __future__ import annotations

import pytest

from arc_runner.command_line import parse_options
from arc_runner.errors import UsageError
from arc_runner.hook_flags import beyond, points_of, words_of

Z10, Z11, Z14 = (f"blocks.{layer}.attn.hook_z" for layer in (10, 11, 14))
FINAL = "ln_final.hook_normalized"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["attn.hook_z:10"], [Z10]),
        (["attn.hook_z:14,10-11"], [Z10, Z11, Z14]),
        (["blocks.10.attn.hook_z"], [Z10]),
        (
            ["ln_final.hook_normalized,attn.hook_z:10,14", "hook_resid_pre:3"],
            ["blocks.3.hook_resid_pre", Z10, Z14, FINAL],
        ),
        (["attn.hook_z:10,", "attn.hook_z:11"], [Z10, Z11]),
    ],
)  # fmt: skip
def test_words_name_points_in_the_order_of_computation(words: list[str], names: list[str]):
    found = parse_options(["--hook_points", *words]).hook_points
    assert list(found) == names
    assert parse_options(["--hook_points", *words_of(found)]).hook_points == found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("attn.hook_x:3", "there is no hook point 'attn.hook_x'"),
        ("blocks.x.attn.hook_z", "'blocks.x.attn.hook_z' is not a hook name, such as blocks.10."),
        ("attn.hook_z", "attn.hook_z needs layers: write attn.hook_z:10 or attn.hook_z:10-12"),
        ("attn.hook_z:12-10", "attn.hook_z:12-10 does not name layers as 10, 10,12 or 10-12"),
        ("attn.hook_z:", "attn.hook_z: does not name layers"),
        ("attn.hook_z:10 blocks.10.attn.hook_z", "blocks.10.attn.hook_z is named twice"),
        ("hook_resid_post:3", "the layers of hook_resid_post are --layers_to_extract"),
        ("blocks.3.hook_resid_post", "the layers of hook_resid_post are --layers_to_extract"),
        ("ln_final.hook_normalized:3", "ln_final.hook_normalized has no layer"),
        (",", "it names no point"),
    ],
)
def test_what_names_no_point_is_refused_in_a_sentence(words: str, sentence: str):
    with pytest.raises(UsageError) as refused:
        parse_options(["--hook_points", *words.split()])
    assert f"--hook_points: {sentence}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_is_asked_for_layers_by_point():
    assert points_of([Z10, Z14, FINAL]) == {"attn.hook_z": [10, 14], FINAL: True}


def test_layers_that_the_model_does_not_have_are_found():
    assert beyond([Z10, Z11, Z14, FINAL], 11) == [Z11, Z14]
