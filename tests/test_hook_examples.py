"""The examples of hook points and interventions show what they claim, on the embedded model."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))  # examples are no part of what is installed
import logit_lens  # noqa: E402
import steering  # noqa: E402
from tiny_model.asking import answers_of, held_out_puzzles, load_tiny_model, prompts_of  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default::DeprecationWarning")]
LAYERS = 24


def run(monkeypatch: pytest.MonkeyPatch, script: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *options])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any, Any]:
    return load_tiny_model()


@pytest.fixture(scope="module")
def solved(tiny: tuple[Any, Any, Any]) -> tuple[np.ndarray, list[int]]:
    """The prompt and the answer of a puzzle that the model solves."""
    puzzles = held_out_puzzles("flip-left-right", 1, "lens")
    return prompts_of(tiny[2], puzzles)[0], answers_of(tiny[2], puzzles, "flip-left-right")[0]


# --- Logit lens and attribution -----------------------------------------------------------------------------


def test_the_lens_at_the_last_layer_reads_the_answer_and_at_the_first_layer_it_does_not(
    tiny: Any, solved: Any
):
    config, params, _ = tiny
    prompt, answer = solved
    logits = logit_lens.logit_lens(config, params, np.concatenate([prompt, answer]))
    likeliest = np.asarray(logits[:, -len(answer) - 1 : -1].argmax(-1))
    assert likeliest[-1].tolist() == answer
    right = (likeliest == answer).mean(1)
    assert right[0] < 0.4
    assert right[12] > 0.6


@pytest.mark.parametrize("token", [0, 5, 12])
def test_all_parts_of_a_logit_sum_to_it(tiny: Any, solved: Any, token: int):
    config, params, _ = tiny
    prompt, answer = solved
    ids = np.concatenate([prompt, answer])[: len(prompt) + token]
    parts, logit = logit_lens.attribution(config, params, ids, answer[token])
    assert len(parts) == 1 + 2 * LAYERS
    assert sum(parts.values()) == pytest.approx(logit, rel=1e-4)
    assert logit > 5


def test_the_tables_of_the_lens_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    run(monkeypatch, "logit_lens.py")
    out = capsys.readouterr().out
    assert "layers 8-11" in out
    total, logit = (line.split()[-1] for line in out.splitlines() if line.startswith(("sum of", "logit of")))
    assert total == logit


# --- Patching -----------------------------------------------------------------------------------------------


def test_patching_moves_the_answer_first_at_an_example_and_at_last_where_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    activation_patching = pytest.importorskip("activation_patching", reason="the plot needs matplotlib")
    found, tokenizer = activation_patching.patch_rules()
    layers, last = LAYERS, len(found.token_ids[0]) - 1
    assert found.effect.shape == (layers, last + 1)
    differ = np.flatnonzero(found.token_ids[0] != found.token_ids[1])
    np.testing.assert_allclose(found.effect[:, : differ[0]], 0, atol=1e-3)  # the two runs are one until there
    assert differ[0] <= found.effect[0].argmax() <= differ[-1]
    assert found.effect[0].max() > 0.15
    assert abs(found.effect[0, last]) < 0.05
    np.testing.assert_allclose(found.effect[-1, last], 1, atol=1e-3)
    assert found.effect[16, last] > 0.5
    np.testing.assert_allclose(found.effect[-1, :last], 0, atol=1e-4)
    activation_patching.draw(found, tokenizer, tmp_path / "patching.png")
    assert (tmp_path / "patching.png").read_bytes().startswith(b"\x89PNG")


# --- Steering -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steered() -> Any:
    return steering.Steering("turn-clockwise", "copy-beside")


def test_learned_vectors_flip_the_rule_on_held_out_puzzles_and_the_clean_rows_keep_theirs(steered: Any):
    shares = steered.measure(steered.learn(), "all")
    assert steering.STRENGTHS[0] == 0
    assert steering.STRENGTHS[4] == 1
    assert shares.own[0] == 1
    assert shares.other[0] == 0
    assert shares.own[4] == 0
    assert shares.other[4] >= 0.4


def test_the_difference_of_the_means_disturbs_the_rule_and_does_not_flip_it(steered: Any):
    shares = steered.measure(steering.only(steering.STRONGER * steered.mean_difference(), 7), "generated")
    assert shares.own[0] == 1
    assert not shares.other.any()
