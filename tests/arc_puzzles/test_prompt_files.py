"""Files of own prompts: what a line may be, what fails a line, and what refuses the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from runner_cases import TINY
from transformers import AutoTokenizer

from arc_puzzles import ArcFormatError
from arc_puzzles.prompt_files import encode_own, load_prompts

HI = {"role": "user", "content": "Hi"}


def lines(file: Path, *values: Any) -> Path:
    """A file with one value a line; a text stands as it is."""
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in values))
    return file


def test_each_line_is_a_chat_a_question_or_a_text_named_by_its_id_or_its_number(tmp_path: Path):
    path = lines(
        tmp_path / "p.jsonl",
        {"id": "greeting", "messages": [{"role": "system", "content": ""}, HI], "source": "by hand"},
        "",
        {"id": 40, "prompt": "Hi"},
        {"text": " Once\n", "prompt": None, "id": None},
    )
    loaded = load_prompts(path)
    assert loaded.failures == ()
    assert [(one.prompt_id, one.content, one.place) for one in loaded.prompts] == [
        ("greeting", [{"role": "system", "content": ""}, HI], "line 1"),
        ("40", [HI], "line 3"),
        ("4", " Once\n", "line 4"),
    ]
    assert loaded.has_chats
    assert [one.prompt_id for one in load_prompts(path, limit=2).prompts] == ["greeting", "40"]


def test_a_list_and_a_packed_file_are_read_alike(tmp_path: Path):
    values = [{"prompt": "a"}, {"text": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(values, indent=1))
    (tmp_path / "packed").write_bytes(gzip.compress(lines(tmp_path / "p", *values).read_bytes()))
    as_list, packed = load_prompts(tmp_path / "list.json").prompts, load_prompts(tmp_path / "packed").prompts
    assert [(one.prompt_id, one.content) for one in as_list] == [("1", [{**HI, "content": "a"}]), ("2", "b")]
    assert [(one.prompt_id, one.content) for one in packed] == [
        (one.prompt_id, one.content) for one in as_list
    ]
    assert (as_list[1].place, packed[1].place) == ("item 2", "line 2")


BAD = [
    ("plain words", "line 2 is not JSON: Expecting value: column 1 (char 0)"),
    ('{"text": NaN}', "line 2 is not JSON: it contains NaN"),
    ('{"text": "a", "text": "b"}', "line 2 has the key 'text' twice in one object"),
    ('{"text": "a"} {}', "line 2 is not JSON: Extra data: column 15 (char 14); a line has one object"),
    ('"a text"', 'line 2 is no JSON object such as {"prompt": "..."}'),
    ({"id": "x"}, 'line 2 has neither of "messages", "prompt", "text"; a line has exactly one of them'),
    ({"prompt": "a", "text": "b"}, 'line 2 has "prompt", "text"; a line has exactly one of them'),
    ({"prompt": ""}, 'line 2 has an empty "prompt"'),
    ({"text": 3}, 'line 2 has a "text" that is no text'),
    ({"text": "\ud800"}, "line 2 has half a character ('\\ud800') in \"text\""),
    ({"id": 1.5, "text": "a"}, 'line 2 has an "id" that is neither a text nor a whole number'),
    ({"id": True, "text": "a"}, 'line 2 has an "id" that is neither a text nor a whole number'),
    ({"id": "a\x1b[2J", "text": "a"}, 'line 2 has an "id" that is not 1 to 256 printable characters'),
    ({"messages": []}, 'line 2 has "messages" that are no list of {"role": ..., "content": ...}'),
    ({"messages": ["Hi"]}, 'line 2 has no text "role" in messages[0]'),
    ({"messages": [HI, {"role": "user", "content": [HI]}]}, 'line 2 has no text "content" in messages[1]'),
    ({"messages": [{**HI, "tool_calls": []}]}, 'line 2 has "tool_calls" in messages[0]; a message is its'),
    ({"messages": [HI, {"role": "assistant", "content": "Yes"}]}, "the assistant's turn as its last message"),
]


@pytest.mark.parametrize(("line", "sentence"), BAD)
def test_a_line_that_cannot_be_used_fails_alone_in_a_sentence_that_names_it(
    line: Any, sentence: str, tmp_path: Path
):
    loaded = load_prompts(lines(tmp_path / "p.jsonl", {"text": "before"}, line, {"text": "after"}))
    assert [one.prompt_id for one in loaded.prompts] == ["1", "3"]
    [failure] = loaded.failures
    assert sentence in failure.reason
    assert failure.reason.startswith("line 2 ")


REFUSED = [
    ("", "has no prompt in it"),
    ("words\nand more", "has no prompt that can be used: line 1 is not JSON"),
    ('{\n "prompt": "over several lines"\n}', "has no prompt that can be used: line 1 is not JSON"),
    ('{"id": 7, "text": "a"}\n{"id": "7", "text": "b"}', "has the id '7' twice, on line 1 and line 2"),
    ('{"id": 2, "text": "a"}\n{"text": "b"}', "on line 1 and line 2, where it is the number of the line"),
    ("[1, 2", "is not JSON"),
    ("[]", "has no prompt in it"),
]


@pytest.mark.parametrize(("content", "sentence"), REFUSED)
def test_a_file_without_anything_usable_or_with_an_id_twice_is_refused(
    content: str, sentence: str, tmp_path: Path
):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ArcFormatError) as refused:
        load_prompts(tmp_path / "p.jsonl")
    assert sentence in str(refused.value)
    assert "p.jsonl" in str(refused.value)


def test_a_chat_is_laid_out_by_the_template_and_a_text_is_tokenized_as_it_is():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    chat, text = encode_own(tokenizer, [[HI], "<|im_start|>2 + 2 ="])
    assert not isinstance(chat, str)
    assert not isinstance(text, str)
    assert tokenizer.decode(chat.tolist()) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text.tolist() == tokenizer("<|im_start|>2 + 2 =")["input_ids"]
    assert text[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_what_the_template_refuses_fails_its_own_prompt():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'boss' %}{{ raise_exception('no bosses') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    good, bad, text = encode_own(tokenizer, [[HI], [{"role": "boss", "content": "Hi"}], "Hi"])
    assert bad == "cannot be tokenized: no bosses"
    assert list(good) == list(text) == tokenizer("Hi")["input_ids"]
