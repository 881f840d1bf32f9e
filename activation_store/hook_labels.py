"""What hooks are called: by readers, for whom a number is the output of that block, and in messages."""

from collections.abc import Sequence

from qwen2_core.hook_points import RESID_POST, full_name, parse_name


def hook_label(name: str) -> int | str:
    """Returns what a reader calls a hook: the layer's number for a block's output, else the name as it is.

    Raises:
        ValueError: it is no hook's name.
    """
    point, layer = parse_name(name)
    return name if layer is None or point != RESID_POST else layer


def labelled_hook(label: int | str) -> str:
    """Returns the name of the hook that `hook_label` calls so."""
    return full_name(RESID_POST, label) if isinstance(label, int) else label


def layers_text(layers: Sequence[int | str | None]) -> str:
    """Returns layers in a few words: `layers_text([10, 11, 12]) == "10-12"`, else "0, 5, 12" or "none"."""
    first = layers[0] if layers else None
    if isinstance(first, int) and len(layers) > 2 and list(layers) == list(range(first, first + len(layers))):
        return f"{first}-{layers[-1]}"
    return ", ".join(map(str, layers)) or "none"


def hooks_text(names: Sequence[str]) -> str:
    """Returns hooks in a few words: "layers 10-12", "layers 10-12, attn.hook_z of layers 10, 11"."""
    of_points: dict[str, list[int | None]] = {RESID_POST: []}
    for name in names:
        point, layer = parse_name(name)
        of_points.setdefault(point, []).append(layer)
    layers = of_points.pop(RESID_POST)
    words = [f"layers {layers_text(layers)}"] if layers or not of_points else []
    for point, of_point in of_points.items():
        layer = f"layer{'s' * (len(of_point) > 1)}"
        words.append(point if None in of_point else f"{point} of {layer} {layers_text(of_point)}")
    return ", ".join(words)
