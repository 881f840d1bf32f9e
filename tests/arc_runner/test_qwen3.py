"""A Qwen3 in the runner, and ``--enable_thinking``: its prompts and store, and who is refused it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lively import Lively, row_errors
from prompt_cases import QUESTION, TEXT, run_prompts, write_prompts
from runner_cases import (
    LAYERS,
    assert_refused,
    copy_small,
    plain_rows,
    puzzle,
    run_main,
    store_of,
    write_tasks,
)
from spoil import template
from thinking_cases import CHOICE
from transformers import AutoTokenizer

from activation_store.__main__ import main as look_after

CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small Qwen3 with a template in the shape of the published one."""
    made = copy_small(tmp_path / "model")
    template(CHOICE)(made)
    return Lively(layers=LAYERS, vocab=512, head_dim=32, seed=8).save(made)


def last_prompt(folder: Path, model: Path) -> str:
    store = store_of(folder)
    return AutoTokenizer.from_pretrained(model).decode(store.prompt_token_ids(store[-1]))


def test_a_qwen3_is_run_stored_verified_and_replayed(model: Path, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    points = ["attn.hook_q:0-1", "attn.hook_z:1", "ln_final.hook_normalized"]
    assert run_main(tmp_path, model_path=model, hook_points=points, extract_prompt=True).code == 0
    store = store_of(tmp_path)
    assert store.settings.hook_widths["blocks.1.attn.hook_q"] == 4 * 32  # twice the stream's
    record = store[0]
    ids = np.concatenate([store.prompt_token_ids(record), store.generated_tokens(record)])
    expected = plain_rows(model, (0, 1), ids)
    for layer in (0, 1):
        assert row_errors(store.rows(record, layer), expected[layer]).max() < 1e-4
    command = ["verify", str(tmp_path / "activations"), "--replay", "2", "--model_path", str(model)]
    assert look_after(command) == 0


def test_prompts_are_made_so_and_the_store_keeps_to_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    asked: dict[str, Any] = {"model_path": model, "enable_thinking": "false"}
    assert run_main(tmp_path, **asked).code == 0
    assert last_prompt(tmp_path, model).endswith(CLOSED)
    assert store_of(tmp_path).settings.prompt["enable_thinking"] == "false"
    again = run_main(tmp_path, **asked)
    assert again.code == 0
    assert "2 of them done already" in again.out
    for choice, here in (("true", '"true"'), (None, "nothing")):
        refused = run_main(tmp_path, **(asked | {"enable_thinking": choice}))
        sentence = f'--enable_thinking is "false" there and {here} here'
        assert_refused(refused, sentence)
        assert "or continue it with --enable_thinking false" in refused.err
    store, tasks = str(tmp_path / "activations"), str(tmp_path / "tasks.json")
    assert look_after(["verify", store, "--dataset", tasks, "--model_path", str(model)]) == 0
    assert "0 findings" in capsys.readouterr().out


def test_left_out_the_template_decides_and_the_store_is_as_before(model: Path, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    assert run_main(tmp_path, model_path=model).code == 0
    assert last_prompt(tmp_path, model).endswith("<|im_start|>assistant\n")
    assert "enable_thinking" not in store_of(tmp_path).settings.prompt
    refused = run_main(tmp_path, model_path=model, enable_thinking="false")
    assert_refused(refused, '--enable_thinking is nothing there and "false" here')
    assert "or continue it without --enable_thinking" in refused.err


def test_own_chats_are_told_too(model: Path, tmp_path: Path):
    write_prompts(tmp_path, TEXT, QUESTION)
    assert run_prompts(tmp_path, model_path=model, enable_thinking="false").code == 0
    assert last_prompt(tmp_path, model).endswith(CLOSED)


@pytest.mark.usefixtures("no_weights")
def test_where_nothing_takes_the_choice_it_is_refused_before_the_weights_are_read(
    model: Path, tmp_path: Path
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    for choice in ("true", "false"):
        plain = run_main(tmp_path, enable_thinking=choice)
        assert_refused(plain, "--enable_thinking: the chat template of ")
        assert "does not take it; leave it out" in plain.err
    write_prompts(tmp_path, TEXT)
    texts = run_prompts(tmp_path, model_path=model, enable_thinking="true")
    assert_refused(texts, "--enable_thinking is for chat templates, and ")
    assert not (tmp_path / "activations").exists()
