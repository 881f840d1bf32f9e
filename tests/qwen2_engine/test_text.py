"""Texts and chats in, texts and rows out: what the runner stores, and right by a plain forward pass."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from prompt_cases import CHAT, QUESTION, TEXT, answered
from runner_cases import TINY, plain_rows, small_checkpoint, store_of
from thinking_cases import CHOICE, tokenizer_with
from transformers import AutoTokenizer

from generate_jitted import Sampling, generate_single_task_jitted, pad_prompts
from qwen2_core.hook_points import LN_FINAL
from qwen2_core.interventions import Add
from qwen2_engine import GeneratedText, continuous_batching, generate_text
from qwen2_jax import QwenModel, load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

PROMPTS = [[{"role": "user", "content": QUESTION["prompt"]}], CHAT["messages"], TEXT["text"]]
Parts = tuple[Any, Any, Any]
TOKENS = 8  # the runner's tests' own --max_output_tokens


@pytest.fixture(scope="module")
def parts() -> Parts:
    """Model, parameters and tokenizer of the small checkpoint."""
    config, params = load_qwen2(small_checkpoint())
    return create_model_with_hooks(config, (0, 1)), params, AutoTokenizer.from_pretrained(small_checkpoint())


@pytest.fixture(scope="module")
def results(parts: Parts) -> list[GeneratedText]:
    return generate_text(*parts, PROMPTS, TOKENS, extract_prompt=True)


def test_tokens_and_rows_are_those_that_the_runner_stores(results: list[GeneratedText]):
    folder, _ = answered()
    store = store_of(folder)
    assert [one.prompt for one in results] == [0, 1, 2]
    for one, record in zip(results, store, strict=True):
        assert one.token_ids.tolist() == store.generated_tokens(record).tolist()
        assert one.prompt_token_ids.tolist() == store.prompt_token_ids(record).tolist()
        assert one.text == store.answer(record, AutoTokenizer.from_pretrained(TINY))
        assert one.finish_reason == record.finish_reason
        assert np.array_equal(one.logprobs, store.generated_logprobs(record))
        for layer in (0, 1):
            rows = np.concatenate([one.prompt_layer(layer), one.layer(layer)])
            assert np.array_equal(rows, store.rows(record, layer))


def test_a_greedy_answer_is_what_the_whole_sequence_says_at_each_place(
    results: list[GeneratedText], parts: Parts
):
    model, params, _ = parts
    one = results[2]
    ids = np.concatenate([one.prompt_token_ids, one.token_ids])
    logits = np.asarray(QwenModel(model.config).apply({"params": params}, jnp.asarray(ids[None]))[0])[0]
    prompt = len(one.prompt_token_ids)
    assert logits[prompt - 1 : -1].argmax(axis=-1).tolist() == one.token_ids.tolist()
    expected = plain_rows(small_checkpoint(), (0, 1), ids)[1]
    assert np.allclose(one.prompt_layer(1), expected[:prompt], rtol=1e-4, atol=1e-4)
    assert np.allclose(one.layer(1), expected[prompt:], rtol=1e-4, atol=1e-4)
    assert one.layer(1).dtype == np.float32
    assert np.ptp(one.layer(1), axis=0).min() > 0  # the rows differ


def test_without_tokens_the_rows_of_prompts_come_alone(results: list[GeneratedText], parts: Parts):
    alone = generate_text(*parts, PROMPTS, 0, extract_prompt=True, samples_per_prompt=2)
    assert [(one.prompt, one.sample) for one in alone] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for one in alone:
        assert (one.text, one.finish_reason, len(one.token_ids)) == ("", "length", 0)
        for layer in (0, 1):
            assert np.array_equal(one.prompt_layer(layer), results[one.prompt].prompt_layer(layer))
            assert one.layer(layer).shape == (0, parts[0].config.hidden_size)
    with pytest.raises(ValueError, match="max_tokens 0 generates nothing"):
        generate_text(*parts, PROMPTS, 0)


def test_tokens_come_as_texts_too(results: list[GeneratedText]):
    one = results[2]
    assert one.prompt_text == TEXT["text"]
    assert "".join(one.prompt_tokens) == one.prompt_text
    assert one.prompt_tokens[0] == "<|im_start|>"
    assert len(one.tokens) == len(one.token_ids)
    assert results[0].prompt_text.endswith("What is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert repr(one).startswith("GeneratedText('<|im_start|>The rule is' -> ")
    assert repr(one).endswith(f"{len(one.token_ids)} tokens ({one.finish_reason}), layers 0, 1)")


def test_samples_are_drawn_as_one_call_draws_them_and_stand_side_by_side(parts: Parts):
    model, params, tokenizer = parts
    sampling = Sampling(temperature=0.9, top_p=0.9)
    texts = ["2 + 2 =", "The rule is"]
    drawn = generate_text(
        *parts, texts, TOKENS, samples_per_prompt=2, sampling=sampling, seed=3, extract_prompt=True
    )
    assert [(one.prompt, one.sample) for one in drawn] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ids, lengths = pad_prompts([tokenizer.encode(text) for text in texts])
    eos = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    out = generate_single_task_jitted(
        model, params, ids, TOKENS, prompt_lengths=lengths, samples_per_prompt=2, eos_token_ids=eos,
        sampling=sampling, seed=3,
    )  # fmt: skip
    for row, one in enumerate(drawn):
        assert one.token_ids.tolist() == out.tokens(row)
        assert np.allclose(one.layer(1), out.layer(1, row), rtol=1e-4, atol=1e-4)
    assert drawn[0].token_ids.tolist() != drawn[1].token_ids.tolist()
    assert np.array_equal(drawn[0].prompt_layer(0), drawn[1].prompt_layer(0))


def test_a_sequence_ends_at_the_tokenizers_eos_unless_others_are_named(parts: Parts):
    free = generate_text(*parts, "The rule is", TOKENS, eos_token_ids=(), extract_prompt=True)[0]
    assert (free.finish_reason, len(free.token_ids)) == ("length", TOKENS)
    third = int(free.token_ids[2])
    ended = generate_text(*parts, "The rule is", TOKENS, eos_token_ids=[third], extract_prompt=True)[0]
    assert ended.finish_reason == "stop"
    assert ended.token_ids.tolist() == free.token_ids.tolist()[: len(ended.token_ids)]
    assert ended.token_ids[-1] == third
    own = AutoTokenizer.from_pretrained(small_checkpoint())
    own.eos_token = own.convert_ids_to_tokens(third)
    by_default = generate_text(*parts[:2], own, "The rule is", TOKENS, extract_prompt=True)[0]
    assert by_default.token_ids.tolist() == ended.token_ids.tolist()


def test_a_chat_is_laid_out_with_thinking_or_without_as_its_template_lets_one_choose(parts: Parts):
    tokenizer, chat = tokenizer_with(CHOICE), PROMPTS[0]
    ends = {}
    for choice in (None, True, False):
        found = generate_text(*parts[:2], tokenizer, [chat, TEXT["text"]], 2, enable_thinking=choice)
        ends[choice] = found[0].prompt_text.partition("<|im_end|>\n")[2]
        assert found[1].prompt_text == TEXT["text"]
    assert ends[None] == ends[True] == "<|im_start|>assistant\n"
    assert ends[False] == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for made_by, prompts, words in (
        (parts[2], [chat], "does not take enable_thinking"),
        (tokenizer, "12", "enable_thinking is for chat templates, and all prompts are texts"),
    ):
        with pytest.raises(ValueError, match=words):
            generate_text(*parts[:2], made_by, prompts, 2, enable_thinking=False)


def test_other_points_come_by_name_and_each_prompt_has_its_strength(
    parts: Parts, results: list[GeneratedText]
):
    _, params, tokenizer = parts
    config = parts[0].config
    model = create_model_with_hooks(config, (0, 1), points={"attn.hook_z": [1], LN_FINAL: True})
    push = Add("hook_resid_mid", 0, np.linspace(-30, 30, config.hidden_size), positions="generated")
    texts = [TEXT["text"]] * 3
    clean, once, twice = generate_text(
        model,
        params,
        tokenizer,
        texts,
        TOKENS,
        extract_prompt=True,
        interventions=push,
        strengths=[0, 1, [2]],
    )
    assert clean.token_ids.tolist() == results[2].token_ids.tolist()
    assert np.allclose(clean.layer(1), results[2].layer(1), rtol=1e-4, atol=1e-4)
    rows = [one.layer(0)[0] for one in (clean, once, twice)]
    assert np.abs(rows[1] - rows[0]).max() > 1
    assert not np.allclose(rows[2], rows[1], atol=1)
    assert np.array_equal(once.prompt_layer(1), clean.prompt_layer(1))
    assert once.layer(1, point="attn.hook_z").shape == (len(once.token_ids), config.hidden_size)
    assert clean.prompt_layer(None, LN_FINAL).shape == (len(clean.prompt_token_ids), config.hidden_size)
    assert repr(once).endswith(f"layers 0, 1, attn.hook_z, {LN_FINAL})")
    with pytest.raises(IndexError, match=r"layer 0 of attn\.hook_z was not captured; captured are: 1\."):
        once.layer(0, point="attn.hook_z")
    with pytest.raises(ValueError, match="strengths must be one for each of the 3 prompts; there are 2"):
        generate_text(model, params, tokenizer, texts, TOKENS, interventions=push, strengths=[0, 1])


def test_a_single_chat_is_a_list_of_messages(parts: Parts, results: list[GeneratedText]):
    [one] = generate_text(*parts, PROMPTS[0], TOKENS, extract_prompt=True)
    assert one.token_ids.tolist() == results[0].token_ids.tolist()


REFUSED: list[tuple[Any, str]] = [
    ([], "prompts must be a text, a chat or a list of these, not []"),
    (3, "prompts must be a text, a chat or a list of these, not 3"),
    ("", 'Prompt 0 has an empty "text".'),
    (["a", 3], "Prompt 1 must be a text or a chat, not 3; ContinuousEngine takes token ids."),
    ([[1, 2]], "Prompt 0 must be a text or a chat, not [1, 2]"),
    (["a", [{"role": "user"}]], 'Prompt 1 has no text "content" in messages[0].'),
    ([[{"role": "assistant", "content": "a"}]], "Prompt 0 has the assistant's turn as its last message"),
    (["7" * 40_000], "A prompt of 40000 tokens and 8 new ones exceed the model's context"),
]


@pytest.mark.parametrize(("prompts", "sentence"), REFUSED)
def test_what_cannot_be_a_prompt_is_refused_before_anything_is_compiled(
    prompts: Any, sentence: str, parts: Parts, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(continuous_batching, "compile_slots", None)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        generate_text(*parts, prompts, TOKENS)


def test_other_arguments_that_cannot_be_are_refused_too(parts: Parts):
    model, params, _ = parts
    with pytest.raises(ValueError, match=r"tokenizer must be one of Transformers, .* not a dict"):
        generate_text(model, params, params, "a")
    with pytest.raises(ValueError, match="samples_per_prompt must be at least 1, not 0"):
        generate_text(*parts, "a", samples_per_prompt=0)
    without = AutoTokenizer.from_pretrained(small_checkpoint())
    without.chat_template = None
    with pytest.raises(ValueError, match=r"Prompt 0 cannot be tokenized: .* has no chat template"):
        generate_text(model, params, without, PROMPTS[0])


def test_rows_that_were_not_captured_are_an_index_error(results: list[GeneratedText], parts: Parts):
    with pytest.raises(IndexError, match="layer 12 was not captured; captured are: 0, 1"):
        results[0].layer(12)
    with pytest.raises(TypeError, match="layer must be a whole number, not '1'"):
        results[0].layer("1")
    model, params, tokenizer = parts
    [bare] = generate_text(QwenModel(model.config), params, tokenizer, "The rule is", TOKENS)
    assert bare.token_ids.tolist()
    with pytest.raises(IndexError, match="captured are: none, as the model is without hooks"):
        bare.layer(0)
    [without] = generate_text(*parts, PROMPTS[2], TOKENS)
    with pytest.raises(IndexError, match="say extract_prompt=True"):
        without.prompt_layer(0)
