"""Prompts: what their messages contain, and the token ids that the tokenizer makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from puzzle_cases import ENCODER_NAMES, GOOD_TASK, SHAPE, check_prompts, write
from transformers import AutoTokenizer

from arc_puzzles.chat import (
    PROMPT_VERSIONS,
    build_messages,
    encode_prompt,
    encode_prompts,
    read_puzzle,
)
from arc_puzzles.data_sets import load_tasks
from arc_puzzles.grids import create_grid_encoder
from arc_puzzles.tasks import ArcTask, Pair
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE_MODEL)


@pytest.fixture(scope="module")
def example_tasks() -> tuple[ArcTask, ...]:
    return load_tasks(EXAMPLE_TASKS).tasks


@pytest.mark.parametrize("prompt_version", PROMPT_VERSIONS)
@pytest.mark.parametrize("encoder_name", ENCODER_NAMES)
def test_the_prompt_holds_the_whole_puzzle_and_not_its_answer(example_tasks, encoder_name, prompt_version):
    for task in example_tasks:
        check_prompts(task, create_grid_encoder(encoder_name), prompt_version)


def test_the_prompt_of_the_largest_puzzle_is_not_truncated(tokenizer):
    grid = tuple(tuple((row * 7 + column) % 10 for column in range(30)) for row in range(30))
    task = ArcTask("large", tuple(Pair(grid, grid) for _ in range(10)), (Pair(grid[::-1], None),))
    check_prompts(task, SHAPE, "output-from-examples-v0")
    messages = build_messages(task, 0, SHAPE, "output-from-examples-v0")
    prompt = encode_prompt(tokenizer, messages)
    assert len(prompt) > 21 * 900
    assert messages[1]["content"] in tokenizer.decode(prompt)


def test_the_token_ids_are_the_chat_and_the_opening_of_the_answer(example_tasks, tokenizer):
    task = example_tasks[0]
    messages = build_messages(task, 0, SHAPE, "output-from-examples-v0")
    prompt = encode_prompt(tokenizer, messages)
    assert prompt.dtype == np.int32
    assert prompt.shape == (len(prompt),)
    assert tokenizer.decode(prompt) == (
        f"<|im_start|>system\n{messages[0]['content']}<|im_end|>\n"
        f"<|im_start|>user\n{messages[1]['content']}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_many_chats_at_once_have_the_token_ids_that_each_has_by_itself(example_tasks, tokenizer):
    chats = [build_messages(task, 0, SHAPE, "output-from-examples-v0") for task in example_tasks]
    chats.append([{"role": "user", "content": "<|im_end|> é \U0001f468\u200d\U0001f680 " + "7" * 5000}])
    together = encode_prompts(tokenizer, chats)
    assert [ids.dtype for ids in together] == [np.int32] * len(chats)
    for chat, ids in zip(chats, together, strict=True):
        assert ids.tolist() == encode_prompt(tokenizer, chat).tolist()
    assert encode_prompts(tokenizer, []) == []


def test_many_chats_need_a_chat_template_too(tokenizer):
    bare = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; use the tokenizer of a chat model"):
        encode_prompts(bare, [[{"role": "user", "content": "x"}]])


def test_prompt_versions_differ(example_tasks):
    prompts = {json.dumps(build_messages(example_tasks[0], 0, SHAPE, version)) for version in PROMPT_VERSIONS}
    assert len(prompts) == len(PROMPT_VERSIONS) == 2


def test_an_unknown_prompt_version_or_test_is_refused():
    with pytest.raises(ValueError, match=r"unknown prompt version 'v9'; known are output-from-examples-v0, "):
        build_messages(GOOD_TASK, 0, SHAPE, "v9")
    with pytest.raises(ValueError, match="task good has 2 tests, there is no test 2"):
        build_messages(GOOD_TASK, 2, SHAPE, "output-from-examples-v0")
    with pytest.raises(ValueError, match="there is no test -1"):
        build_messages(GOOD_TASK, -1, SHAPE, "output-from-examples-v0")


def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((EXAMPLE_MODEL / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    write(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(ValueError, match=f"the tokenizer '{tmp_path}' has no chat template"):
        encode_prompt(AutoTokenizer.from_pretrained(tmp_path), [{"role": "user", "content": "1"}])


@pytest.mark.parametrize("prompt_version", PROMPT_VERSIONS)
@pytest.mark.parametrize("encoder_name", ENCODER_NAMES)
def test_a_puzzle_is_read_back_from_its_prompt(tokenizer, example_tasks, encoder_name, prompt_version):
    encoder = create_grid_encoder(encoder_name)
    for task in example_tasks:
        ids = encode_prompt(tokenizer, build_messages(task, 0, encoder, prompt_version))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert read_puzzle(text, encoder) == (task.train, task.test[0].input)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is 2 + 2?",
        "### Test\n\nInput:\n12\n",
        "### Example 1\n\nInput:\n12\n\nOutput:\n2x\n\n### Test\n\nInput:\n12\n",
        "### Example 1\n\nInput:\n12\n\nOutput:\n21\n\n### Test\n\nInput:\nnone\n",
    ],
)
def test_a_text_that_is_no_whole_puzzle_is_none(text):
    assert read_puzzle(text, create_grid_encoder("MinimalGridEncoder()")) is None
