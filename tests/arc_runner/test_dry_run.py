"""A dry run checks what a run checks, says what it would do, and leaves no trace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prompt_cases import QUESTION, TEXT, answered, run_prompts, write_prompts
from runner_cases import (
    TINY,
    assert_refused,
    copy_small,
    four,
    puzzle,
    run_main,
    small_checkpoint,
    write_tasks,
)
from transformers import AutoTokenizer

from activation_store import ActivationStore

DONE = 0


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every file and folder within, with its size and when it was changed."""
    paths = sorted([folder, *folder.rglob("*")])
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


@pytest.mark.usefixtures("no_weights")
def test_nothing_is_made_or_changed_where_nothing_was_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    four(tmp_path)
    before = listing(tmp_path)
    flags = {"output_filepath": tmp_path / "new" / "s.json", "compilation_cache_dir": tmp_path / "cache"}
    outcome = run_main(tmp_path, dry_run=True, **flags)
    assert (outcome.code, outcome.err) == (DONE, "")
    assert listing(tmp_path) == before
    assert "  tasks             4 (0 failed)\n" in outcome.out
    assert "8 (each test input in 2 augmentations x 1 samples), 0 of them done already" in outcome.out
    assert "  slots             8 for prompts of up to 64 tokens, windows of 16 steps: about " in outcome.out


@pytest.mark.usefixtures("no_weights")
def test_nothing_of_a_store_that_is_there_is_changed_and_what_is_done_is_counted(finished: Path):
    before = listing(finished)
    outcome = run_main(finished, dry_run=True)
    assert (outcome.code, outcome.err) == (DONE, "")
    assert listing(finished) == before
    assert "8 of them done already" in outcome.out
    assert "slots" not in outcome.out  # there is nothing to generate


def test_the_plan_of_own_prompts_has_their_lengths_their_failures_and_one_whole_prompt(tmp_path: Path):
    write_prompts(tmp_path, QUESTION, TEXT, "{torn")
    outcome = run_prompts(tmp_path, dry_run=True, temperature=1.0, predictions_per_task=3)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    longest, shortest = len(tokenizer.encode(text)), len(tokenizer.encode(TEXT["text"]))
    median = round((longest + shortest) / 2)
    assert (outcome.code, outcome.err) == (DONE, "")
    assert f"prompt tokens     {shortest} to {longest}, median {median}; answers of up to 8" in outcome.out
    assert "6 (3 samples of each)" in outcome.out
    assert "failed prompt     line 3: line 3 is not JSON" in outcome.out
    assert outcome.out.endswith(f"the first prompt (sum; {longest} tokens):\n{text}\n")


def test_the_bytes_to_store_are_an_upper_limit_and_close_where_answers_are_long():
    folder, _ = answered()
    outcome = run_prompts(folder, extract_prompt=True, dry_run=True, activations_dir=folder / "none")
    [(number, unit)] = re.findall(r"at most ([0-9.]+) (kB|MB)", outcome.out)
    limit = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    store = ActivationStore(folder / "activations")
    stored = sum(record.shard_bytes for record in store) / len(store)
    assert stored < limit < 2 * stored


@pytest.mark.parametrize("generation", ["task", "python"])
def test_calls_are_planned_as_a_run_would_make_them(generation: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", short=puzzle(1, 2), long=puzzle(*range(9)))
    outcome = run_main(tmp_path, dry_run=True, generation=generation)
    assert outcome.code == DONE
    assert re.search(r"calls             2, in [12] shapes\n  memory            weights ", outcome.out)


@pytest.mark.usefixtures("no_weights")
def test_what_a_run_refuses_a_dry_run_refuses(finished: Path, tmp_path: Path):
    four(tmp_path)
    outcome = run_main(finished, dry_run=True, max_output_tokens=9)
    assert_refused(outcome, "--max_output_tokens is 8 there and 9 here")
    (tmp_path / "file").write_text("")
    outcome = run_main(tmp_path, dry_run=True, output_filepath=tmp_path / "file" / "s.json")
    assert_refused(outcome, "--output_filepath: cannot write in")
    model = copy_small(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"")
    assert_refused(run_main(tmp_path, dry_run=True, model_path=model), "is not a whole safetensors file")
    assert_refused(
        run_main(tmp_path, dry_run=True, model_path="nobody/has-this-model"), "--dry_run downloads nothing"
    )


def test_it_is_quick_as_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def compile_slots(*_: object) -> None:
        pytest.fail("programs are compiled")

    monkeypatch.setattr("qwen2_engine.continuous_batching.compile_slots", compile_slots)
    assert run_main(four(tmp_path), dry_run=True, model_path=small_checkpoint()).code == DONE
