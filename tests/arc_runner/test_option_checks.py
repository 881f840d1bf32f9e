"""Options that cannot be, or contradict each other, are refused in one sentence."""

from __future__ import annotations

import pytest

from arc_runner.command_line import parse_options
from arc_runner.errors import UsageError

REFUSED = [
    ("--batch_size 0", "--batch_size must be at least 1, not 0"),
    ("--max_output_tokens -3", "--max_output_tokens must be at least 1, not -3"),
    ("--predictions_per_task 0", "--predictions_per_task must be at least 1, not 0"),
    ("--augmentations 0", "--augmentations must be at least 1, not 0"),
    ("--n_tasks 0", "--n_tasks must be at least 1, not 0"),
    ("--random_seed -1", "--random_seed must be between 0 and 2**32 - 1, not -1"),
    ("--random_seed 4294967296", "--random_seed must be between 0 and 2**32 - 1, not 4294967296"),
    ("--memory_budget 0", "--memory_budget must be above 0, not 0.0"),
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
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_options_that_cannot_be_are_refused_in_a_sentence(arguments: str, sentence: str):
    with pytest.raises(UsageError) as refused:
        parse_options(arguments.split())
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
