"""The command line: what it means, its defaults, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arc_runner.options import RunOptions, UsageError, parse_options
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
        (
            "--layers_to_extract 12 3",
            "layers_to_extract",
            (3, 12),
        ),  # one order, one kind of store
        ("--extract_activations", "extract_activations", True),
        ("--no_extract_activations", "extract_activations", False),
        ("--extract_prompt", "extract_prompt", True),
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
    ("--batch_size 0", "--batch_size must be at least 1, not 0"),
    ("--max_output_tokens -3", "--max_output_tokens must be at least 1, not -3"),
    ("--predictions_per_task 0", "--predictions_per_task must be at least 1, not 0"),
    ("--augmentations 0", "--augmentations must be at least 1, not 0"),
    ("--n_tasks 0", "--n_tasks must be at least 1, not 0"),
    ("--random_seed -1", "--random_seed must be between 0 and 2**32 - 1, not -1"),
    ("--random_seed 4294967296", "--random_seed must be between 0 and 2**32 - 1, not 4294967296"),
    ("--max_output_tokens ten", "argument --max_output_tokens: invalid int value: 'ten'"),
    ("--n_tasks", "argument --n_tasks: expected one argument"),
    ("--layers_to_extract", "argument --layers_to_extract: expected at least one argument"),
    ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ("--memory_budget 0", "--memory_budget must be above 0, not 0.0"),
    ("--generation loop", "argument --generation: invalid choice: 'loop'"),
    ("--temperature -1", "temperature must be 0 (greedy) or a positive number, not -1.0"),
    ("--temperature nan", "temperature must be 0 (greedy) or a positive number, not nan"),
    ("--top_p 0", "top_p must be in (0, 1], not 0.0"),
    ("--top_k -1", "top_k must be 0 (all tokens) or a positive integer, not -1"),
    ("--predictions_per_task 5 --augmentations 2", "5 is not a multiple of --augmentations 2"),
    ("--augmentations 4", "at temperature 0 the 2 samples of one prompt would be the same"),
    ("--predictions_per_task 100001", "it has to be from 1 to 100000"),
    ("--extract_prompt --no_extract_activations", "contradict each other"),
    ("--generation python --kv_cache_dtype float32", "--kv_cache_dtype is for the compiled ways"),
    ("--mesh_shape 0 1", "--mesh_shape 0 1: both must be at least 1"),
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
    ("--batchsize 3", "unknown argument --batchsize; did you mean --batch_size?"),
    ("--model m", "unknown argument --model; did you mean --model_path?"),  # no abbreviations
    ("--seed=3", "unknown argument --seed=3; did you mean --random_seed?"),
    ("--qqq", "unknown argument --qqq; --help lists the flags"),
    ("tasks.json", "unknown argument tasks.json; --help lists the flags"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(arguments: str, sentence: str):
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
def test_a_flag_that_is_gone_says_what_to_do_without_it(flag: str, instead: str):
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
    assert "--max_output_tokens TOKENS tokens per answer at most (default: 1100)" in text
    assert "(default: 10 to 23)" in text
    assert "None" not in text
