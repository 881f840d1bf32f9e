"""What hooks are called by readers and in messages."""

import pytest
from activation_fakes import HOOKS

from activation_store.hook_labels import hook_label, hooks_text, labelled_hook


def test_a_number_stands_for_the_output_of_a_block_alone():
    assert hook_label("blocks.12.hook_resid_post") == 12
    assert hook_label("blocks.12.hook_resid_pre") == "blocks.12.hook_resid_pre"
    assert [labelled_hook(hook_label(hook)) for hook in HOOKS] == list(HOOKS)
    with pytest.raises(ValueError, match="is not a hook name"):
        hook_label("12")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "layers none"),
        (["blocks.3.hook_resid_post"], "layers 3"),
        ([f"blocks.{layer}.hook_resid_post" for layer in (4, 5, 6)], "layers 4-6"),
        (["blocks.3.attn.hook_z", "blocks.1.attn.hook_z"], "attn.hook_z of layers 3, 1"),
        (
            ["ln_final.hook_normalized", "blocks.3.hook_resid_post", "blocks.3.mlp.hook_post"],
            "layers 3, ln_final.hook_normalized, mlp.hook_post of layer 3",
        ),
    ],
)
def test_hooks_are_named_by_point(names: list[str], text: str):
    assert hooks_text(names) == text
