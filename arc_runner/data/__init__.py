"""The embedded example, a tiny trained Qwen2 and ten puzzles: a run needs nothing but this package."""

from pathlib import Path

EXAMPLE_MODEL = Path(__file__).parent / "tiny-qwen2"
EXAMPLE_TASKS = Path(__file__).parent / "tasks.json"
