"""Models that think before they answer: `<think> ... </think>` in a text, and chat templates that have a say.

Qwen3's chat template takes `enable_thinking`. By itself it lets the model think; with False it closes the
thinking in the prompt. Templates of models that always think (QwQ) open it in the prompt.
"""

import re
from typing import Any

import numpy as np

OPENING, CLOSING = "<think>", "</think>"
_LAST_TOKENS = 16  # of a prompt: enough for the opening and blanks, even a letter a token


def after_thinking(text: str, opened: bool = False) -> str | None:
    """Returns what follows the thinking in a model's text, all of it where there is no thinking.

    `opened` says that the prompt has the opening already (`opens_thinking`). None stands for a text that ends
    before the thinking does: it has no answer.
    """
    _, closing, answer = text.rpartition(CLOSING)
    return None if OPENING in answer or (opened and not closing) else answer


def opens_thinking(tokenizer: Any, prompt_token_ids: np.ndarray) -> bool:
    """Tells whether a prompt, int32 `[n]`, ends with the opening, so that the model's text begins inside."""
    end = tokenizer.decode(prompt_token_ids[-_LAST_TOKENS:].tolist())
    return end.rstrip().endswith(OPENING)


def takes_enable_thinking(tokenizer: Any) -> bool:
    """Tells whether a tokenizer has a chat template that takes `enable_thinking`."""
    if not tokenizer.chat_template:
        return False
    return re.search(r"\benable_thinking\b", tokenizer.get_chat_template()) is not None
