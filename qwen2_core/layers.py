"""The layers that are captured where nobody names others. Imports nothing: a command's help names them."""

FIXED_EXTRACT_LAYERS = tuple(range(10, 24))


def missing_defaults(layers: object, depth: int) -> str:
    """Returns a sentence where ``layers`` are these, and a model of so many layers lacks some; else ""."""
    first, *_, last = FIXED_EXTRACT_LAYERS
    if layers != FIXED_EXTRACT_LAYERS or depth > last:
        return ""
    return (
        f"by default the layers {first} to {last} are captured, and this model has {depth}, 0 to "
        f"{depth - 1}: name those that you want."
    )
