"""A store whose answers are grids, right and wrong, for the tests of plots and of the page.

The prompts are of three puzzles in the embedded model's tokens. The rows are random; those of
the first token are a hundred times as long as the others, as in real models.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from activation_fakes import settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    SequenceId,
    StoreSettings,
    hook_name,
    sequence_key,
    write_outcomes,
)
from arc_puzzles import ArcTask, Augmentation, build_messages, create_grid_encoder, encode_prompt, load_tasks
from arc_runner.data import EXAMPLE_MODEL

ENCODER = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
VERSION = "output-from-examples-v0"
LAYERS = (10, 17, 23)
SINK = 100
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">"


# Each puzzle: its train pairs, then its test pair.
PUZZLES = {
    "mirror-beside": [
        (["000", "000", "201"], ["000000", "000000", "201102"]),
        (["0803", "3030"], ["08033080", "30300303"]),
        (["057", "555"], ["057750", "555555"]),
        (["9949", "4990", "9904"], ["99499499", "49900994", "99044099"]),
    ],
    "swap-colours": [
        (["201", "002"], ["102", "001"]),
        (["3306", "0333"], ["6603", "0666"]),
        (["0474", "4704"], ["0747", "7407"]),
    ],
    "turn-clockwise": [
        (["021", "123"], ["10", "22", "31"]),
        (["2209"], ["2", "2", "0", "9"]),
        (["1111", "1100", "5550"], ["511", "511", "501", "001"]),
    ],
}


def page_settings(**changes: Any) -> StoreSettings:
    return settings(
        hook_names=tuple(map(hook_name, LAYERS)),
        dtype="float32",
        max_output_tokens=200,
        prompt={"grid_encoder": str(ENCODER), "prompt_version": VERSION},
        **changes,
    )


def write_puzzles(path: Path) -> dict[str, ArcTask]:
    """Writes the puzzles as a data set and returns them by their ids."""

    def grid(rows: list[str]) -> list[list[int]]:
        return [[int(cell) for cell in row] for row in rows]

    pairs = {
        name: [{"input": grid(given), "output": grid(made)} for given, made in puzzle]
        for name, puzzle in PUZZLES.items()
    }
    path.write_text(
        json.dumps({name: {"train": all_[:-1], "test": all_[-1:]} for name, all_ in pairs.items()})
    )
    return {task.task_id: task for task in load_tasks(path).tasks}


def hostile_tokenizer(folder: Path) -> Any:
    """Saves the embedded tokenizer with one more token, which would be a script in a careless page."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    tokenizer.add_tokens([HOSTILE])
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_page_store(folder: Path, **changes: Any) -> ActivationStore:
    """Makes a store of three puzzles, one of them turned and with two samples; the store names its tokenizer.

    Of the first puzzle sample 0 is right and sample 1 has one wrong cell, the answer to the second has no
    grid but the hostile token, that to the third is a row too short.
    """
    of = page_settings(**changes)
    tokenizer = hostile_tokenizer(folder / "tokenizer")
    first, second, third = write_puzzles(folder / "tasks.json").values()
    turned = Augmentation.parse("rot90")
    right = turned.apply(first.test[0].output or ())
    spoilt = (((right[0][0] + 1) % 10, *right[0][1:]), *right[1:])
    short = (third.test[0].output or ())[:-1]
    made = [
        _sequence(of, tokenizer, first, ENCODER.encode(right), turned),
        _sequence(of, tokenizer, first, ENCODER.encode(spoilt), turned, sample=1),
        _sequence(of, tokenizer, second, f"I think {HOSTILE}"),
        _sequence(of, tokenizer, third, ENCODER.encode(short)),
    ]
    provenance = {"model_id": str(folder / "tokenizer"), "dataset": str(folder / "tasks.json")}
    with ActivationWriter(folder / "store", of, provenance=provenance) as writer:
        writer.submit(made[:3])
        writer.submit(made[3:])
    solved = {sequence_key(of, one.id): number == 0 for number, one in enumerate(made)}
    write_outcomes(folder / "store", solved)
    return ActivationStore(folder / "store")


def _sequence(
    of: StoreSettings,
    tokenizer: Any,
    task: ArcTask,
    answer: str,
    augmentation: Augmentation | None = None,
    sample: int = 0,
) -> FinishedSequence:
    asked = task if augmentation is None else task.augmented(augmentation)
    prompt = encode_prompt(tokenizer, build_messages(asked, 0, ENCODER, VERSION))
    tokens = np.array([*tokenizer.encode(answer), tokenizer.eos_token_id], np.int32)
    rng = np.random.default_rng(len(prompt) + sample)
    with_prompt = of.capture_prompt and sample == 0
    n_rows = len(tokens) + (len(prompt) if with_prompt else 0)
    rows = rng.standard_normal((len(LAYERS), n_rows, of.hidden_size)).astype(np.float32)
    if with_prompt:
        rows[:, 0] *= SINK
    return FinishedSequence(
        SequenceId(task.task_id, 0, sample, str(augmentation or Augmentation()), prompt),
        tokens,
        (-rng.exponential(0.4, len(tokens))).astype(np.float32),
        "stop",
        rows,
    )
