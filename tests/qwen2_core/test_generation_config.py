"""What generation_config.json asks for and nothing applies is named; what changes nothing is not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from lively import SHALLOW
from transformers import GenerationConfig

from qwen2_core.errors import CheckpointError
from qwen2_core.generation_config import checkpoint_sampling, unapplied_settings
from qwen2_core.sampling import Sampling
from qwen2_core.weights import load_qwen2

QWEN = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


def asked(folder: Path, applied: dict[str, Any] | None = None, **settings: Any) -> str | None:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return unapplied_settings(folder, applied)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repetition_penalty": 1.5}, "repetition_penalty 1.5"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size 3"),
        ({"suppress_tokens": [1, 2]}, "suppress_tokens [1, 2]"),
        ({"begin_suppress_tokens": [220]}, "begin_suppress_tokens [220]"),
        ({"bad_words_ids": [[5]]}, "bad_words_ids [[5]]"),
        ({"forced_bos_token_id": 0}, "forced_bos_token_id 0"),
        ({"forced_eos_token_id": 7}, "forced_eos_token_id 7"),
        ({"min_new_tokens": 4}, "min_new_tokens 4"),
        ({"num_beams": 4}, "num_beams 4"),
        ({"stop_strings": ["\n"]}, "stop_strings ['\\n']"),
        ({"guidance_scale": 1.5}, "guidance_scale 1.5"),
        ({"sequence_bias": [[[1], 2.0]]}, "sequence_bias [[[1], 2.0]]"),
        ({"repetition_penalty": "1.5"}, "repetition_penalty '1.5'"),
        (
            {"suppress_tokens": list(range(99))},
            f"suppress_tokens {list(range(99))!r:.40}...",
        ),
        ({"do_sample": True, "top_k": 20}, "top_k 20"),
        ({"do_sample": True, "min_p": 0.05}, "min_p 0.05"),
    ],
    ids=str,
)
def test_a_setting_that_changes_the_tokens_is_named(settings: dict[str, Any], words: str, tmp_path: Path):
    assert asked(tmp_path, **settings) == f"generation_config.json asks for {words}, which is not applied"


def test_several_settings_are_one_sentence(tmp_path: Path):
    assert asked(tmp_path, do_sample=True, repetition_penalty=1.5, top_k=20) == (
        "generation_config.json asks for repetition_penalty 1.5 and top_k 20, which are not applied"
    )


def test_settings_that_are_applied_are_not_named(tmp_path: Path):
    flags = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    sentence = asked(tmp_path, flags, **QWEN)
    assert sentence == "generation_config.json asks for repetition_penalty 1.1, which is not applied"
    assert asked(tmp_path, flags, **(QWEN | {"repetition_penalty": 1.0})) is None
    sentence = asked(tmp_path, {"temperature": 0, "top_k": 0, "top_p": 1}, **QWEN)
    assert sentence is not None
    for words in ("do_sample true", "temperature 0.7", "top_p 0.8", "top_k 20"):
        assert words in sentence


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token_id": [1, 0], "bos_token_id": 0, "pad_token_id": 0, "transformers_version": "5.0.0"},
        {
            "do_sample": False,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
        },  # which greedy decoding passes over
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": [], "bad_words_ids": None},
        {"max_new_tokens": 512, "max_length": 2048, "use_cache": False},
        {"sequence_bias": {}, "guidance_scale": None, "min_length": 0},
    ],
    ids=str,
)
def test_settings_that_change_nothing_are_not_named(settings: dict[str, Any], tmp_path: Path):
    assert asked(tmp_path, **settings) is None


def test_what_transformers_writes_by_default_is_not_named(tmp_path: Path):
    GenerationConfig().save_pretrained(tmp_path)
    assert unapplied_settings(tmp_path) is None


def test_without_the_file_nothing_is_named(tmp_path: Path):
    assert unapplied_settings(tmp_path) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 200_000, '{"top_k": ' + "9" * 5000 + "}", "\0"], ids=range(5)
)
def test_a_file_that_is_no_json_object_is_refused(text: str, tmp_path: Path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json (is not valid|holds no|is nested)"):
        unapplied_settings(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({}, Sampling()),
        (QWEN, Sampling(0.7, 20, 0.8, repetition_penalty=1.1)),
        ({**QWEN, "do_sample": False}, Sampling(repetition_penalty=1.1)),
        ({"temperature": 0.7, "min_p": 0.1}, Sampling()),  # which greedy decoding passes over
        ({"do_sample": True}, Sampling(1.0)),
        ({"do_sample": True, "min_p": 0.05, "top_k": None}, Sampling(1.0, min_p=0.05)),
    ],
    ids=str,
)
def test_the_sampling_that_a_checkpoint_asks_for_can_be_had(
    settings: dict[str, Any], sampling: Sampling, tmp_path: Path
):
    asked(tmp_path, **settings)
    assert checkpoint_sampling(tmp_path) == sampling
    assert unapplied_settings(tmp_path, vars(sampling)) is None


def test_without_the_file_a_checkpoint_asks_for_greedy_tokens(tmp_path: Path):
    assert checkpoint_sampling(tmp_path) == Sampling()


def test_a_sampling_that_cannot_be_is_refused(tmp_path: Path):
    asked(tmp_path, repetition_penalty="1.5")
    with pytest.raises(CheckpointError, match=r"asks for a sampling that cannot be: repetition_penalty must"):
        checkpoint_sampling(tmp_path)


def test_loading_warns_once_and_loads_whatever_the_file_is(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = SHALLOW.save(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_qwen2(model)
    assert caplog.messages == []
    (model / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    with caplog.at_level(logging.WARNING):
        load_qwen2(model)
    assert caplog.messages == [
        f"{model}: generation_config.json asks for repetition_penalty 1.5, which is not applied; "
        "sampling is what a call says, and sampling=Sampling(repetition_penalty=1.5) says it so"
    ]
    caplog.clear()
    (model / "generation_config.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        load_qwen2(model)
    assert "no generation_config.json is read: " in caplog.text
