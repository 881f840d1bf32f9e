"""The command line: what each flag means, the defaults, --help and --version, and flags that are unknown."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from runner_cases import run_python

from arc_runner.command_line import parse_options
from arc_runner.errors import UsageError
from arc_runner.options import RunOptions
from qwen2_core.sampling import Sampling
from qwen2_jax_with_hooks import FIXED_EXTRACT_LAYERS


def test_without_flags_it_is_the_embedded_example_with_everything_captured():
    options = parse_options([])
    assert Path(options.model_path, "config.json").is_file()
    assert Path(options.dataset_path).is_file()
    assert options.extract_activations
    assert options.layers_to_extract == FIXED_EXTRACT_LAYERS
    assert options.generation == "continuous"
    assert options.n_tasks is None
    assert options.sampling == Sampling(0.0, 0, 1.0)


def test_own_prompts_have_defaults_of_their_own():
    names = ("activations_dir", "output_filepath", "predictions_per_task", "augmentations")
    own = parse_options(["--prompts", "p.jsonl"])
    assert [getattr(own, name) for name in names] == ["prompt-activations", "completions.jsonl", 1, 1]
    puzzles = parse_options([])
    assert [getattr(puzzles, name) for name in names] == ["activations", "submission.json", 8, 8]
    given = ["--activations_dir=a", "--output_filepath=o", "--predictions_per_task=3", "--temperature=1"]
    options = parse_options(["--prompts", "p.jsonl", *given])
    assert [getattr(options, name) for name in names] == ["a", "o", 3, 1]


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ("--model_path m", "model_path", "m"),
        ("--dataset_path d.json", "dataset_path", "d.json"),
        ("--activations_dir gs://bucket/run", "activations_dir", "gs://bucket/run"),
        ("--output_filepath out/s.json", "output_filepath", "out/s.json"),
        ("--n_tasks 3", "n_tasks", 3),
        ("--grid_encoder MinimalGridEncoder()", "grid_encoder", "MinimalGridEncoder()"),
        ("--prompt_version output-from-examples-v1", "prompt_version", "output-from-examples-v1"),
        ("--batch_size 3", "batch_size", 3),
        ("--max_output_tokens 5", "max_output_tokens", 5),
        ("--predictions_per_task 2", "predictions_per_task", 2),
        ("--temperature 0.5", "temperature", 0.5),
        ("--top_k 4", "top_k", 4),
        ("--top_p 0.9", "top_p", 0.9),
        ("--random_seed 4294967295", "random_seed", 2**32 - 1),
        ("--dtype bfloat16", "dtype", "bfloat16"),
        ("--kv_cache_dtype float32", "kv_cache_dtype", "float32"),
        ("--generation python", "generation", "python"),
        ("--layers_to_extract 0", "layers_to_extract", (0,)),
        ("--layers_to_extract 0,5", "layers_to_extract", (0, 5)),
        ("--layers_to_extract=0, 5", "layers_to_extract", (0, 5)),
        ("--layers_to_extract 3-5,9 11", "layers_to_extract", (3, 4, 5, 9, 11)),
        ("--mesh_shape 1 2", "mesh_shape", (1, 2)),
        ("--mesh_shape 1,2", "mesh_shape", (1, 2)),
        ("--mesh_shape=1,2", "mesh_shape", (1, 2)),
        ("--layers_to_extract 2,3 --n_tasks 4", "n_tasks", 4),
        (
            "--layers_to_extract 12 3",
            "layers_to_extract",
            (3, 12),
        ),  # one order, one kind of store
        ("--extract_activations", "extract_activations", True),
        ("--no_extract_activations", "extract_activations", False),
        ("--extract_prompt", "extract_prompt", True),
        ("--hook_points=attn.hook_z:3 --top_k 4", "hook_points", ("blocks.3.attn.hook_z",)),
        ("--steer a.safetensors", "steer", "a.safetensors"),
        ("--steer a.safetensors --capture_before", "capture_before", True),
    ],
)
def test_each_flag_sets_its_field(arguments: str, field: str, value: Any):
    options = parse_options(arguments.split())
    assert getattr(options, field) == value
    assert getattr(parse_options([]), field) != value or field == "extract_activations"


@pytest.mark.parametrize(
    ("arguments", "augmentations", "samples"),
    [
        ("", 8, 1),  # greedy samples of one prompt are all the same
        ("--predictions_per_task 3", 3, 1),
        ("--temperature 1", 1, 8),
        ("--temperature 1 --augmentations 4", 4, 2),
        ("--predictions_per_task 4 --augmentations 4", 4, 1),
    ],
)
def test_predictions_are_augmentations_times_samples(arguments: str, augmentations: int, samples: int):
    options = parse_options(arguments.split())
    assert (options.augmentations, options.samples_per_prompt) == (augmentations, samples)
    assert augmentations * samples == options.predictions_per_task


REFUSED = [
    ("--max_output_tokens ten", "argument --max_output_tokens: invalid int value: 'ten'"),
    ("--n_tasks", "argument --n_tasks: expected one argument"),
    ("--layers_to_extract", "argument --layers_to_extract: expected at least one argument"),
    ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ("--dtype bf16", "; did you mean bfloat16?"),
    ("--generation loop", "argument --generation: invalid choice: 'loop'"),
    ("--generation=continous", "; did you mean continuous?"),
    ("--layers_to_extract 1,x", "argument --layers_to_extract: invalid int value: 'x'"),
    ("--layers_to_extract ,", "argument --layers_to_extract: invalid int value: ','"),
    ("--layers_to_extract 12-10", "argument --layers_to_extract: invalid int value: '12-10'"),
    ("--layers_to_extract 0-999999999", "argument --layers_to_extract: invalid int value: '0-999999999'"),
    ("--mesh_shape 1-2", "argument --mesh_shape: expected 2 arguments"),
    ("--mesh_shape 1,2,3", "unknown argument 3; --help lists the flags"),
    ("--batchsize 3", "unknown argument --batchsize; did you mean --batch_size?"),
    ("--model m", "unknown argument --model; did you mean --model_path?"),  # no abbreviations
    ("--seed=3", "unknown argument --seed=3; did you mean --random_seed?"),
    ("--qqq", "unknown argument --qqq; --help lists the flags"),
    ("tasks.json", "unknown argument tasks.json; --help lists the flags"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_what_the_parser_does_not_understand_is_refused_in_a_sentence(arguments: str, sentence: str):
    with pytest.raises(UsageError) as refused:
        parse_options(arguments.split())
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--use_kv_cache", "the KV cache is always on"),
        ("--prefill_chunk_size 512", "long prompts are processed in blocks by themselves"),
        ("--cloud_bucket=gs://b", "give a URL as --activations_dir"),
    ],
)
def test_a_retired_flag_is_refused_with_what_to_do_without_it(flag: str, instead: str):
    with pytest.raises(UsageError, match="no longer exists") as refused:
        parse_options(flag.split())
    assert instead in str(refused.value)


def test_help_lists_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        parse_options(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in RunOptions.__dataclass_fields__:
        assert f"--{name}" in text
    assert "--max_output_tokens TOKENS tokens per answer at most; 0 with" in text
    assert "generate nothing (default: 1100)" in text
    assert "(default: 10 to 23)" in text
    assert "None" not in text
    assert "examples: " in text


def test_the_examples_of_the_help_are_command_lines(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_options(["-h"])
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    lines = examples.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert parse_options(line.split()[1:]) != parse_options([])


def test_help_and_version_show_the_name_that_the_command_was_called_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for called, name in (
        ("/usr/bin/qwen2-arc-run", "qwen2-arc-run"),
        ("/home/me/distributed_kv_cached_inference.py", "distributed_kv_cached_inference.py"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        with pytest.raises(SystemExit):
            parse_options(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: {name} [-h] [--version]")


def test_version_names_the_package_and_jax(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        parse_options(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(
        rf"qwen2-jax-activations \S.*, jax {re.escape(jax.__version__)}\n", capsys.readouterr().out
    )


AT_ONCE = """
import runpy, sys
try:
    runpy.run_module("distributed_kv_cached_inference", run_name="__main__")
except SystemExit as ended:
    heavy = {"jax", "flax", "transformers", "huggingface_hub", "fsspec", "rich"} & sys.modules.keys()
    print("ended", ended.code, sorted(heavy))
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("--batch_size 0", 2),
        ("--no_such_flag", 2),
        ("--output_filepath a/", 2),
    ],
)
def test_what_needs_no_jax_is_answered_before_it_is_imported(words: str, code: int):
    assert run_python(AT_ONCE, *words.split()).splitlines()[-1] == f"ended {code} []"
