"""Own prompts in the place of puzzles: the same runner, store, resume and checks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lively import row_errors
from prompt_cases import CHAT, QUESTION, TEXT, answered, completions, run_prompts, write_prompts
from runner_cases import (
    LAYERS,
    TINY,
    assert_refused,
    copy_small,
    digests,
    puzzle,
    run_main,
    small_checkpoint,
    store_of,
    stored_row_errors,
    tokens,
    write_tasks,
)
from spoil import template
from transformers import AutoTokenizer

from activation_store.__main__ import main as look_after
from activation_store.checked_json import unseal

DONE, FAILED = 0, 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the folder where prompts were answered."""
    return Path(shutil.copytree(answered()[0], tmp_path / "copy"))


def report(folder: Path) -> dict[str, Any]:
    content, intact = unseal(json.loads((folder / "completions.report.json").read_text()))
    assert intact
    return content


# --- What is made -------------------------------------------------------------------------------------------


def test_each_prompt_is_answered_and_a_bad_line_fails_alone():
    folder, outcome = answered()
    assert (outcome.code, outcome.err) == (FAILED, "")
    assert "5 prompts, 3 sequences (1 sample of each), 0 of them done already" in outcome.out
    assert "failed prompt     line 3: line 3 is not JSON: Expecting property name" in outcome.out
    assert "failed prompt     long: line 5: the prompt has 40000 tokens; with --max" in outcome.out
    assert "grids" not in outcome.out
    assert [(one["id"], one["sample"]) for one in completions(folder)] == [("sum", 0), ("2", 0), ("7", 0)]
    figures = report(folder)
    assert (figures["asked"], figures["tasks"], figures["sequences"]) == ("prompts", 5, 3)
    assert [one["task_id"] for one in figures["tasks_failed"]] == ["line 3", "long"]


def test_a_completion_says_what_the_store_has():
    folder, _ = answered()
    store, tokenizer = store_of(folder), AutoTokenizer.from_pretrained(TINY)
    for line in completions(folder):
        record = store[line["key"]]
        assert (record.task_id, record.test_index, record.augmentation) == (line["id"], 0, "identity")
        assert line["text"] == store.answer(record, tokenizer)
        assert (line["finish_reason"], line["tokens"]) == (record.finish_reason, record.generated_length)
        assert line["mean_logprob"] == pytest.approx(store.generated_logprobs(record).mean(), rel=1e-6)


def test_chats_are_read_through_the_template_and_texts_as_they_are():
    store, tokenizer = store_of(answered()[0]), AutoTokenizer.from_pretrained(TINY)
    texts = [tokenizer.decode(store.prompt_token_ids(record).tolist()) for record in store]
    assert texts == [
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHöi, 世界<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>The rule is",
    ]


def test_the_rows_of_prompts_and_answers_are_those_of_a_plain_forward_pass():
    folder, _ = answered()
    assert [record.prompt_rows for record in store_of(folder)] == [
        record.prompt_length for record in store_of(folder)
    ]
    for errors in stored_row_errors(folder, small_checkpoint()):
        assert errors.shape[0] == LAYERS
        assert errors.max() < 1e-5


def test_the_manifest_says_that_these_are_own_prompts():
    store = store_of(answered()[0])
    assert store.settings.prompt == {"prompt_version": "own-prompts-v0", "kv_cache_dtype": "float32"}


@pytest.mark.parametrize("generation", ["task", pytest.param("python", marks=pytest.mark.slow)])
def test_every_way_to_generate_writes_the_same_tokens(generation: str, tmp_path: Path):
    write_prompts(tmp_path, QUESTION, TEXT)
    assert run_prompts(tmp_path, generation=generation).code == DONE
    expected = tokens(answered()[0])
    assert tokens(tmp_path) == {name: expected[name] for name in expected if name[0] in ("sum", "7")}


# --- Prompts alone ------------------------------------------------------------------------------------------


def run_alone(folder: Path, **flags: Any) -> Any:
    return run_prompts(folder, **({"max_output_tokens": 0, "extract_prompt": True} | flags))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose prompts were read, and nothing generated. Not to be changed."""
    folder = tmp_path_factory.mktemp("alone")
    write_prompts(folder, QUESTION, CHAT, TEXT)
    outcome = run_alone(folder)
    assert (outcome.code, outcome.err) == (DONE, "")
    assert "prompts of up to 64 tokens, read one after the other" in outcome.out
    return folder


def test_without_tokens_the_rows_of_the_prompts_are_stored(alone: Path):
    store, answers = store_of(alone), store_of(answered()[0])
    assert [one.task_id for one in store] == [one.task_id for one in answers]
    for record, other in zip(store, answers, strict=True):
        assert (record.generated_length, record.finish_reason) == (0, "length")
        assert store.prompt_token_ids(record).tolist() == answers.prompt_token_ids(other).tolist()
        for layer in range(LAYERS):
            rows = answers.rows(other, layer)[: record.prompt_length]
            assert (store.rows(record, layer) == rows).all()
    lines = [(one["text"], one["tokens"], one["mean_logprob"]) for one in completions(alone)]
    assert lines == [("", 0, None)] * 3
    figures = report(alone)
    assert figures["made_at"]
    assert (figures["sequences"], figures["tokens_generated"]) == (3, 0)


def test_without_tokens_the_store_is_replayed_and_continued(alone: Path, tmp_path: Path):
    folder = Path(shutil.copytree(alone, tmp_path / "copy"))
    model = str(small_checkpoint())
    assert look_after(["verify", str(folder / "activations"), "--replay", "3", "--model_path", model]) == 0
    before = digests(folder)
    write_prompts(folder, QUESTION, CHAT, TEXT, {"id": "new", "text": "One more"})
    outcome = run_alone(folder)
    assert "4 prompts, 4 sequences (1 sample of each), 3 of them done already" in outcome.out
    assert {name: digests(folder)[name] for name in before} == before
    assert [one["id"] for one in completions(folder)] == ["sum", "2", "7", "new"]
    assert "no answers" in run_alone(folder, dry_run=True).out
    assert run_prompts(folder, extract_prompt=True).err.startswith(
        f"distributed_kv_cached_inference.py: error: {folder / 'activations'} was made with other settings "
        "(--max_output_tokens is 0 there"
    )


@pytest.mark.parametrize("generation", ["task", pytest.param("python", marks=pytest.mark.slow)])
def test_without_tokens_every_way_to_generate_stores_the_same(generation: str, alone: Path, tmp_path: Path):
    write_prompts(tmp_path, QUESTION, TEXT)
    assert run_alone(tmp_path, generation=generation).code == DONE
    store, expected = store_of(tmp_path), store_of(alone)
    for record in store:
        for layer in range(LAYERS):
            rows = expected.rows(expected[record.key], layer)
            assert row_errors(store.rows(record, layer), rows).max() < 1e-5


def test_without_tokens_a_puzzle_has_no_answer(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    outcome = run_main(tmp_path, max_output_tokens=0, extract_prompt=True)
    assert (outcome.code, outcome.err) == (DONE, "")
    assert "grids parsed      0 of 2" in outcome.out
    assert "solved            0 of 1 tasks, 0 of 1 tests" in outcome.out


# --- Again --------------------------------------------------------------------------------------------------


def test_the_same_command_again_makes_nothing_and_leaves_the_same_completions(folder: Path):
    before, stored = (folder / "completions.jsonl").read_bytes(), digests(folder)
    figures = report(folder)
    outcome = run_prompts(folder, extract_prompt=True)
    assert (outcome.code, outcome.err) == (FAILED, "")
    assert "3 of them done already" in outcome.out
    assert (folder / "completions.jsonl").read_bytes() == before
    assert digests(folder) == stored
    assert report(folder)["made_at"] == figures["made_at"]  # of the run that generated


def test_more_prompts_of_the_same_store_extend_the_completions(folder: Path):
    before = completions(folder)
    write_prompts(folder, {"id": "new", "text": "One more"})
    outcome = run_prompts(folder, extract_prompt=True)
    assert outcome.code == DONE
    assert "kept from earlier runs of this store: 3 completions" in outcome.out
    new, *kept = completions(folder)
    assert new["id"] == "new"
    assert kept == before


def test_a_changed_prompt_is_made_anew_and_its_old_completion_goes(folder: Path):
    old = {one["id"]: one["key"] for one in completions(folder)}
    file = write_prompts(folder, {**QUESTION, "prompt": "What is 3 + 3?"}, CHAT, "", TEXT)
    outcome = run_prompts(folder, extract_prompt=True)
    assert outcome.code == DONE
    assert "1 of 3 sequences are in the store with other prompts, of the prompts sum" in outcome.err
    now = {one["id"]: one["key"] for one in completions(folder)}
    assert now["sum"] != old["sum"]
    assert (now["2"], now["7"]) == (old["2"], old["7"])
    store = str(folder / "activations")
    assert look_after(["verify", store, "--dataset", str(file)]) == 1  # the old one is there still
    assert look_after(["verify", store, "--dataset", str(file), "--repair"]) == 0
    assert sorted(record.key for record in store_of(folder)) == sorted(now.values())


def test_several_samples_of_a_prompt_differ_and_share_its_rows(tmp_path: Path):
    write_prompts(tmp_path, QUESTION, TEXT)
    flags = {"temperature": 1.0, "extract_prompt": True}
    assert run_prompts(tmp_path, predictions_per_task=3, **flags).code == DONE
    lines = completions(tmp_path)
    assert [(one["id"], one["sample"]) for one in lines] == [
        (name, sample) for name in ("sum", "7") for sample in range(3)
    ]
    assert len({one["text"] for one in lines if one["id"] == "sum"}) == 3
    rows = {record.sample_index: record.prompt_rows > 0 for record in store_of(tmp_path)}
    assert rows == {0: True, 1: False, 2: False}
    fewer = run_prompts(tmp_path, predictions_per_task=1, **flags)  # of the same store
    assert "2 sequences (1 sample of each), 2 of them done already" in fewer.out
    assert sorted(one["key"] for one in completions(tmp_path)) == sorted(one["key"] for one in lines)


def test_shares_of_two_processes_are_merged_into_one_file(tmp_path: Path):
    write_prompts(tmp_path, QUESTION, TEXT)
    for index in (0, 1):
        assert run_prompts(tmp_path, num_shards=2, shard_index=index).code == DONE
    assert run_prompts(tmp_path, merge=True).code == DONE
    assert [one["id"] for one in completions(tmp_path)] == ["sum", "7"]
    assert len(list((tmp_path / "activations").glob("host-*/shard-*"))) == 2


# --- Checks -------------------------------------------------------------------------------------------------


def test_verify_covers_the_prompts_and_computes_them_again(capsys: pytest.CaptureFixture[str]):
    folder, _ = answered()
    words = ["verify", str(folder / "activations"), "--report", str(folder / "completions.report.json")]
    words += ["--replay", "3", "--model_path", str(small_checkpoint())]
    # The prompt that is too long has no sequence, as a puzzle that is.
    assert look_after([*words, "--dataset", str(folder / "prompts.jsonl")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "task long test 0 has no sequence",
        "3 sequences, 1 findings",
    ]


def test_completions_that_something_else_left_or_changed_are_set_aside(folder: Path):
    (folder / "completions.jsonl").write_text("mine\n")
    outcome = run_prompts(folder, extract_prompt=True)
    assert "this store did not leave completions.jsonl like that" in outcome.out
    assert (folder / "completions.1.jsonl").read_text() == "mine\n"
    assert (folder / "completions.jsonl").read_bytes() == (answered()[0] / "completions.jsonl").read_bytes()
    store, aside = str(folder / "activations"), str(folder / "completions.1.report.json")
    assert look_after(["verify", store, "--report", aside]) == 1  # what it names is not that any more


def test_a_crash_between_report_and_completions_sets_nothing_aside(folder: Path):
    old = (folder / "completions.jsonl").read_bytes()
    write_prompts(folder, TEXT, {"id": "new", "text": "One more"})
    assert run_prompts(folder, extract_prompt=True).code == DONE
    new = (folder / "completions.jsonl").read_bytes()
    (folder / "completions.jsonl").write_bytes(old)  # the report was written, and then came the crash
    outcome = run_prompts(folder, extract_prompt=True)
    assert "did not leave" not in outcome.out
    assert (folder / "completions.jsonl").read_bytes() == new
    assert not (folder / "completions.1.jsonl").exists()


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
def test_a_store_of_puzzles_takes_no_prompts_and_the_other_way_round(finished: Path, folder: Path):
    flags = {"activations_dir": finished / "activations"}
    assert_refused(run_prompts(folder, **flags), "holds puzzles, and a store has one kind; choose another")
    flags = {"activations_dir": folder / "activations", "output_filepath": folder / "submission.json"}
    outcome = run_main(finished, **flags)
    assert_refused(
        outcome, "holds own prompts, and a store has one kind; choose another --activations_dir for"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(tmp_path: Path):
    assert_refused(run_prompts(tmp_path), "--prompts: cannot read")
    (tmp_path / "prompts.jsonl").mkdir()
    assert_refused(run_prompts(tmp_path), "is a directory; name a file of prompts")
    (tmp_path / "prompts.jsonl").rmdir()
    write_prompts(tmp_path, {"text": ""}, "words")
    assert_refused(run_prompts(tmp_path), 'has no prompt that can be used: line 1 has an empty "text"')
    write_prompts(tmp_path, {"text": "7" * 40_000})
    assert_refused(
        run_prompts(tmp_path), "has no prompt that can be used: line 1: the prompt has 40000 tokens"
    )
    file = write_prompts(tmp_path, TEXT)
    assert_refused(run_prompts(tmp_path, output_filepath=file), "is the file of the prompts; name another")
    assert not (tmp_path / "activations").exists()


def test_a_model_without_a_chat_template_continues_texts_alone(tmp_path: Path):
    model = copy_small(tmp_path / "model")
    template(None)(model)
    write_prompts(tmp_path, QUESTION, TEXT)
    outcome = run_prompts(tmp_path, model_path=model)
    assert_refused(
        outcome, "has no chat template; use the tokenizer of a chat model, or give prompts of your own"
    )
    write_prompts(tmp_path, TEXT)
    assert run_prompts(tmp_path, model_path=model).code == DONE
    name = ("7", 0, "identity", 0)
    assert tokens(tmp_path) == {name: tokens(answered()[0])[name]}
