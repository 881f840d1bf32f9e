"""The layers that are captured where nobody names others. Imports nothing: a command's help names them."""

FIXED_EXTRACT_LAYERS = tuple(range(10, 24))
