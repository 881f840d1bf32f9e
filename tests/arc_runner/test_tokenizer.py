"""Tokenizers that cannot be used are refused in one sentence, before the weights are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from runner_cases import (
    assert_refused,
    copy_small,
    puzzle,
    run_main,
    write_tasks,
)
from spoil import (
    Spoil,
    fewer_tokens,
    remove,
    template,
    text,
)

DONE, TASKS_FAILED, RESUMABLE = 0, 1, 75


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else in the place of a file."""

    def spoil(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        make(model / name)

    return spoil


def endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def two_gigabytes(file: Path) -> None:
    with file.open("w") as sparse:
        sparse.truncate(1 << 31)


TOKENIZERS: list[tuple[str, Spoil, str]] = [
    ("no tokenizer", remove("tokenizer_config.json"), "has no tokenizer_config.json"),
    (
        "no vocabulary",
        remove("tokenizer.json"),
        "the tokenizer of {model} cannot be used: it does not give back the text 'Input 0123456789'",
    ),
    ("torn tokenizer", text("tokenizer.json", "{"), "the tokenizer of {model} cannot be used"),
    ("no chat template", template(None), "has no chat template; use the tokenizer of a chat model"),
    (
        "template that is wrong",
        template("{% for %}"),
        "the tokenizer of {model} cannot be used: the chat template fails: Expected an",
    ),
    (
        "template that objects",
        template("{{ raise_exception('no system') }}"),
        "cannot be used: the chat template fails: no system",
    ),
    ("empty prompts", template("{# nothing #}"), "cannot be used: it does not give back the text"),
    (
        "tokenizer of another model",
        fewer_tokens,
        "has token ids up to 511, the model a vocabulary of 500: they do not belong together",
    ),
    ("torn EOS", text("generation_config.json", "{"), "generation_config.json is not valid JSON"),
    (
        "EOS outside the vocabulary",
        text("generation_config.json", '{"eos_token_id": [512]}'),
        "eos_token_id 512 of {model} is none of its 512 tokens",
    ),
    (
        "EOS that is none",
        text("generation_config.json", '{"eos_token_id": [[1]]}'),
        "eos_token_id [1] of {model} is none of its 512 tokens",
    ),
    (
        "EOS of 5,000 digits",
        text("generation_config.json", f'{{"eos_token_id": {"9" * 5000}}}'),
        "generation_config.json is not valid JSON",
    ),
    (
        "deep EOS",
        text("generation_config.json", '{"a":' * 100_000),
        "generation_config.json is nested too deep",
    ),
    (
        "EOS from a pipe",
        instead("generation_config.json", os.mkfifo),
        "generation_config.json is not a regular",
    ),
    ("deep tokenizer_config", text("tokenizer_config.json", '{"a":' * 100_000), "cannot be used: "),
    ("long tokenizer_config", text("tokenizer_config.json", f'{{"a": {"9" * 5000}}}'), "cannot be used: "),
    ("deep tokenizer", text("tokenizer.json", '{"a":' * 100_000), "cannot be used: "),
    ("tokenizer of another kind", text("tokenizer.json", '{"model": {"type": "BPE"}}'), "cannot be used: "),
    ("tokenizer without sense", text("tokenizer.json", '{"added_tokens": [{"id": -1}]}'), "cannot be used: "),
    ("tokenizer from a pipe", instead("tokenizer.json", os.mkfifo), "tokenizer.json is not a regular file"),
    (
        "template from a pipe",
        instead("chat_template.jinja", os.mkfifo),
        "chat_template.jinja is not a regular",
    ),
    (
        "endless map",
        instead("special_tokens_map.json", endless),
        "special_tokens_map.json is not a regular file",
    ),
    ("endless vocabulary", instead("vocab.json", endless), "vocab.json is not a regular file"),
    (
        "tokenizer of 2 GB",
        instead("tokenizer.json", two_gigabytes),
        "is larger than any tokenizer's file (1 GB)",
    ),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("spoil", "sentence"), [c[1:] for c in TOKENIZERS], ids=[c[0] for c in TOKENIZERS])
def test_a_tokenizer_that_cannot_be_used_is_refused(spoil: Spoil, sentence: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model = copy_small(tmp_path / "model")
    spoil(model)
    assert_refused(run_main(tmp_path, model_path=model), sentence.format(model=model))
    assert not (tmp_path / "activations").exists()
