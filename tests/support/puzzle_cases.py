"""Grids, encoders, a small task and a check of its prompts, for the tests of arc_puzzles."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from arc_puzzles import ArcTask, GridEncoder, Pair, build_messages, create_grid_encoder

small_grids = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(*[st.tuples(*[st.integers(0, 9)] * shape[1])] * shape[0])
)

ENCODER_NAMES = [
    "MinimalGridEncoder()",
    "GridWithSeparationEncoder('|')",
    "RowNumberEncoder(MinimalGridEncoder())",
    "GridCodeBlockEncoder(MinimalGridEncoder())",
    "GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))",
]
SHAPE = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
MINIMAL = create_grid_encoder("MinimalGridEncoder()")
NUMBERED = create_grid_encoder("RowNumberEncoder(MinimalGridEncoder())")

GOOD: dict[str, Any] = {
    "train": [{"input": [[1, 2]], "output": [[2, 1]]}],
    "test": [{"input": [[3, 4]], "output": [[4, 3]]}, {"input": [[5]]}],
}
GOOD_TASK = ArcTask(
    "good",
    train=(Pair(((1, 2),), ((2, 1),)),),
    test=(Pair(((3, 4),), ((4, 3),)), Pair(((5,),), None)),
)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def without_test_outputs(task: ArcTask) -> ArcTask:
    """Returns the task with its test outputs unknown."""
    return ArcTask(task.task_id, task.train, tuple(Pair(pair.input, None) for pair in task.test))


def check_prompts(task: ArcTask, encoder: GridEncoder, prompt_version: str) -> None:
    """Asserts that each prompt holds all train pairs and the test input in order, and no test output."""
    for test_index, test in enumerate(task.test):
        messages = build_messages(task, test_index, encoder, prompt_version)
        assert [message["role"] for message in messages] == ["system", "user"]
        text = messages[-1]["content"]
        position = 0
        for number, pair in enumerate(task.train, start=1):
            assert pair.output is not None
            example = (
                f"### Example {number}\n\nInput:\n{encoder.encode(pair.input)}\n\n"
                f"Output:\n{encoder.encode(pair.output)}\n\n"
            )
            assert example in text[position:]
            position = text.index(example, position) + len(example)
        assert text[position:] == f"### Test\n\nInput:\n{encoder.encode(test.input)}"
        assert messages == build_messages(without_test_outputs(task), test_index, encoder, prompt_version)
