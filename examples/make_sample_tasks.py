"""Write the embedded sample tasks: one of each rule the embedded model learns, and of two it never saw.

    python examples/make_sample_tasks.py            # writes arc_runner/data/tasks.json
    python examples/make_sample_tasks.py FILE

No input of a sample is one in training, in any orientation or colours (see tiny_model/puzzles.py). Grids are
written one pair a line.
"""

import argparse
from pathlib import Path

from tiny_model.puzzles import sample_tasks

from arc_puzzles import Pair
from arc_runner.data import EXAMPLE_TASKS


def write_pairs(pairs: tuple[Pair, ...]) -> str:
    """Returns a JSON list of pairs, one a line."""
    lines = (
        f'      {{"input": {list(map(list, pair.input))}, "output": {list(map(list, pair.output or ()))}}}'
        for pair in pairs
    )
    return "[\n" + ",\n".join(lines) + "\n    ]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the embedded sample tasks.")
    parser.add_argument("out", nargs="?", type=Path, default=EXAMPLE_TASKS)
    out = parser.parse_args().out
    tasks = []
    for task in sample_tasks():
        parts = f'    "train": {write_pairs(task.train)},\n    "test": {write_pairs(task.test)}'
        tasks.append(f'  "{task.task_id}": {{\n{parts}\n  }}')
    out.write_text("{\n" + ",\n".join(tasks) + "\n}\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
