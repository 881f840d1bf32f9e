"""A store that is there: other settings are refused with the flags to take, other prompts are told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import activation_fakes
import pytest
from activation_fakes import batch, settings

from activation_store import ActivationStore, ActivationWriter, FinishedSequence, sequence_key
from arc_runner.errors import UsageError
from arc_runner.store_check import check_store, say_changed_prompts
from qwen2_core.requests import SequenceRequest


def make_store(folder: Path, *sequences: FinishedSequence, **changes: Any) -> Path:
    with ActivationWriter(folder, settings(**changes), provenance={"model_id": "Qwen/Q w"}) as writer:
        if sequences:
            writer.submit(list(sequences))
    return folder


SAMPLED = {"temperature": 0.5, "top_k": 0, "top_p": 1.0}
DIFFERENT = [
    ({"max_output_tokens": 9}, "--max_output_tokens is 12 there and 9 here", "--max_output_tokens 12"),
    ({"seed": 0}, "--random_seed is 7 there and 0 here", "--random_seed 7"),
    (
        {"dtype": "float32"},
        '--dtype is "bfloat16" there and "float32" here',
        "--dtype bfloat16 with --residual_dtype bfloat16",
    ),
    ({"capture_prompt": False}, "--extract_prompt is true there and false here", "--extract_prompt"),
    (
        {"hook_names": ("blocks.3.hook_resid_post",)},
        "--layers_to_extract is 10 11 12 there and 3 here",
        "--layers_to_extract 10 11 12",
    ),
    (
        {"hook_names": ()},
        "--layers_to_extract is 10 11 12 there and none here",
        "--layers_to_extract 10 11 12",
    ),
    ({"sampling": SAMPLED}, "--temperature is 0.0 there and 0.5 here", "--temperature 0"),
    (
        {"prompt": {"grid_encoder": "A(B())", "prompt_version": "1"}},
        '--grid_encoder is "minimal" there and "A(B())" here',
        "--grid_encoder minimal",
    ),
    ({"model_fingerprint": "ef" * 32}, "model_fingerprint is", "--model_path 'Qwen/Q w'"),
    ({"tokenizer_sha256": "ef" * 32}, "tokenizer_sha256 is", "--model_path 'Qwen/Q w'"),
    (
        {"hook_names": ("blocks.3.hook_resid_post", "blocks.3.attn.hook_z")},
        "there and 3 here; --hook_points is none there and attn.hook_z:3 here",
        "--layers_to_extract 10 11 12 without --hook_points",
    ),
    (
        {"residual_dtype": "float32"},
        '--residual_dtype is "bfloat16" there and "float32" here',
        "--residual_dtype bfloat16",
    ),
    ({"eos_token_ids": (1, 2)}, "eos_token_ids is [5] there and [1, 2] here", "--model_path 'Qwen/Q w'"),
]


@pytest.mark.parametrize(("changes", "difference", "flags"), DIFFERENT)
def test_other_settings_are_refused_with_the_flags_that_would_continue_it(
    changes: dict[str, Any], difference: str, flags: str, tmp_path: Path
):
    make_store(tmp_path)
    with pytest.raises(UsageError) as refused:
        check_store(str(tmp_path), settings(**changes))
    assert difference in str(refused.value)
    assert str(refused.value).endswith(f"; choose another --activations_dir, or continue it with {flags}")


def test_interventions_that_a_store_was_not_made_with_are_named(tmp_path: Path):
    make_store(tmp_path)
    with pytest.raises(
        UsageError, match=r"--steer is nothing there and the file of checksum a.* without --steer$"
    ):
        check_store(str(tmp_path), settings(interventions="ab" * 32))


def test_sampling_that_a_store_was_made_without_is_named(tmp_path: Path):
    make_store(tmp_path)
    sampling = {**SAMPLED, "temperature": 0.0, "min_p": 0.1}
    with pytest.raises(UsageError, match=r"--min_p is nothing there and 0.1 here.* it without --min_p$"):
        check_store(str(tmp_path), settings(sampling=sampling))


def test_what_a_store_without_activations_or_prompts_needs_is_named(tmp_path: Path):
    make_store(tmp_path, hook_names=(), capture_prompt=False)
    with pytest.raises(UsageError, match=r"it with --no_extract_activations without --extract_prompt$"):
        check_store(str(tmp_path), settings())


def test_equal_settings_and_a_place_without_a_store_pass(tmp_path: Path):
    check_store(str(tmp_path / "nothing"), settings())
    check_store("memory://nothing-there", settings())
    check_store(str(make_store(tmp_path / "there")), settings())


def test_the_model_counts_only_once_its_fingerprint_is_known(tmp_path: Path):
    make_store(tmp_path)
    check_store(str(tmp_path), settings(model_fingerprint=""))
    with pytest.raises(UsageError, match="--random_seed is 7 there and 8 here"):
        check_store(str(tmp_path), settings(model_fingerprint="", seed=8))


# --- Prompts ------------------------------------------------------------------------------------------------


def requests_of(sequences: list[FinishedSequence], **changes: Any) -> list[SequenceRequest]:
    """What asks for sequences, of the prompts that ``changes`` gives by task."""
    found = []
    for one in sequences:
        prompt = changes.get(one.id.task_id, one.id.prompt_token_ids)
        identity = dataclasses.replace(one.id, prompt_token_ids=prompt)
        key = sequence_key(activation_fakes.SETTINGS, identity)
        found.append(SequenceRequest(prompt, 12, sampling_id=0, id=identity, key=key))
    return found


def said(folder: Path, requests: list[SequenceRequest], capsys: pytest.CaptureFixture[str]) -> str:
    say_changed_prompts(requests, ActivationStore(folder).index)
    return capsys.readouterr().err


def test_prompts_that_have_changed_are_counted_and_their_tasks_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = batch("a", "b", "c", "d", "e")
    make_store(tmp_path, *made)
    other = activation_fakes.sequence("other").id.prompt_token_ids
    assert said(tmp_path, requests_of(made, a=other), capsys) == (
        "2 of 10 sequences are in the store with other prompts, of the tasks a: the data set has changed "
        "since, or the tokenizer's chat template; they are made anew, and the old ones stay until "
        "`python -m activation_store verify ... --dataset ... --repair` drops them\n"
    )
    every = dict.fromkeys("abcde", other)
    assert "10 of 10 sequences are" in (line := said(tmp_path, requests_of(made, **every), capsys))
    assert "of the tasks a, b, c and 2 more:" in line


def test_what_is_only_not_made_yet_or_of_other_tasks_is_no_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make_store(tmp_path, *batch("a", "b"))
    for asked in (batch("a", "b"), batch("a", "b", "new"), batch("new"), batch("a"), batch("a", "new"), []):
        assert said(tmp_path, requests_of(asked), capsys) == ""
