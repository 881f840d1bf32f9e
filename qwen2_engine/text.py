"""Texts and chats in, texts and rows out: one call on top of ``ContinuousEngine``.

results = generate_text(model, params, tokenizer, ["2 + 2 =", [{"role": "user", "content": "Hi"}]])
results[0].text, results[0].layer(12)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from activation_store.format import FinishedSequence
from activation_store.hook_labels import layers_text
from arc_puzzles import ArcFormatError
from arc_puzzles.chat import check_thinking
from arc_puzzles.prompt_files import Messages, check_messages, check_text, encode_own
from qwen2_core.generation_config import eos_token_ids as eos_of_checkpoint
from qwen2_core.hook_points import RESID_POST
from qwen2_core.hooks import PointLayers
from qwen2_core.hub import cached_snapshot
from qwen2_core.inputs import as_int, one_by_one, whole_number, yes_or_no
from qwen2_core.requests import SequenceRequest
from qwen2_core.sampling import Sampling
from qwen2_engine.continuous_batching import ContinuousEngine
from qwen2_jax import QwenModel, check_model

_SHOWN = 40  # characters of a text in a repr


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GeneratedText:
    """One generated sequence: its text, its tokens, and what the captured layers produced at each of them."""

    prompt: int  # which of the prompts it continues, from 0
    sample: int
    prompt_text: str  # with the special tokens of a chat's template
    text: str  # what was generated, without special tokens
    prompt_token_ids: Int32[np.ndarray, " prompt"]
    token_ids: Int32[np.ndarray, " n"]  # generated, with the EOS that ended it
    logprobs: Float32[np.ndarray, " n"]  # the model's own, at temperature 1
    finish_reason: str  # "stop": by an EOS; "length": by max_tokens
    layers: tuple[int, ...]  # that were captured
    points: Mapping[str, np.ndarray]  # of other points: [layers, n, width], in the model's dtype
    prompt_points: Mapping[str, np.ndarray]  # [layers, prompt, width]; shared by a prompt's samples
    point_layers: PointLayers  # of these points
    _rows: np.ndarray | None  # of the layers' outputs: [layers, n, hidden]
    _prompt_rows: np.ndarray | None
    _tokenizer: Any

    def __repr__(self) -> str:
        """Says in a line what there is, without the values."""
        return (
            f"GeneratedText({_short(self.prompt_text)} -> {_short(self.text)}, {len(self.token_ids)} tokens "
            f"({self.finish_reason}), {', '.join((f'layers {layers_text(self.layers)}', *self.points))})"
        )

    @property
    def tokens(self) -> list[str]:
        """The generated tokens, one text each; "\\ufffd" stands for a part of a character."""
        return [self._tokenizer.decode([token]) for token in self.token_ids.tolist()]

    @property
    def prompt_tokens(self) -> list[str]:
        """The prompt's tokens, as ``tokens``."""
        return [self._tokenizer.decode([token]) for token in self.prompt_token_ids.tolist()]

    def layer(self, layer: Any, point: str = RESID_POST) -> Float32[np.ndarray, "n width"]:
        """Returns the rows of one layer: row t is decoder block ``layer`` after reading generated token t.

        ``layer(12, point="attn.hook_z")`` is that of another point; a point of the model has the layer None.

        Raises:
            IndexError: the layer was not captured.
            TypeError: it is no whole number.
        """
        return self._of(self._rows, self.points, layer, point)

    def prompt_layer(self, layer: Any, point: str = RESID_POST) -> Float32[np.ndarray, "prompt width"]:
        """Returns the rows of one layer, or of another point, for the prompt's tokens.

        Raises:
            IndexError: the layer was not captured, or no prompts were (``extract_prompt=True``).
            TypeError: it is no whole number.
        """
        if (self.layers or self.points) and self._prompt_rows is None and not self.prompt_points:
            raise IndexError("The rows of prompts were not captured: say extract_prompt=True.")
        return self._of(self._prompt_rows, self.prompt_points, layer, point)

    def _of(
        self, rows: np.ndarray | None, points: Mapping[str, np.ndarray], layer: Any, point: str
    ) -> np.ndarray:
        number = None if layer is None and point != RESID_POST else as_int(layer)
        if number is None and (layer is not None or point == RESID_POST):
            raise TypeError(f"layer must be a whole number, not {layer!r}.")
        layers: tuple[int | None, ...] = self.layers
        if point != RESID_POST:
            rows, layers = points.get(point), dict(self.point_layers).get(point, ())
        if rows is None or number not in layers:
            none = "none" if self.layers or self.points else "none, as the model is without hooks"
            captured = ", ".join(map(str, layers)) or none
            of_point = "" if point == RESID_POST else f" of {point}"
            raise IndexError(f"layer {number}{of_point} was not captured; captured are: {captured}.")
        return rows[layers.index(number)].astype(np.float32)


def generate_text(  # noqa: PLR0913 - what one call may say; all but four have defaults
    model: QwenModel,
    params: Any,
    tokenizer: Any,
    prompts: Any,
    max_tokens: int = 256,
    *,
    samples_per_prompt: int = 1,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    eos_token_ids: Any = None,
    extract_prompt: bool = False,
    slots: int = 8,
    interventions: Any = (),
    strengths: Any = None,
    enable_thinking: bool | None = None,
) -> list[GeneratedText]:
    """Generates from texts and chats, and returns texts, tokens and rows, in the order of the prompts.

    Args:
        model: rows are captured if it is one of ``create_model_with_hooks``.
        params: the parameter tree of ``load_qwen2``. Everything runs where the weights are.
        tokenizer: ``AutoTokenizer.from_pretrained`` of the checkpoint.
        prompts: a text, which is continued as it is (special tokens in it count); a chat, a list of
            ``{"role": ..., "content": ...}``, which the tokenizer's chat template lays out; or several of
            these.
        max_tokens: generated tokens at most; 0 with ``extract_prompt``, for the prompts' rows alone.
        samples_per_prompt: sequences of each prompt; they stand side by side in the result.
        sampling: how tokens are chosen; greedy by default.
        seed: 0 to 2**32 - 1. Sequence i draws as ``generate_single_task_jitted`` does with its i-th.
        eos_token_ids: ids that end a sequence; by default the tokenizer's, ``<|im_end|>``, and those of the
            checkpoint's generation_config.json and config.json. ``()`` for none.
        extract_prompt: capture the rows of the prompts too.
        slots: sequences at once; fewer where memory is short.
        interventions: what to change on the way, of ``qwen2_core.interventions``.
        strengths: of each prompt: one number, or one for each intervention. None: their own.
        enable_thinking: whether a model that can think first does, for chat templates that take it (Qwen3's).
            None: what the template does by itself.

    Raises:
        ValueError: one sentence, before anything is compiled: a prompt that cannot be used or is too long,
            a tokenizer of another model, or an argument that cannot be.
    """
    check_model(model)
    samples = whole_number("samples_per_prompt", samples_per_prompt, 1)
    asked = _contents(prompts)
    _check_tokenizer(tokenizer)
    if enable_thinking is not None:
        enable_thinking = yes_or_no("enable_thinking", enable_thinking)
        if all(isinstance(one, str) for one in asked):
            raise ValueError(
                "enable_thinking is for chat templates, and all prompts are texts: leave it out."
            )
        check_thinking(tokenizer)
    encoded = _encode(tokenizer, asked, enable_thinking)
    if eos_token_ids is None:
        eos_token_ids = _eos_of(tokenizer, model.config.vocab_size)
    engine = ContinuousEngine(
        model,
        params,
        slots=slots,
        max_tokens=max_tokens,
        eos_token_ids=eos_token_ids,
        sampling=sampling,
        seed=seed,
        capture_prompt=yes_or_no("extract_prompt", extract_prompt),
        interventions=interventions,
    )
    of_prompts = _strengths(strengths, len(encoded))
    requests = [
        SequenceRequest(
            token_ids,
            max_tokens,
            sampling_id=number * samples + sample,
            id=number * samples + sample,
            capture_prompt=extract_prompt and (sample == 0 or max_tokens == 0),
            strengths=of_prompts[number],
        )
        for number, token_ids in enumerate(encoded)
        for sample in range(samples)
    ]
    finished: dict[Any, FinishedSequence] = {one.id: one for one in engine.run(requests)}
    results = []
    for number, (content, token_ids) in enumerate(zip(asked, encoded, strict=True)):
        text = content if isinstance(content, str) else tokenizer.decode(token_ids.tolist())
        first = finished[number * samples]
        prompt_rows, prompt_points = None, {}
        if extract_prompt:
            prompt_rows, prompt_points = _cut(first, slice(len(token_ids)))
        for sample in range(samples):
            one = finished[number * samples + sample]
            with_prompt = extract_prompt and (sample == 0 or max_tokens == 0)
            rows, points = _cut(one, slice(len(token_ids) if with_prompt else 0, None))
            results.append(
                GeneratedText(
                    number,
                    sample,
                    text,
                    tokenizer.decode(one.token_ids.tolist(), skip_special_tokens=True),
                    token_ids,
                    one.token_ids,
                    one.logprobs,
                    one.finish_reason,
                    tuple(model.capture_layers),
                    points,
                    prompt_points,
                    model.capture_points,
                    rows,
                    prompt_rows,
                    tokenizer,
                )
            )
    return results


def _contents(prompts: Any) -> list[Messages | str]:
    """Returns the prompts, each a text or a chat; a single one of either kind is a list of it."""
    given = [prompts] if isinstance(prompts, str) else _items(prompts)
    if given and isinstance(given[0], dict):
        given = [given]
    if not given:
        raise ValueError(
            f"prompts must be a text, a chat or a list of these, not {_short_repr(prompts)}; a chat is a "
            'list of {"role": ..., "content": ...}.'
        )
    contents: list[Messages | str] = []
    for number, prompt in enumerate(given):
        try:
            if isinstance(prompt, str):
                contents.append(check_text(prompt))
            elif (messages := _items(prompt)) and all(isinstance(one, dict) for one in messages):
                contents.append(check_messages(messages))
            else:
                raise ValueError(
                    f"Prompt {number} must be a text or a chat, not {_short_repr(prompt)}; ContinuousEngine "
                    "takes token ids."
                )
        except ArcFormatError as error:
            raise ValueError(f"Prompt {number} {error}.") from error
    return contents


def _check_tokenizer(tokenizer: Any) -> None:
    if not callable(tokenizer) or not callable(getattr(tokenizer, "decode", None)):
        raise ValueError(
            "tokenizer must be one of Transformers, as AutoTokenizer.from_pretrained(path) gives it, not a "
            f"{type(tokenizer).__name__}."
        )


def _encode(
    tokenizer: Any, contents: Sequence[Messages | str], enable_thinking: bool | None
) -> list[np.ndarray]:
    encoded = []
    for number, token_ids in enumerate(encode_own(tokenizer, contents, enable_thinking)):
        if isinstance(token_ids, str):
            raise ValueError(f"Prompt {number} {token_ids}.")
        encoded.append(token_ids)
    return encoded


def _eos_of(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Returns the ids that end a sequence: the tokenizer's, and those of the checkpoint it came with."""
    name = str(getattr(tokenizer, "name_or_path", ""))
    folder = Path(name) if name and Path(name).is_dir() else cached_snapshot(name)
    return eos_of_checkpoint(folder, tokenizer, vocab_size)


def _strengths(given: Any, prompts: int) -> list[Any]:
    if given is None:
        return [None] * prompts
    refusal = f"strengths must be one for each of the {prompts} prompts, not {_short_repr(given)}."
    found = list(one_by_one(given, refusal))
    if len(found) != prompts:
        raise ValueError(f"strengths must be one for each of the {prompts} prompts; there are {len(found)}.")
    return found


def _cut(one: FinishedSequence, tokens: slice) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    """Returns the rows of some of a sequence's tokens, and those of other points."""
    points = {point: rows[:, tokens] for point, rows in one.points.items()}
    return None if one.rows is None else one.rows[:, tokens], points


def _items(value: Any) -> list[Any]:
    """Returns what is in a list or another ordered iterable; nothing for anything else."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set)
    return list(value) if is_list else []


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")


def _short_repr(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN]}..."
