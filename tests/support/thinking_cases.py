"""Chat templates of thinking models, and the embedded example's tokenizer with them."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from arc_runner.data import EXAMPLE_MODEL

_TURNS = """
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
"""
# In the shape of Qwen3's: the model thinks by itself, and a thinking that is closed already stops it.
CHOICE = (
    _TURNS + "{%- if not enable_thinking | default(true) %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)
CHOICE += "{%- endif %}"
# In the shape of QwQ's: it always thinks, and the prompt begins with it.
ALWAYS = _TURNS + "{{- '<think>\\n' }}{%- endif %}"


def tokenizer_with(template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    tokenizer.chat_template = template
    return tokenizer
