"""A model that was trained, SmolLM2-135M-Instruct as a Qwen2, through all that the project does.

Random models have neither attention sinks nor massive activations: here the first token's rows are a hundred
times as long as all others, and single rows are what is left of numbers several times as large.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_prompts import PROMPTS

from activation_store import ActivationStore
from activation_store.__main__ import main as store_command
from distributed_kv_cached_inference import main as run
from generate_jitted import generate_single_task_jitted, pad_prompts
from qwen2_jax import QwenModel, load_qwen2

pytest.importorskip("torch", reason="the trained model needs torch: pip install '.[real]'")
pytest.importorskip("gguf", reason="the trained model needs gguf: pip install '.[real]'")
pytest.importorskip("accelerate", reason="the trained model needs accelerate: pip install '.[real]'")
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from benchmarks import row_errors
from examples import make_real_checkpoint, train_sae

pytestmark = pytest.mark.real

STEPS = 24
LAYERS = (5, 15, 25, 29)
MIDDLE = 15
SINK = 25_105  # the norm of the first token's row after the middle layers; that of others is about 190
TIE = 1e-3  # logits are about 20; two that are as near as this are the same in float32


@dataclasses.dataclass(frozen=True)
class Real:
    """The model in both dtypes, and its tokenizer."""

    float32: Path
    bfloat16: Path
    tokenizer: Any

    def chat(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    model, tokenizer = make_real_checkpoint.read(make_real_checkpoint.find_gguf(folder))
    for dtype in ("float32", "bfloat16"):
        make_real_checkpoint.write(model, tokenizer, folder / dtype, dtype)
    return Real(folder / "float32", folder / "bfloat16", AutoTokenizer.from_pretrained(folder / "float32"))


@pytest.fixture(scope="module")
def stored(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the prompts on the bfloat16 model: the store and the completions."""
    folder = tmp_path_factory.mktemp("run")
    lines = [json.dumps({"id": f"{n:02}", "prompt": prompt}) for n, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    words = ["--prompts", folder / "prompts.jsonl", "--activations_dir", folder / "store"]
    words += ["--output_filepath", folder / "completions.jsonl", "--model_path", real.bfloat16]
    words += ["--layers_to_extract", *LAYERS, "--extract_prompt", "--max_output_tokens", STEPS]
    assert run(list(map(str, words))) == 0
    return folder


# --- Tokens -------------------------------------------------------------------------------------------------


@torch.no_grad()
def theirs(model: Any, prompts: list[list[int]]) -> np.ndarray:
    """Greedy tokens [P, STEPS] of Transformers' own loop, its prompts padded on the left."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros((2, len(prompts), width), dtype=torch.int64)
    for row, valid, prompt in zip(ids, mask, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt)
        valid[width - len(prompt) :] = 1
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, do_sample=False, **settings)[:, width:].numpy()


@torch.no_grad()
def margin(model: Any, before: list[int], one: int, other: int) -> float:
    """How far apart two tokens' logits are after some tokens."""
    logits = model(torch.tensor([before])).logits[0, -1]
    return float((logits[one] - logits[other]).abs())


def test_greedy_tokens_of_forty_prompts_are_those_of_transformers_in_float32(real: Real):
    prompts = [real.chat(prompt) for prompt in PROMPTS]
    config, params = load_qwen2(real.float32, scan_layers=True)
    ids, lengths = pad_prompts(prompts)
    out = generate_single_task_jitted(
        QwenModel(config), params, ids, STEPS, prompt_lengths=lengths, extract_activations=False
    )
    ours = np.asarray(out.token_ids)
    assert np.isfinite(out.logprobs).all()
    assert len(np.unique(ours)) > 200  # of 960: it writes different things
    model = Qwen2ForCausalLM.from_pretrained(real.float32).eval()
    expected = theirs(model, prompts)
    for prompt, mine, right in zip(prompts, ours, expected, strict=True):
        if not np.array_equal(mine, right):  # only at a tie, and there both go their own way
            at = int(np.argmin(mine == right))
            assert margin(model, [*prompt, *right[:at]], mine[at], right[at]) < TIE, (prompt, at)
    assert sum(np.array_equal(mine, right) for mine, right in zip(ours, expected, strict=True)) >= 38


def test_it_answers_questions(stored: Path):
    lines = [json.loads(line) for line in (stored / "completions.jsonl").read_text().splitlines()]
    answers = {PROMPTS[int(line["id"])]: line["text"] for line in lines}
    assert len(answers) == len(PROMPTS)
    assert "Paris" in answers["What is the capital of France?"]
    assert "Tokyo" in answers["What is the capital of Japan?"]
    assert "Shakespeare" in answers["Who wrote Romeo and Juliet?"]


# --- Rows ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(real: Real) -> row_errors.Tokens:
    """Two chats and an answer that is given."""
    return row_errors.Tokens(*(part[:2] for part in row_errors.real_tokens(real.bfloat16)))


def test_float32_rows_are_as_near_to_float64_as_those_of_transformers(real: Real, tokens: row_errors.Tokens):
    truth = row_errors.their_rows(real.float32, tokens, "float32", exact=True)
    ours = row_errors.row_errors(row_errors.our_rows(real.float32, tokens, "float32", "float32"), truth)
    theirs = row_errors.row_errors(row_errors.their_rows(real.float32, tokens, "float32"), truth)
    for mine, others in zip(ours, theirs, strict=True):
        assert np.median(mine) < 2 * np.median(others) < 1e-5
        assert mine.max() < 1e-4


def test_bfloat16_rows_are_twice_as_near_to_float64_as_those_of_transformers(
    real: Real, tokens: row_errors.Tokens
):
    truth = row_errors.their_rows(real.bfloat16, tokens, "bfloat16", exact=True)
    ours = row_errors.row_errors(row_errors.our_rows(real.bfloat16, tokens, "bfloat16", "float32"), truth)
    theirs = row_errors.row_errors(row_errors.their_rows(real.bfloat16, tokens, "bfloat16"), truth)
    for mine, others in zip(ours, theirs, strict=True):  # of first tokens, of all others
        assert mine.max() < 0.6 * others.max()
    assert np.median(ours[1]) < 0.6 * np.median(theirs[1])
    assert np.median(ours[1]) < 0.007
    # All chats begin with the same token: the median of one token's layers varies with the order of sums.
    assert np.median(ours[0]) < 0.9 * np.median(theirs[0])


def test_the_first_token_has_massive_activations(stored: Path):
    store = ActivationStore(stored / "store")
    assert store.settings.residual_dtype == "float32"
    assert store.dtype.name == "bfloat16"
    for record in store:
        norms = np.linalg.norm(store.rows(record, MIDDLE), axis=1)
        assert norms[0] == pytest.approx(SINK, rel=0.01)
        assert 100 < np.median(norms[1:]) < 300
        assert norms[1:].max() < 0.1 * SINK
        one_column = np.abs(store.rows(record, MIDDLE)[0]).max()
        assert one_column > 0.95 * norms[0]


# --- What follows from a store ------------------------------------------------------------------------------


def test_its_store_is_sound_and_replays(stored: Path, real: Real):
    words = ["verify", stored / "store", "--replay", 4, "--model_path", real.bfloat16]
    assert store_command(list(map(str, words))) == 0


def test_its_rows_are_exported(stored: Path, tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="the export needs the extra `sae`")
    words = [
        "export",
        stored / "store",
        "--layer",
        MIDDLE,
        "--context_size",
        16,
        "--output",
        tmp_path / "out",
    ]
    assert store_command(list(map(str, words))) == 0
    store = ActivationStore(stored / "store")
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert len(loaded) == sum(record.n_rows for record in store) // 16


def test_a_small_autoencoder_learns_its_rows(stored: Path):
    store = ActivationStore(stored / "store")
    autoencoder, losses = train_sae.train(store, MIDDLE, steps=300, batch_size=256, features=512)
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    rows = np.concatenate([store.rows(record, MIDDLE)[record.prompt_rows :] for record in store])
    again = autoencoder.encode(rows) @ autoencoder.W_dec + autoencoder.b_dec
    unexplained = ((again - rows) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    assert unexplained < 0.5
