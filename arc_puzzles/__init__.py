"""ARC-AGI puzzles: load tasks, ask a model about them, read its answers, score them.

    >>> loaded = load_tasks("training.json")  # .tasks, and .failures: malformed tasks with their reasons
    >>> task = loaded.tasks[0]
    >>> encoder = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")

    >>> turned = Augmentation.parse("rot90")
    >>> messages = build_messages(task.augmented(turned), 0, encoder, "output-from-examples-v0")
    >>> prompt = encode_prompt(tokenizer, messages)  # int32 [n], laid out by the tokenizer's chat template

    >>> answer = parse_answer(text, encoder)  # None where the model's text holds no grid of this format
    >>> grid = None if answer is None else turned.inverse().apply(answer)
    >>> attempts = {(task.task_id, 0): [candidate.grid for candidate in vote([Prediction(grid, -3.2)])]}
    >>> submission = build_submission(loaded.outline, attempts)  # two attempts at every test
    >>> score({task.task_id: task.outputs}, attempts).tests_solved
    1

The prompt asks about the puzzle turned clockwise; the answer is turned back before it is counted.
"""

from arc_puzzles.augmentations import Augmentation, choose_augmentations
from arc_puzzles.chat import (
    PROMPT_VERSIONS,
    PromptVersion,
    build_messages,
    encode_prompt,
    encode_prompts,
    read_puzzle,
)
from arc_puzzles.data_sets import LoadedTasks, load_tasks
from arc_puzzles.grids import (
    ArcFormatError,
    Grid,
    GridCodeBlockEncoder,
    GridEncoder,
    GridShapeEncoder,
    GridWithSeparationEncoder,
    MinimalGridEncoder,
    RowNumberEncoder,
    create_grid_encoder,
    validate_grid,
)
from arc_puzzles.scoring import Score, Submission, build_submission, parse_answer, score
from arc_puzzles.tasks import ArcTask, Pair, TaskFailure
from arc_puzzles.voting import Candidate, Prediction, vote

__all__ = [
    "PROMPT_VERSIONS",
    "ArcFormatError",
    "ArcTask",
    "Augmentation",
    "Candidate",
    "Grid",
    "GridCodeBlockEncoder",
    "GridEncoder",
    "GridShapeEncoder",
    "GridWithSeparationEncoder",
    "LoadedTasks",
    "MinimalGridEncoder",
    "Pair",
    "Prediction",
    "PromptVersion",
    "RowNumberEncoder",
    "Score",
    "Submission",
    "TaskFailure",
    "build_messages",
    "build_submission",
    "choose_augmentations",
    "create_grid_encoder",
    "encode_prompt",
    "encode_prompts",
    "load_tasks",
    "parse_answer",
    "read_puzzle",
    "score",
    "validate_grid",
    "vote",
]
