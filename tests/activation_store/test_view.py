"""The page of a store: what is in it and what is left out, that no text of a store is taken for HTML."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from activation_fakes import batch, sequence, settings
from picture_stores import HOSTILE, LAYERS, SINK, make_page_store

from activation_store import ActivationStore, ActivationWriter, StoreError
from activation_store.__main__ import main
from activation_store.probes import Probe
from activation_store.view import make_page, script_json, write_page
from activation_store.view_data import Tint, ViewChoice, page_data, set_scale
from activation_store.view_text import open_reader


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_page_store(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def data(store: ActivationStore) -> dict[str, Any]:
    with open_reader(store) as reader:
        return page_data(store, reader, ViewChoice())


@pytest.fixture
def plain(tmp_path: Path) -> ActivationStore:
    """A store of prompts that are no puzzles, made by a model that is not named."""
    return write(tmp_path / "plain", batch("a", "bb"), prompt={})


def write(directory: Path, *batches: Any, **changes: Any) -> ActivationStore:
    with ActivationWriter(directory, settings(**changes), provenance={}) as writer:
        for one in batches:
            writer.submit(one)
    return ActivationStore(directory)


def shown(store: ActivationStore, **choice: Any) -> dict[str, Any]:
    with open_reader(store) as reader:
        return page_data(store, reader, ViewChoice(**choice))


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.float32)


def part_of(text: str, element: str) -> str:
    found = re.search(rf"<{element}[^>]*>(.*?)</{element}>", text, re.DOTALL)
    assert found
    return found[1]


# --- What is on the page ------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_stored_rows(store: ActivationStore, data: dict[str, Any]):
    record = next(store.sequences(task_ids="mirror-beside"))
    prompt = next(one for one in data["prompts"] if one["task"] == "mirror-beside")
    sample = prompt["samples"][0]
    tint = 1 + LAYERS.index(17)
    assert data["tints"][tint]["label"] == "norm of layer 17"
    norms = np.concatenate([floats(prompt["values"][tint]), floats(sample["values"][tint])])
    np.testing.assert_allclose(norms, np.linalg.norm(store.rows(record, 17), axis=1), rtol=1e-5)
    np.testing.assert_array_equal(floats(sample["values"][0]), store.generated_logprobs(record))
    assert [*prompt["tokens"], *sample["tokens"]] == store.tokens(record).tolist()


def test_grids_are_those_of_the_prompt_and_the_right_answer_is_turned_with_them(data: dict[str, Any]):
    prompt = next(one for one in data["prompts"] if one["task"] == "mirror-beside")
    assert prompt["augmentation"] == "rot90"
    assert prompt["puzzle"]["train"][0] == [["200", "000", "100"], ["200", "000", "100", "100", "000", "200"]]
    assert prompt["samples"][0]["grid"] == prompt["puzzle"]["truth"]
    assert prompt["samples"][1]["grid"] != prompt["puzzle"]["truth"]
    assert [sample["solved"] for sample in prompt["samples"]] == [True, False]


def test_tokens_are_shown_with_their_text(data: dict[str, Any]):
    words = data["vocabulary"]
    prompt = "".join(words[token] for token in data["prompts"][1]["tokens"])
    assert "### Example 1\n\nInput:\n```grid shape: 2x3\n1 201\n2 002\n```\n\nOutput:" in prompt
    assert "".join(words[token] for token in data["prompts"][1]["samples"][0]["tokens"]).startswith(
        f"I think {HOSTILE}"
    )


def test_a_page_without_tokenizer_and_data_set_has_tokens_and_numbers(plain: ActivationStore):
    data = shown(plain)
    assert data["notes"] == ["tokens are shown by their numbers: give --model_path, the model of the store"]
    assert [prompt["puzzle"] for prompt in data["prompts"]] == [None, None]
    first = data["prompts"][0]["tokens"][0]
    assert data["vocabulary"][first] == f"#{first}"


def test_without_its_data_set_a_store_shows_the_grids_of_its_prompts(tmp_path: Path):
    store = make_page_store(tmp_path)
    (tmp_path / "tasks.json").unlink()
    data = shown(ActivationStore(store.directory))
    puzzle = data["prompts"][0]["puzzle"]
    assert (len(puzzle["train"]), puzzle["truth"]) == (3, None)
    assert "right answers are not known: give --dataset, the data set of the store" in data["notes"]


def test_a_changed_puzzle_has_no_right_answer(store: ActivationStore, tmp_path: Path):
    pair = {"input": [[1]], "output": [[2]]}
    (tmp_path / "other.json").write_text(json.dumps({"swap-colours": {"train": [pair], "test": [pair]}}))
    with open_reader(store, dataset=str(tmp_path / "other.json")) as reader:
        data = page_data(store, reader, ViewChoice(task_ids=["swap-colours"]))
    assert data["prompts"][0]["puzzle"]["truth"] is None
    assert len(data["prompts"][0]["puzzle"]["train"]) == 2
    assert "the data set has another puzzle swap-colours now: its right answer is left out" in data["notes"]


def test_prompts_without_rows_are_said_to_have_none(tmp_path: Path):
    without = settings(capture_prompt=False)
    data = shown(write(tmp_path / "store", batch("a", of=without), capture_prompt=False))
    assert data["prompts"][0]["values"] is None
    assert "prompt tokens have no rows: the run was made without --extract_prompt" in data["notes"]


def test_a_store_without_activations_shows_log_probabilities(tmp_path: Path):
    data = shown(write(tmp_path / "store", batch("a", of=settings(hook_names=())), hook_names=()))
    assert [tint["label"] for tint in data["tints"]] == ["log-probability"]


def test_failed_sequences_are_counted(tmp_path: Path):
    bad = sequence("bad")
    assert bad.rows is not None
    bad.rows[0, 0, 0] = np.nan
    data = shown(write(tmp_path / "store", [bad], batch("a")))
    assert "failed sequences, which have nothing to show: 1" in data["notes"]
    assert [prompt["task"] for prompt in data["prompts"]] == ["a"]


# --- What is left out ---------------------------------------------------------------------------------------


def test_each_puzzle_is_shown_before_the_second_sequence_of_any(plain: ActivationStore):
    data = shown(plain, n=2)
    assert [(one["task"], len(one["samples"])) for one in data["prompts"]] == [("a", 1), ("bb", 1)]
    assert data["notes"][0] == "2 of 4 sequences are on this page: --task and --n choose others"


def test_a_page_does_not_outgrow_its_room(plain: ActivationStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("activation_store.view_data.MOST_VALUES", 120)
    data = shown(plain)
    assert sum(len(one["samples"]) for one in data["prompts"]) == 2
    assert "2 more would make the page too large: choose --layers or --task" in data["notes"]


def test_tasks_and_layers_can_be_chosen(plain: ActivationStore):
    data = shown(plain, task_ids=["bb"], layers=[12])
    assert [one["task"] for one in data["prompts"]] == ["bb"]
    assert [tint["label"] for tint in data["tints"]] == ["log-probability", "norm of layer 12"]


# --- Scales -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "low", "high"),
    [
        ("norm", [2.0, 3.0, 4.0, 4.0 * SINK], 2.0, 4.0),
        ("direction", [-3.0, 1.0], -2.98, 2.98),
        ("feature", [0.0] * 9 + [1.0, 3.0, 900.0, 0.5], 0.0, 3.0),
        ("feature", [0.0, 0.0], 0.0, 0.0),
        ("logprob", [np.nan, -2.0, -1.0], -1.99, 0.0),
        ("logprob", [np.nan], 0.0, 0.0),
    ],
)
def test_a_scale_leaves_room_for_the_numbers_that_are_not_extreme(
    kind: str, values: list[float], low: float, high: float
):
    tint = Tint("", kind, None)
    set_scale(tint, np.array(values, np.float32))
    assert (tint.low, tint.high) == pytest.approx((low, high))


# --- The file -----------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_names_no_address(store: ActivationStore, tmp_path: Path, data: Any):
    with open_reader(store) as reader:
        size = write_page(store, tmp_path / "page.html", reader, ViewChoice())
    page = (tmp_path / "page.html").read_text()
    assert size == len(page.encode()) < 300_000
    assert re.search("https?:|//[a-z]|@import|url\\(", page) is None
    assert "default-src 'none'" in page
    assert json.loads(part_of(page, "script")) == json.loads(json.dumps(data))


@pytest.mark.parametrize(
    "text", [HOSTILE, "<!--<script>", "]]>", "https://example.org/x", "@STYLE@", "\u2028"]
)
def test_no_text_of_a_store_ends_the_script_or_is_an_address(text: str):
    written = script_json([text])
    assert not set("<>&/\u2028") & set(written)
    assert json.loads(written) == [text]
    page = make_page({"name": text, "text": text})
    assert page.count("<script") == 2
    assert page.count("<img") == page.count("<!--") == 0
    assert json.loads(part_of(page, "script")) == {"name": text, "text": text}


def test_an_earlier_page_is_replaced_and_another_file_is_not(
    plain: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["view", plain.directory, "--output"]
    assert main([*words, str(tmp_path / "page.html")]) == 0
    assert main([*words, str(tmp_path / "page.html"), "--n", "1"]) == 0
    assert re.search(r"page\.html \(0\.\d MB\): open it in a browser\n$", capsys.readouterr().out)
    (tmp_path / "tasks.json").write_text("{}")
    assert main([*words, str(tmp_path / "tasks.json")]) == 2
    assert (tmp_path / "tasks.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "{store}/page.html"], "is in the store itself"),
        (["--output", "{folder}"], "is a folder"),
        (["--output", "{folder}/none/page.html"], "there is no folder"),
        (["--output", "gs://bucket/page.html"], "to a local place"),
        (["--output", "{folder}/p.html", "--task", "a,nothing"], "has no sequence of task nothing"),
        (["--output", "{folder}/p.html", "--task", "a,,bb"], "a name missing between the commas"),
        (["--output", "{folder}/p.html", "--layers", "10,3"], "layer 3 is not in"),
        (["--output", "{folder}/p.html", "--n", "0"], "is no whole number from 1"),
        (["--output", "{folder}/p.html", "--sae", "{folder}"], "--sae needs --feature"),
        (["--output", "{folder}/p.html", "--feature", "1"], "--feature needs --sae"),
        (["--output", "{folder}/p.html", "--direction", "{store}/manifest.json"], "cannot be read as safe"),
        (["--output", "{folder}/p.html", "--lyers", "10"], "did you mean --layers?"),
    ],
)
def test_bad_usage_is_a_sentence_and_exit_code_2(
    plain: ActivationStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
):
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(
            [
                "view",
                plain.directory,
                *(word.format(store=plain.directory, folder=tmp_path) for word in words),
            ]
        )
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_store_is_a_sentence(tmp_path: Path):
    with pytest.raises(StoreError, match="has no sequence that could be shown: run the main job first"):
        shown(write(tmp_path / "store"))


def test_a_probe_of_a_layer_that_is_not_stored_is_refused(plain: ActivationStore):
    probe = Probe("up", "direction", 3, lambda rows: rows[:, 0])
    with pytest.raises(StoreError, match="layer 3 is not in"):
        shown(plain, probes=(probe,))
