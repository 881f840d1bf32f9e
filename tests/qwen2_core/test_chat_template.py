"""A chat template gives the prompts that Transformers makes, and nothing that it does takes for ever."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lively import rewrite_json
from runner_cases import assert_refused, copy_small, puzzle, run_main, write_tasks
from spoil import template
from transformers import AutoTokenizer

from arc_puzzles import encode_prompt
from arc_runner.data import EXAMPLE_MODEL
from arc_runner.loaded_model import LoadedModel
from qwen2_core import chat_template
from qwen2_core.chat_template import BoundedTokenizer
from qwen2_core.errors import CheckpointError

MESSAGES = [
    {"role": "system", "content": "You are <b>bold</b> & 'quoted' \"twice\".\n"},
    {"role": "user", "content": "0 1\n2 3\n\nÄ é 漢字 \t 😀 {{ not a template }} \\n"},
]


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EXAMPLE_MODEL)


@pytest.fixture
def bounded() -> Iterator[BoundedTokenizer]:
    made = BoundedTokenizer(tokenizer())
    before = tokenizer().chat_template
    yield made
    made.close()
    tokenizer().chat_template = before


CHATML = tokenizer().chat_template
QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{- tools | tojson }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SAME = {
    "ChatML": CHATML,
    "Qwen2.5": QWEN,
    "blocks on lines of their own": """
  {% for m in messages %}
  {% if m.role %}
   {{ m.content }}
  {% endif %}
{% endfor %}
""",
    "special tokens": "{{ eos_token }}{{ pad_token }}{{ bos_token }}{{ unk_token is defined }}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "tojson, sorted": "{{ messages[0] | tojson(sort_keys=True, ensure_ascii=True) }}",
    "loop controls": """
{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}
{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}""",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "namespace": """
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}""",
    "macros": """
{% macro say(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}""",
    "filters": "{{ messages[1].content | trim | upper | length }}{{ 'a,b'.split(',') | join('-') }}",
    "escapes": "{{ '<' | escape }}{{ messages[0].content }}",
    "arguments": "{{ tools is none }}{{ documents is none }}{{ enable_thinking is defined }}",
    "dict": "{{ dict(a=1) }}{{ messages[0].items() | list }}",
    "slices": "{% for m in messages[1:] %}{{ m.content[-3:] }}{% endfor %}",
    "attributes": "{{ messages | map(attribute='role') | list }}",
}


@pytest.mark.parametrize("name", SAME)
def test_the_prompt_is_the_one_of_transformers(name: str, bounded: BoundedTokenizer):
    tokenizer().chat_template = SAME[name]
    for opening in (True, False):
        expected = tokenizer().apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=opening)
        assert bounded.render(MESSAGES, opening) == expected
    ids = tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(bounded, MESSAGES).tolist() == ids


def test_everything_else_is_the_tokenizers(bounded: BoundedTokenizer):
    assert bounded.decode(bounded.encode("1 2")) == "1 2"
    assert bounded.eos_token_id == tokenizer().eos_token_id
    with pytest.raises(AttributeError):
        _ = bounded.nothing_of_this_name
    with pytest.raises(ValueError, match="gives texts"):
        bounded.apply_chat_template([MESSAGES], add_generation_prompt=True, tokenize=True)


LOOPS = "".join(f"{{% for {i} in range(99999) %}}" for i in "ijk") + "{% endfor %}" * 3
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
MEMORY, LONGER = "more than 1 GB of memory|too much memory", "takes longer than 1 seconds"


def only_if(condition: str, text: str) -> str:
    return f"{{% if {condition} %}}{text}{{% endif %}}"


ENDLESS = {
    "three loops": (LOOPS, LONGER),
    "a loop for one message": (only_if("'not a template' in messages[1].content", LOOPS), LONGER),
    "a loop at some times": (only_if("strftime_now('%Y') | int > 2020", LOOPS), LONGER),
    "50 MB": ("{{ messages[0].content * 3000000 }}", "writes more than 4,000,000 characters"),
    "50 MB that are constant": ("{{ 'x' * 50000000 }}", f"writes more than|{LONGER}"),
    "50 MB in pieces": ("{% for i in range(99999) %}{{ 'x' * 500 }}{% endfor %}", "writes more than"),
    "10 GB": ("{{ 'x' * 10000000000 }}", MEMORY),
    "a text that doubles": (DOUBLING, MEMORY),
    "a long list": ("{{ [1] * 9999999999 }}", MEMORY),
    "a power of powers": ("{{ 7 ** (7 ** 11) }}", f"{LONGER}|{MEMORY}"),
    "a wide number": ("{{ '%0999999999d' % 1 }}", f"{MEMORY}|{LONGER}|writes more"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deep"),
    "brackets": ("{{" + "(" * 50_000, f"nested too deep|{MEMORY}"),
    "attributes of Python's own": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    "a namespace of them": ("{{ namespace(__class__=1) }}", "may not have '__class__'"),
}
WAITS = (
    "three loops",
    "a loop at some times",
    "50 MB that are constant",
    "a power of powers",
    "a wide number",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in WAITS else []) for name in ENDLESS]
)
def test_a_template_is_bounded_in_time_memory_and_length(
    name: str, bounded: BoundedTokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    tokenizer().chat_template, words = ENDLESS[name]
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=f"the chat template .*({words})"):
        bounded.render(MESSAGES)
    assert time.monotonic() - begin < 10
    tokenizer().chat_template = CHATML
    bounded.close()
    assert bounded.render(MESSAGES).startswith("<|im_start|>system")


def test_a_template_that_tells_the_time_is_seen(bounded: BoundedTokenizer):
    assert not bounded.tells_the_time(MESSAGES)
    bounded.close()
    tokenizer().chat_template = "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[0].content }}"
    assert bounded.tells_the_time(MESSAGES)
    assert bounded.render(MESSAGES).startswith("Today is ")
    bounded.close()
    tokenizer().chat_template = "{% if false %}{{ strftime_now('%Y') }}{% endif %}{{ messages[0].content }}"
    assert not bounded.tells_the_time(MESSAGES)


def test_the_process_ends_with_the_tokenizer_that_it_belongs_to():
    made = BoundedTokenizer(tokenizer())
    made.render(MESSAGES)
    process = made._process
    assert process is not None
    assert process.poll() is None
    del made
    assert process.poll() is not None


# --- The runner ---


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LOOPS, f"cannot be used: the chat template {LONGER} for a prompt, or too much memory"),
        (
            "{{ messages[0].content * 3000000 }}",
            "cannot be used: the chat template fails: it writes more than",
        ),
        # The words of a puzzle, which trying the template out does not have.
        (only_if("'Example' in messages[1].content", LOOPS) + CHATML, f"error: the chat template {LONGER}"),
        (
            only_if("'Example' in messages[1].content", "{{ raise_exception('no puzzles') }}") + CHATML,
            "error: the chat template fails: no puzzles",
        ),
    ],
    ids=["loops", "50 MB", "loops for a puzzle", "fails for a puzzle"],
)
def test_the_runner_refuses_such_a_template_in_a_sentence(
    text: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model = copy_small(tmp_path / "model")
    template(text)(model)
    assert_refused(run_main(tmp_path, model_path=model), sentence)
    assert not (tmp_path / "activations").exists()


def test_the_runner_names_the_clock_and_the_settings_that_it_does_not_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(*_: object) -> None:
        raise CheckpointError("that is all")

    monkeypatch.setattr(LoadedModel, "load", load)
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model = copy_small(tmp_path / "model")
    template("{{ strftime_now('%d %b %Y') }}" + CHATML)(model)
    rewrite_json(model / "generation_config.json", do_sample=True, repetition_penalty=1.5, top_k=20)
    outcome = run_main(tmp_path, model_path=model, temperature=0.5)
    sentence = "generation_config.json asks for repetition_penalty 1.5 and top_k 20, which are not applied"
    flags = "--temperature 1 --top_k 20 --repetition_penalty 1.5"
    remedy = f"sampling is what the flags say; give {flags} to sample as it asks"
    assert outcome.out.count(f"{sentence}: {remedy}\n") == 1
    clock, end = outcome.err.splitlines()
    assert clock.startswith(f"the chat template of {model} puts the time into the prompts")
    assert end.endswith("that is all")
