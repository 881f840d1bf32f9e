"""What is refused, or fails, before the weights are read: checkpoints, data sets, tasks and stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from lively import rewrite_json
from runner_cases import (
    LAYERS,
    Outcome,
    assert_refused,
    copy_small,
    digests,
    puzzle,
    report,
    run_main,
    store_of,
    write_tasks,
)
from spoil import (
    QUERY,
    Spoil,
    config,
    cut_short,
    only_torch_weights,
    remove,
    tensors,
    text,
)

import distributed_kv_cached_inference
from activation_store import ActivationStore
from activation_store.view_data import ViewChoice, page_data
from activation_store.view_text import open_reader
from arc_runner import job
from arc_runner.loaded_model import LoadedModel
from qwen2_core.checkpoint_files import CheckpointError, checkpoint_fingerprint
from qwen2_core.sharding import Layout
from qwen2_jax import QwenConfig

DONE, TASKS_FAILED, RESUMABLE = 0, 1, 75


def index(content: str) -> Spoil:
    """An index in place of the one file, which would count before it."""

    def spoil(model: Path) -> None:
        remove("model.safetensors")(model)
        text("model.safetensors.index.json", content)(model)

    return spoil


CHECKPOINTS: list[tuple[str, Spoil, str]] = [
    ("no such directory", shutil.rmtree, "There is no model directory"),
    ("no config", remove("config.json"), "has no config.json; give a directory in Hugging Face layout"),
    ("torn config", text("config.json", '{"model_type":'), "config.json is not valid JSON"),
    ("config of a wrong kind", text("config.json", "[]"), "config.json holds no JSON object"),
    ("another architecture", config(model_type="llama"), "This is a 'llama' model; only model_type 'qwen2'"),
    ("a size missing", config(hidden_size=None), "The model config lacks hidden_size"),
    ("a size of text", config(hidden_size="64"), "hidden_size must be a positive integer, not '64'"),
    ("RoPE without sense", config(rope_theta="x"), "rope_theta must be a positive number, not 'x'"),
    ("RoPE below zero", config(rope_theta=-1), "rope_theta must be a positive number, not -1"),
    ("epsilon that is none", config(rms_norm_eps=float("nan")), "rms_norm_eps must be a positive number"),
    ("tied to a word", config(tie_word_embeddings="no"), "tie_word_embeddings must be true or false"),
    ("RoPE scaling", config(rope_scaling={"type": "mrope"}), "RoPE of type 'mrope' is not one of"),
    (
        "sliding window",
        config(use_sliding_window=True, max_window_layers=1, sliding_window=0),
        "sliding_window must be a positive integer, not 0",
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
    ("torn index", index("{}"), "is no safetensors index"),
    (
        "index of numbers",
        index('{"weight_map": {"x": 3}}'),
        "model.safetensors.index.json says that x is in 3: a weight file has a plain name",
    ),
    (
        "index of nothing",
        index('{"weight_map": {"x": "model-7.safetensors"}}'),
        "has no model-7.safetensors",
    ),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("spoil", "sentence"), [c[1:] for c in CHECKPOINTS], ids=[c[0] for c in CHECKPOINTS])
def test_a_checkpoint_that_cannot_be_used_is_refused_before_its_weights_are_read(
    spoil: Spoil, sentence: str, tmp_path: Path
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model = copy_small(tmp_path / "model")
    spoil(model)
    assert_refused(run_main(tmp_path, model_path=model), sentence.format(model=model))
    assert not (tmp_path / "activations").exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["Qwen/No-Such-Model", "no/such/directory", "./nowhere"])
def test_a_model_that_is_neither_a_directory_nor_on_the_hub_is_refused(name: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    outcome = run_main(tmp_path, model_path=name)
    assert_refused(outcome, f"There is no model directory {Path(name)}")
    assert ("asking the Hugging Face hub" in outcome.out) == name.startswith("Qwen")


def test_a_hub_model_in_the_cache_is_used_and_its_commit_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(*_: object) -> None:
        raise CheckpointError("that is all")

    monkeypatch.setattr(LoadedModel, "load", load)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo, commit = tmp_path / "hub" / "models--org--small", "c" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    model = copy_small(repo / "snapshots" / commit)
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    outcome = run_main(tmp_path, model_path="org/small")
    assert outcome.out.startswith(
        f"there is no directory org/small: the hub's cache has it, at commit {'c' * 12}"
    )
    assert outcome.err.endswith("error: that is all\n")
    manifest = json.loads((tmp_path / "activations" / "manifest.json").read_text())
    assert manifest["provenance"]["model_id"] == "org/small"
    assert manifest["provenance"]["model_commit"] == commit
    assert manifest["settings"]["model_fingerprint"] == checkpoint_fingerprint(model)
    assert "model_revision" not in manifest["provenance"]


def test_a_revision_of_a_hub_model_is_used_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    revisions: list[str | None] = []

    def load(path: str, config: QwenConfig, layout: Layout, *, revision: str | None = None) -> None:
        revisions.append(revision)
        raise CheckpointError("that is all")

    monkeypatch.setattr("arc_runner.loaded_model.load_params", load)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo, main, other = tmp_path / "hub" / "models--org--small", "c" * 40, "d" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(main)
    (repo / "refs" / "v2").write_text(other)
    copy_small(repo / "snapshots" / main)
    model = copy_small(repo / "snapshots" / other)
    rewrite_json(model / "config.json", rms_norm_eps=2e-6)  # another model
    rewrite_json(model / "generation_config.json", eos_token_id=[2, 3])
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    outcome = run_main(tmp_path, model_path="org/small", revision="v2")
    assert outcome.out.startswith(
        f"there is no directory org/small: the hub's cache has it, at commit {'d' * 12}"
    )
    assert outcome.err.endswith("error: that is all\n")
    assert revisions == ["v2"]
    manifest = json.loads((tmp_path / "activations" / "manifest.json").read_text())
    assert manifest["provenance"]["model_commit"] == other
    assert manifest["provenance"]["model_revision"] == "v2"
    assert manifest["settings"]["model_fingerprint"] == checkpoint_fingerprint(model)
    assert {2, 3} <= set(manifest["settings"]["eos_token_ids"])
    refused = run_main(tmp_path, model_path="org/small")
    assert refused.err.endswith(f"with --model_path org/small --revision {other}\n")
    again = run_main(tmp_path, model_path="org/small", revision=other)  # is continued
    assert again.err.endswith("error: that is all\n")


def test_a_revision_of_a_folder_is_refused(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model = copy_small(tmp_path / "model")
    sentence = f"--revision main is of a hub model, and {model} is on this machine: leave --revision out"
    assert_refused(run_main(tmp_path, model_path=model, revision="main"), sentence)
    assert_refused(run_main(tmp_path, revision="main", model_path=None), "--revision main is of a hub model")


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
def test_a_data_set_that_cannot_be_read_as_tasks_is_refused(
    name: str, content: str | None, sentence: str, tmp_path: Path
):
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
    answers = json.loads((tmp_path / "submission.json").read_text())
    assert list(answers) == ["good", *bad, "good_too"]
    assert all(list(one) == ["attempt_1", "attempt_2"] for tests in answers.values() for one in tests)
    assert len(ActivationStore(tmp_path / "activations")) == 4
    # What lies beyond --n_tasks is nobody's business.
    assert run_main(tmp_path, n_tasks=1).code == DONE


@pytest.mark.usefixtures("no_weights")
def test_a_run_in_which_every_task_is_bad_reads_no_weights(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", bad={"train": []})
    outcome = run_main(tmp_path)
    assert outcome.code == TASKS_FAILED
    assert '  failed task       bad: the task has no list of "train" pairs' in outcome.out


@pytest.mark.usefixtures("no_weights")
def test_a_task_whose_prompt_and_answer_exceed_the_context_fails(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1))
    outcome = run_main(tmp_path, max_output_tokens=32767)
    assert outcome.code == TASKS_FAILED
    assert "with --max_output_tokens 32767 that exceeds the model's context of 32768" in outcome.out


# --- Stores in use or of other settings ---------------------------------------------------------------------


def test_a_store_made_with_other_settings_is_refused_and_left_as_it_is(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    assert run_main(tmp_path).code == DONE
    request.getfixturevalue("no_weights")
    monkeypatch.setattr(job, "checkpoint_fingerprint", lambda _: pytest.fail("the weights are hashed"))
    before = digests(tmp_path), (tmp_path / "submission.json").read_bytes()
    for flag, value, difference in [
        ("max_output_tokens", 9, "max_output_tokens is 8 there and 9 here"),
        ("random_seed", 1, "seed is 0 there and 1 here"),
        ("layers_to_extract", [0], "layers_to_extract is 0 1 there and 0 here"),
        ("prompt_version", "output-from-examples-v1", "output-from-examples-v1"),
        ("dtype", "bfloat16", 'dtype is "float32" there and "bfloat16" here'),
    ]:
        outcome = run_main(tmp_path, **{flag: value})
        assert_refused(outcome, difference)
        assert f"choose another --activations_dir, or continue it with --{flag} " in outcome.err
    assert (digests(tmp_path), (tmp_path / "submission.json").read_bytes()) == before


@pytest.mark.usefixtures("no_weights")
def test_a_store_that_another_run_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    second: list[Outcome] = []

    def generate(*_: object) -> None:  # in the middle of the first run
        second.append(run_main(tmp_path, output_filepath=tmp_path / "second.json"))

    monkeypatch.setattr(distributed_kv_cached_inference, "generate_missing", generate)
    run_main(tmp_path)
    assert_refused(second[0], "is in use: another run writes to this directory")


def test_a_data_set_that_has_changed_since_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tasks(tmp_path / "tasks.json", kept=puzzle(1, 2), corrected=puzzle(3, 4))
    outcome = run_main(tmp_path)
    assert (outcome.code, outcome.err) == (DONE, "")
    write_tasks(tmp_path / "tasks.json", kept=puzzle(1, 2), corrected=puzzle(3, 5))
    monkeypatch.setattr(distributed_kv_cached_inference, "generate_missing", lambda *_: None)
    assert run_main(tmp_path).err.startswith(
        "2 of 4 sequences are in the store with other prompts, of the tasks corrected: the data set has"
    )


def test_a_store_names_its_model_and_its_data_set_and_its_page_finds_both(finished: Path, tmp_path: Path):
    store = store_of(finished)
    assert store.provenance["dataset"] == str(finished / "tasks.json")
    with open_reader(store) as reader:
        data = page_data(store, reader, ViewChoice(task_ids=["task-0"], n=1))
    assert data["prompts"][0]["puzzle"] == {"train": [[["12"], ["21"]]], "input": ["012"], "truth": ["210"]}
    assert data["notes"][0].startswith("1 of ")
    assert not any("--model_path" in note or "--dataset" in note for note in data["notes"])
