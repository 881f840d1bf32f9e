"""The embedded example: a tiny random Qwen2 and six puzzles, so that a run needs nothing but this package."""

from pathlib import Path

EXAMPLE_MODEL = Path(__file__).parent / "tiny-qwen2"
EXAMPLE_TASKS = Path(__file__).parent / "tasks.json"
