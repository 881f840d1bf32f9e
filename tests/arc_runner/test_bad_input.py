"""Bad input ends in one sentence that says what to do, before the weights are read; never in a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lively import rewrite_json, rewrite_safetensors
from runner_cases import LAYERS, assert_refused, copy_small, puzzle, report, run_main, write_tasks

import distributed_kv_cached_inference
from activation_store import ActivationStore
from arc_runner import continuous_loop as run_continuous
from arc_runner.loaded_model import Generator

DONE, TASKS_FAILED, RESUMABLE = 0, 1, 75


# --- Checkpoints --------------------------------------------------------------------------------------------

Spoil = Callable[[Path], object]


def config(**changes: Any) -> Spoil:
    return lambda model: rewrite_json(model / "config.json", **changes)


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    return lambda model: rewrite_safetensors(model / "model.safetensors", change)


def text(name: str, content: str) -> Spoil:
    return lambda model: (model / name).write_text(content)


def remove(name: str) -> Spoil:
    return lambda model: (model / name).unlink()


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def only_torch_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def fewer_tokens(model: Path) -> None:
    config(vocab_size=500)(model)
    tensors(lambda t: t.update({EMBEDDING: np.ascontiguousarray(t[EMBEDDING][:500])}))(model)


def template(content: str | None) -> Spoil:
    return lambda model: rewrite_json(model / "tokenizer_config.json", chat_template=content)


EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
CHECKPOINTS: list[tuple[str, Spoil, str]] = [
    ("no such directory", shutil.rmtree, "There is no model directory"),
    ("no config", remove("config.json"), "has no config.json; give a directory in Hugging Face layout"),
    ("torn config", text("config.json", '{"model_type":'), "config.json is not valid JSON"),
    ("config of a wrong kind", text("config.json", "[]"), "config.json holds no JSON object"),
    ("another architecture", config(model_type="llama"), "This is a 'llama' model; only model_type 'qwen2'"),
    ("a size missing", config(hidden_size=None), "The model config lacks hidden_size"),
    ("a size of text", config(hidden_size="64"), "hidden_size must be a positive integer, not '64'"),
    ("RoPE without sense", config(rope_theta="x"), "The model config has a value of the wrong type"),
    ("RoPE below zero", config(rope_theta=-1), "rope_theta must be a positive number, not -1.0"),
    ("epsilon that is none", config(rms_norm_eps=float("nan")), "rms_norm_eps must be a positive number"),
    ("tied to a word", config(tie_word_embeddings="no"), "tie_word_embeddings must be true or false"),
    ("RoPE scaling", config(rope_scaling={"type": "yarn"}), "rope_scaling of type 'yarn' is not implemented"),
    (
        "sliding window",
        config(use_sliding_window=True),
        "use_sliding_window (sliding_attention layers) is not",
    ),
    ("quantized", config(quantization_config={"bits": 4}), "use the unquantized checkpoint"),
    ("odd type", config(torch_dtype="int8"), "dtype int8 is not one of float32, bfloat16, float16"),
    ("no weights", remove("model.safetensors"), "has a config.json but no model.safetensors."),
    ("torch weights", only_torch_weights, "only pytorch_model.bin: convert it to safetensors first"),
    ("truncated", cut_short, "model.safetensors is not a whole safetensors file"),
    ("empty", text("model.safetensors", ""), "model.safetensors is not a whole safetensors file"),
    ("a Git LFS pointer", text("model.safetensors", "version https://git-lfs"), "fetch or copy it again"),
    ("a tensor missing", tensors(lambda t: t.pop(QUERY)), f"({LAYERS} layers): missing: {QUERY}."),
    ("one too many", tensors(lambda t: t.update(x=t[QUERY])), f"({LAYERS} layers): unexpected: x."),
    (
        "mis-shaped",
        tensors(lambda t: t.update({QUERY: t[QUERY][:5]})),
        f"mis-shaped: {QUERY} [5, 64] instead of [64, 64].",
    ),
    ("fewer layers than said", config(num_hidden_layers=3), "(3 layers): missing: model.layers.2.self_attn"),
    ("torn index", text("model.safetensors.index.json", "{}"), "is no safetensors index"),
    (
        "index of numbers",
        text("model.safetensors.index.json", '{"weight_map": {"x": 3}}'),
        "is no safetensors index",
    ),
    (
        "index of nothing",
        text("model.safetensors.index.json", '{"weight_map": {"x": "model-7.safetensors"}}'),
        "has no model-7.safetensors",
    ),
    ("no tokenizer", remove("tokenizer_config.json"), "has no tokenizer_config.json"),
    (
        "no vocabulary",
        remove("tokenizer.json"),
        "the tokenizer of {model} cannot be used: it does not give back the text 'Input 0123456789'",
    ),
    ("torn tokenizer", text("tokenizer.json", "{"), "the tokenizer of {model} cannot be used"),
    ("no chat template", template(None), "has no chat template; use the tokenizer of a chat model"),
    ("template that is wrong", template("{% for %}"), "the tokenizer of {model} cannot be used: Expected an"),
    ("template that objects", template("{{ raise_exception('no system') }}"), "cannot be used: no system"),
    ("empty prompts", template("{# nothing #}"), "cannot be used: it does not give back the text"),
    (
        "tokenizer of another model",
        fewer_tokens,
        "has token ids up to 511, the model a vocabulary of 500: they do not belong together",
    ),
    ("torn EOS", text("generation_config.json", "{"), "generation_config.json is not a JSON object"),
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
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("spoil", "sentence"), [c[1:] for c in CHECKPOINTS], ids=[c[0] for c in CHECKPOINTS])
def test_a_checkpoint_that_cannot_be_used(spoil: Spoil, sentence: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model = copy_small(tmp_path / "model")
    spoil(model)
    assert_refused(run_main(tmp_path, model_path=model), sentence.format(model=model))
    assert not (tmp_path / "activations").exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["Qwen/No-Such-Model", "no/such/directory", "./nowhere"])
def test_a_model_that_is_neither_here_nor_on_the_hub(name: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    outcome = run_main(tmp_path, model_path=name)
    assert_refused(outcome, f"There is no model directory {Path(name)}")
    assert ("asking the Hugging Face hub" in outcome.out) == name.startswith("Qwen")


# --- Data sets ----------------------------------------------------------------------------------------------

TASK = json.dumps(puzzle(1, 2))
LINE = '{"task_id": "a", ' + TASK[1:] + "\n"
DATA_SETS = [
    ("missing", "tasks.json", None, "cannot read {file}: No such file or directory"),
    ("empty file", "tasks.json", "", "is not JSON"),
    ("no tasks", "tasks.json", "{}", "the data set {file} has no tasks in it"),
    ("no lines", "tasks.jsonl", "\n", "the data set {file} has no tasks in it"),
    ("a list", "tasks.json", "[]", "is not a JSON object of the form {{task_id: task}}"),
    ("not a number", "tasks.json", '{"a": NaN}', "is not JSON: it contains NaN"),
    ("a key twice", "tasks.json", f'{{"a": {TASK}, "a": {TASK}}}', "has the key 'a' twice in one object"),
    ("a task twice", "tasks.jsonl", LINE + LINE, "has the task 'a' twice, on lines 1 and 2"),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "content", "sentence"), [d[1:] for d in DATA_SETS], ids=[d[0] for d in DATA_SETS]
)
def test_a_data_set_that_cannot_be_trusted(name: str, content: str | None, sentence: str, tmp_path: Path):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    assert_refused(run_main(tmp_path, dataset_path=file), sentence.format(file=file))
    assert not (tmp_path / "activations").exists()


BAD_TASKS = [
    ("ragged", {"train": [{"input": [[1, 2], [3]], "output": [[1]]}]}, "train[0].input row 1 has 1 cells"),
    ("true", {"test": [{"input": [[True]]}]}, "test[0].input row 0 column 0 is a boolean, not an integer"),
    ("real", {"test": [{"input": [[1.0]]}]}, "test[0].input row 0 column 0 is a float, not an integer"),
    ("ten", {"test": [{"input": [[10]]}]}, "test[0].input row 0 column 0 is not a colour from 0 to 9"),
    ("tall", {"test": [{"input": [[1]] * 31}]}, "test[0].input has 31 rows; a grid has 1 to 30"),
    ("testless", {"test": []}, 'the task has no list of "test" pairs'),
    ("../up", {}, "the task id '../up' is not safe as a file name"),
]


def test_a_bad_task_fails_alone_and_is_listed(tmp_path: Path):
    bad = {task_id: puzzle(1, 2) | change for task_id, change, _ in BAD_TASKS}
    write_tasks(tmp_path / "tasks.json", good=puzzle(3, 4), **bad, good_too=puzzle(5, 6))
    outcome = run_main(tmp_path)
    assert outcome.code == TASKS_FAILED
    assert outcome.err == ""
    assert [failure["task_id"] for failure in report(tmp_path)["tasks_failed"]] == [t[0] for t in BAD_TASKS]
    for task_id, _, reason in BAD_TASKS:
        assert f"  failed task       {task_id}: {reason}" in outcome.out
    assert list(json.loads((tmp_path / "submission.json").read_text())) == ["good", "good_too"]
    assert len(ActivationStore(tmp_path / "activations")) == 4
    # What lies beyond --n_tasks is nobody's business.
    assert run_main(tmp_path, n_tasks=1).code == DONE


@pytest.mark.usefixtures("no_weights")
def test_a_run_of_bad_tasks_only_reads_no_weights(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", bad={"train": []})
    outcome = run_main(tmp_path)
    assert outcome.code == TASKS_FAILED
    assert '  failed task       bad: the task has no list of "train" pairs' in outcome.out


@pytest.mark.usefixtures("no_weights")
def test_a_prompt_that_the_model_cannot_read_whole_fails_its_task(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1))
    outcome = run_main(tmp_path, max_output_tokens=32767)
    assert outcome.code == TASKS_FAILED
    assert "with --max_output_tokens 32767 that exceeds the model's context of 32768" in outcome.out


def test_sequences_that_are_not_finite_fail_and_are_listed(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model = copy_small(tmp_path / "model")
    tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * np.nan}))(model)
    for _ in range(2):  # the second time it is known from the store
        outcome = run_main(tmp_path, model_path=model)
        assert outcome.code == TASKS_FAILED
        assert "failed sequence   task test 0 identity sample 0: the log-probability is not" in outcome.out
    assert len(report(tmp_path)["sequences_failed"]) == 2


# --- Options that only the model can refuse -----------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([1, LAYERS], "--layers_to_extract: extract_layers [2] are out of range: the model has 2 layers"),
        ([-1], "--layers_to_extract: extract_layers [-1] are out of range"),
        ([1, 1], "must name at least one layer and none twice, not [1, 1]"),
    ],
)
def test_layers_that_the_model_does_not_have(layers: list[int], sentence: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    assert_refused(run_main(tmp_path, layers_to_extract=layers), sentence)


@pytest.mark.usefixtures("no_weights")
def test_more_tokens_than_the_model_has_positions(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    sentence = "--max_output_tokens 32768 leaves no room for a prompt: the model's context is 32768"
    assert_refused(run_main(tmp_path, max_output_tokens=32768), sentence)


# --- Devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["continuous", "task"])
def test_a_device_that_runs_out_of_memory_is_a_sentence(
    generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))

    def generate(*_: object, **__: object) -> None:
        raise distributed_kv_cached_inference.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nframe 1")

    monkeypatch.setattr(Generator, "compile", lambda _, calls: len(calls))
    monkeypatch.setattr(Generator, "generate", generate)
    monkeypatch.setattr(run_continuous, "start_stage", generate)
    outcome = run_main(tmp_path, generation=generation)
    assert outcome.code == RESUMABLE
    assert outcome.err == (
        "error: the device failed (RESOURCE_EXHAUSTED: 9 GB); the same command continues, with a smaller "
        "--batch_size if memory ran out\n"
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'tpu'"), AssertionError()])
def test_a_device_that_is_not_there_is_a_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))

    def local_devices() -> None:
        raise error

    monkeypatch.setattr(distributed_kv_cached_inference.jax, "local_devices", local_devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert_refused(run_main(tmp_path), "jax finds no device for JAX_PLATFORMS='tpu'")
