"""Options that cannot be, or contradict each other, are refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from arc_runner.command_line import parse_options
from arc_runner.errors import UsageError
from arc_runner.options import RunOptions, flag_of
from qwen2_core.sampling import Sampling

REFUSED = [
    ("--batch_size 0", "--batch_size must be at least 1, not 0"),
    ("--max_output_tokens -3", "--max_output_tokens must be at least 0, not -3"),
    ("--max_output_tokens 0", "without --extract_prompt nothing would be stored: give --extract_prompt too"),
    ("--max_output_tokens 0 --no_extract_activations", "without --extract_prompt nothing would be stored"),
    (
        "--max_output_tokens 0 --extract_prompt --temperature 1",
        "--max_output_tokens 0 generates nothing, so the 8 samples of one prompt would be the same",
    ),
    ("--min_p 1.5", "--min_p must be from 0 to 1, not 1.5"),
    ("--min_p nan", "--min_p must be from 0 to 1, not nan"),
    ("--repetition_penalty 0", "--repetition_penalty must be at least 0.01, not 0.0"),
    ("--repetition_penalty nan", "--repetition_penalty must be from 0.01 to 100, not nan"),
    ("--revision=", "--revision is empty; leave the flag out or give it a value"),
    ("--predictions_per_task 0", "--predictions_per_task must be at least 1, not 0"),
    ("--augmentations 0", "--augmentations must be at least 1, not 0"),
    ("--n_tasks 0", "--n_tasks must be at least 1, not 0"),
    ("--random_seed -1", "--random_seed must be at least 0, not -1"),
    ("--random_seed 4294967296", "--random_seed must be from 0 to 4294967295, not 4294967296"),
    ("--memory_budget 0", "--memory_budget must be at least 0.001, not 0.0"),
    ("--temperature -1", "--temperature must be at least 0, not -1.0"),
    ("--temperature nan", "--temperature must be from 0 to 10000, not nan"),
    ("--top_p 0", "--top_p must be at least 1e-06, not 0.0"),
    ("--top_k -1", "--top_k must be at least 0, not -1"),
    ("--predictions_per_task 5 --augmentations 2", "5 is not a multiple of --augmentations 2"),
    ("--augmentations 4", "at temperature 0 the 2 samples of one prompt would be the same"),
    ("--predictions_per_task 100001", "--predictions_per_task must be from 1 to 100000, not 100001"),
    ("--extract_prompt --no_extract_activations", "contradict each other"),
    ("--generation python --kv_cache_dtype float32", "--kv_cache_dtype is for the compiled ways"),
    ("--mesh_shape 0 1", "--mesh_shape must be at least 1, not 0"),
    (
        "--mesh_shape 2 1 --generation task",
        "--mesh_shape 2 1: only --generation continuous shares its sequences",
    ),
    (
        "--mesh_shape 1 2 --generation python",
        "--mesh_shape 1 2: the old loop of --generation python uses one",
    ),
    ("--grid_encoder Grid()", "expected one of the known encoders MinimalGridEncoder"),
    ("--prompt_version v9", "unknown --prompt_version 'v9'; known are output-from-examples-v0"),
    ("--model_path=", "--model_path is empty; leave the flag out or give it a value"),
    ("--dataset_path=", "--dataset_path is empty"),
    ("--activations_dir=", "--activations_dir is empty"),
    ("--output_filepath=", "--output_filepath is empty"),
    ("--output_filepath gs://bucket/s.json", "gs://bucket/s.json is not the path of a local file"),
    ("--output_filepath answers/", "--output_filepath answers/ is not the path of a local file"),
    ("--output_filepath ..", "--output_filepath .. is not the path of a local file"),
    ("--output_filepath x --activations_dir ./x", "--output_filepath and --activations_dir are both x"),
    ("--temperature 1e-5", "--temperature must be 0, which is greedy, or at least 0.0001, not 1e-05"),
    ("--memory_budget inf", "--memory_budget must be from 0.001 to 1000000.0, not inf"),
    ("--memory_budget 1e308", "--memory_budget must be from 0.001 to 1000000.0, not 1e+308"),
    ("--batch_size 1e9", "argument --batch_size: invalid int value: '1e9'"),
    ("--random_seed 1e3", "argument --random_seed: invalid int value: '1e3'"),
    ("--batch_size 1000000000", "--batch_size must be from 1 to 65536, not 1000000000"),
    ("--max_output_tokens 1000000000000", "must be from 0 to 1048576, not 1000000000000"),
    ("--n_tasks 99999999999999999999999", "must be from 1 to 1000000000, not 99999999999999999999999"),
    (f"--n_tasks {'9' * 5000}", "argument --n_tasks: invalid int value: '9999"),
    ("--mesh_shape 1 -2", "--mesh_shape must be at least 1, not -2"),
    ("--layers_to_extract 0 -1", "--layers_to_extract must be at least 0, not -1"),
    ("--num_shards 4 --shard_index -1", "--shard_index must be at least 0, not -1"),
    ("--num_shards 100001 --shard_index 0", "--num_shards must be from 1 to 100000, not 100001"),
    ("--dataset_path https://arc.org/training.json", "is a URL; give a path of this machine"),
    ("--model_path s3://bucket/model", "is a URL; give a path of this machine"),
    ("--prompts https://example.org/prompts.jsonl", "is a URL; give a path of this machine"),
    ("--prompts p.jsonl --dataset_path t.json", "contradict each other: give one of the two"),
    ("--prompts p.jsonl --solutions_path s.json", "--solutions_path is of puzzles, and --prompts has none"),
    ("--prompts p.jsonl --grid_encoder MinimalGridEncoder()", "--grid_encoder is of puzzles"),
    ("--prompts p.jsonl --prompt_version output-from-examples-v1", "--prompt_version is of puzzles"),
    ("--prompts p.jsonl --augmentations 2 --predictions_per_task 2", "--augmentations turns puzzles around"),
    ("--prompts p.jsonl --predictions_per_task 3", "the 3 samples of one prompt would be the same; give a"),
    ("--dry_run --merge", "--merge and --dry_run contradict each other"),
    ("--model_path ~nobody-like-this/m", "there is no user 'nobody-like-this' with a home"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_options_that_cannot_be_are_refused_in_a_sentence(arguments: str, sentence: str):
    with pytest.raises(UsageError) as refused:
        parse_options(arguments.split())
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


ADDRESSES = [
    "a:0",
    "a:99999",
    "a:65536",
    ":80",
    "here",
    "a:",
    "::1:80",
    "[::1:80",
    "[x]:80",
    "a b:80",
    "a:8O",
]
ADDRESSES += ["a\0:80", "\udcc3:80", "a:\u0661\u0662", "http://a:80", "u:p@a:80", "a/b:80"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_without_host_or_port_is_refused(address: str):
    with pytest.raises(UsageError, match="is not of the form HOST:PORT, with a port from 1 to 65535"):
        parse_options(["--coordinator_address", address, "--num_processes", "2", "--process_id", "0"])


@pytest.mark.parametrize("address", ["node-3.cluster:1", "10.0.0.1:65535", "[fe80::1]:80", "localhost:8080"])
def test_names_and_addresses_of_both_kinds_are_taken(address: str):
    words = ["--coordinator_address", address, "--num_processes", "2", "--process_id", "0"]
    assert parse_options(words).coordinator_address == address


FIELDS = {field.name: str(field.type) for field in dataclasses.fields(RunOptions)}
NUMBERS = [name for name, kind in FIELDS.items() if "int" in kind or "float" in kind]
PATHS = [name for name in FIELDS if flag_of(name).is_path]
ODD = ["nan", "inf", "-inf", "-1", "1e308", "-1e308", "-0", "1e-320", "0", str(2**31), str(2**64), "9" * 23]


def together(name: str, value: str) -> list[str]:
    """A command line in which only the value of one flag can be wrong."""
    words = {
        "num_processes": ["--coordinator_address=a:1", "--process_id=0"],
        "num_shards": ["--shard_index=0"],
    }
    words["process_id"] = ["--coordinator_address=a:1", "--num_processes=100000"]
    words["shard_index"] = ["--num_shards=100000"]
    words["mesh_shape"] = ["--mesh_shape", value, value]
    return words.get(name, []) + ([] if name == "mesh_shape" else [f"--{name}={value}"])


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_limits_and_nothing_beyond_them_gets_through(name: str):
    limits = flag_of(name).limits
    assert limits is not None
    for text in ODD:
        try:
            options = parse_options(together(name, text))
        except UsageError as refused:
            assert f"--{name}" in str(refused) or name == "predictions_per_task", refused  # noqa: PT017
            assert "\n" not in str(refused)  # noqa: PT017
            continue
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            assert limits.least <= number <= limits.most
            assert json.dumps(number) != "-0.0"
        assert isinstance(options.sampling, Sampling)  # which checks its values itself


@pytest.mark.parametrize(
    ("text", "name"),
    [("0", "temperature"), ("0.0001", "temperature"), ("10000", "temperature"), ("1e-06", "top_p")],
)
def test_what_the_limits_allow_the_sampler_takes_as_it_is(text: str, name: str):
    value = getattr(parse_options([f"--{name}={text}", "--predictions_per_task=1"]).sampling, name)
    assert value == float(text)
    assert float(text) == 0 or 0 < float(np.float32(value)) < float("inf")


@pytest.mark.parametrize("name", PATHS)
def test_home_is_expanded_in_every_path(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert len(PATHS) >= 5
    for words in ([f"--{name}=~/x"], [f"--{name}", "~/x"]):
        assert getattr(parse_options(words), name) == "/home/me/x"
    fields: dict[str, Any] = {name: "~/x"}
    assert getattr(RunOptions(**fields), name) == "/home/me/x"
    assert getattr(parse_options([f"--{name}=./~/x"]), name) == "./~/x"
    assert getattr(parse_options([f"--{name}=$HOME/x"]), name) == "$HOME/x"


def test_every_flag_that_names_a_file_or_directory_is_declared_as_a_path():
    named = {name for name in FIELDS if name.endswith(("_path", "_dir", "_filepath"))}
    assert named | {"prompts", "steer"} == set(PATHS)


BAD_PATHS = [
    ("a\0b", "has a NUL byte in it"),
    ("a\udcc3b", "is not UTF-8 text"),
    ("\ud800", "is not UTF-8 text"),
]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("path", "sentence"), BAD_PATHS)
def test_what_is_no_path_is_refused_in_every_flag(name: str, path: str, sentence: str):
    with pytest.raises(UsageError, match=sentence):
        parse_options([f"--{name}={path}"])
