"""Thinking: what of a text is the answer, and what a chat template is told."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from puzzle_cases import MINIMAL, SHAPE
from thinking_cases import ALWAYS, CHOICE, tokenizer_with
from transformers import AutoTokenizer

from arc_puzzles.chat import encode_prompt, encode_prompts
from arc_puzzles.prompt_files import encode_own
from arc_puzzles.scoring import parse_answer
from arc_puzzles.thinking import after_thinking, opens_thinking, takes_enable_thinking
from arc_runner.data import EXAMPLE_MODEL
from qwen2_core.chat_template import BoundedTokenizer

CHAT = [{"role": "user", "content": "Turn 12 around."}]
OPENING = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("text", "opened", "answer"),
    [
        ("21", False, "21"),
        ("<think>\n12? 21!\n</think>\n\n21", False, "\n\n21"),
        ("<think>\n\n</think>\n\n21", False, "\n\n21"),
        ("<think>\n12? 21!", False, None),
        ("<think>", False, None),
        ("<think>a</think>b<think>c</think>21", False, "21"),
        ("<think>a</think>21<think>or", False, None),
        ("12? 21!\n</think>\n21", True, "\n21"),
        ("12? 21!", True, None),
        ("", True, None),
        ("", False, ""),
        ("I think 21", False, "I think 21"),
    ],
)
def test_the_answer_is_what_follows_the_thinking(text: str, opened: bool, answer: str | None):
    assert after_thinking(text, opened) == answer


@pytest.mark.parametrize(
    ("text", "opened", "grid"),
    [
        ("<think>\n12\n</think>\n21", False, ((2, 1),)),
        ("<think>\n12\n</think>\nno idea", False, None),  # a grid that it thought of is no answer
        ("<think>\n12\n", False, None),
        ("12\n</think>\n21", True, ((2, 1),)),
        ("12\n", True, None),
        ("12\n", False, ((1, 2),)),
    ],
)
def test_a_grid_is_taken_from_after_the_thinking_alone(text: str, opened: bool, grid: Any):
    assert parse_answer(text, MINIMAL, opened) == grid
    block = text.replace("12", "```grid shape: 1x2\n1 12\n```").replace("21", "```grid shape: 1x2\n1 21\n```")
    assert parse_answer(block, SHAPE, opened) == grid


@pytest.mark.parametrize("bounded", [False, True], ids=["Transformers", "bounded"])
def test_a_template_is_told_only_what_somebody_chose(bounded: bool):
    tokenizer = tokenizer_with(CHOICE)
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(contextlib.closing(BoundedTokenizer(tokenizer))) if bounded else tokenizer
        prompts = {choice: encode_prompt(made, CHAT, choice) for choice in (None, True, False)}
        own = {choice: encode_own(made, [CHAT, "12"], choice) for choice in (None, True, False)}
    for choice, prompt in prompts.items():
        chosen = {} if choice is None else {"enable_thinking": choice}
        expected = tokenizer.apply_chat_template(
            CHAT, add_generation_prompt=True, return_dict=False, **chosen
        )
        assert prompt.tolist() == expected
        assert np.array_equal(own[choice][0], prompt)
        assert np.array_equal(own[choice][1], tokenizer.encode("12"))
    texts = {choice: tokenizer.decode(prompt) for choice, prompt in prompts.items()}
    assert texts[None] == texts[True]
    assert texts[True].endswith(OPENING)
    assert texts[False].endswith(OPENING + "<think>\n\n</think>\n\n")


def test_a_template_that_does_not_take_the_choice_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    for template, takes in ((tokenizer.chat_template, False), (ALWAYS, False), (CHOICE, True)):
        tokenizer.chat_template = template
        assert takes_enable_thinking(tokenizer) == takes
    tokenizer.chat_template = ALWAYS
    for choice in (True, False):
        with pytest.raises(ValueError, match="does not take enable_thinking, which is for models such as"):
            encode_prompts(tokenizer, [CHAT], choice)


@pytest.mark.parametrize(
    ("template", "choice", "opens"),
    [(ALWAYS, None, True), (CHOICE, None, False), (CHOICE, True, False), (CHOICE, False, False)],
)
def test_a_prompt_that_opens_the_thinking_is_seen(template: str, choice: bool | None, opens: bool):
    tokenizer = tokenizer_with(template)
    assert opens_thinking(tokenizer, encode_prompt(tokenizer, CHAT, choice)) == opens
