"""The chat that puts a puzzle to a model, and its token ids.

A prompt is its messages (`build_messages`) laid out by the tokenizer's chat template (`encode_prompt`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arc_puzzles.grids import Grid, GridEncoder
from arc_puzzles.scoring import parse_answer
from arc_puzzles.tasks import ArcTask, Pair
from arc_puzzles.thinking import takes_enable_thinking


@dataclass(frozen=True)
class PromptVersion:
    """Holds the words before a puzzle: the system message, and what the user says before the examples."""

    system: str
    introduction: str


# A store's manifest names the version: add one, never edit one. The headings between grids are the same in
# all of them (`build_messages`).
PROMPT_VERSIONS = {
    "output-from-examples-v0": PromptVersion(
        system="You solve puzzles on coloured grids. Answer with the output grid only.",
        introduction="Find the rule that turns each input into its output, and apply it to the test input.",
    ),
    "output-from-examples-v1": PromptVersion(
        system=(
            "You solve puzzles on coloured grids. You look for the one rule that explains every example, you "
            "apply it exactly, and you answer with the output grid only."
        ),
        introduction=(
            "A grid is a rectangle of cells. Every cell is a digit from 0 to 9 that stands for a colour; 0 "
            "is usually the background. A grid has between 1 and 30 rows and between 1 and 30 columns.\n\n"
            "Each example below shows an input grid and the output grid that a hidden rule makes of it. The "
            "rule is the same in all of them. It may move, turn, copy, recolour, count or complete shapes, "
            "and the output may have another shape than the input.\n\n"
            "Find the rule, check it against every example, and apply it to the test input. Write the output "
            "grid in exactly the format of the grids below, and nothing else."
        ),
    ),
}


def build_messages(
    task: ArcTask, test_index: int, encoder: GridEncoder, prompt_version: str
) -> list[dict[str, str]]:
    """Returns the chat that asks for the output of one test: a system message and a user message.

    It holds all train pairs and the test input, whatever their size, and never the test's output. Raises
    ValueError for an unknown prompt version or a test that the task does not have.
    """
    if prompt_version not in PROMPT_VERSIONS:
        raise ValueError(f"unknown prompt version {prompt_version!r}; known are {', '.join(PROMPT_VERSIONS)}")
    if not 0 <= test_index < len(task.test):
        raise ValueError(f"task {task.task_id} has {len(task.test)} tests, there is no test {test_index}")
    version = PROMPT_VERSIONS[prompt_version]
    parts = [version.introduction]
    for number, pair in enumerate(task.train, start=1):
        assert pair.output is not None
        parts.append(f"### Example {number}")
        parts.append(f"Input:\n{encoder.encode(pair.input)}")
        parts.append(f"Output:\n{encoder.encode(pair.output)}")
    parts.append("### Test")
    parts.append(f"Input:\n{encoder.encode(task.test[test_index].input)}")
    return [
        {"role": "system", "content": version.system},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


def read_puzzle(text: str, encoder: GridEncoder) -> tuple[tuple[Pair, ...], Grid] | None:
    """Returns the train pairs and the test input in the text of a prompt, special tokens left out.

    None where the text is not of the form that `build_messages` gives, or its grids are of another encoder.
    """
    before, *parts = re.split(r"^### (?:Example [0-9]+|Test)\n", text, flags=re.MULTILINE)
    *examples, test = parts or [before]
    question = test.partition("Input:\n")[2]
    halves = [example.partition("\n\nOutput:\n") for example in examples]
    inputs = [parse_answer(half.partition("Input:\n")[2], encoder) for half, _, _ in halves]
    outputs = [parse_answer(half.rstrip("\n"), encoder) for _, _, half in halves]
    asked = parse_answer(question, encoder)
    if asked is None or not examples or None in inputs or None in outputs:
        return None
    return tuple(Pair(given, made) for given, made in zip(inputs, outputs, strict=True) if given), asked


def encode_prompt(
    tokenizer: Any, messages: list[dict[str, str]], enable_thinking: bool | None = None
) -> np.ndarray:
    """Returns the token ids, int32 `[n]`, of the chat and of the opening of the assistant's turn.

    `tokenizer` is one of Hugging Face's; its chat template lays out the messages and opens the turn.
    `enable_thinking` is for templates that take it, as Qwen3's; None leaves it to the template.
    Raises ValueError if the tokenizer has no chat template, or one that does not take `enable_thinking`.
    """
    return encode_prompts(tokenizer, [messages], enable_thinking)[0]


def encode_prompts(
    tokenizer: Any, chats: Sequence[list[dict[str, str]]], enable_thinking: bool | None = None
) -> list[np.ndarray]:
    """Returns what `encode_prompt` returns for each chat, on all cores where the tokenizer has threads.

    Takes memory for all of them at once, about 100 bytes a token. Raises ValueError as `encode_prompt` does.
    """
    if not chats:
        return []
    _check_template(tokenizer)
    choice = {}
    if enable_thinking is not None:
        check_thinking(tokenizer)
        choice = {"enable_thinking": enable_thinking}
    texts = tokenizer.apply_chat_template(list(chats), add_generation_prompt=True, tokenize=False, **choice)
    # As `apply_chat_template` calls the tokenizer itself: the template has written the special tokens.
    ids = tokenizer(
        texts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False
    )
    return [np.asarray(one, np.int32) for one in ids["input_ids"]]


def check_thinking(tokenizer: Any) -> None:
    """Raises ValueError unless the tokenizer's chat template takes `enable_thinking`."""
    if not takes_enable_thinking(tokenizer):
        raise ValueError(
            f"the chat template of the tokenizer {tokenizer.name_or_path!r} does not take enable_thinking, "
            "which is for models such as Qwen3; leave it out"
        )


def _check_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path
        raise ValueError(
            f"the tokenizer {name!r} has no chat template; use the tokenizer of a chat model, or give "
            'prompts of your own as "text"'
        )
