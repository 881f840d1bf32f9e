"""Continuous generation: slots that are never left empty while there is work.

    items = [WorkItem(prompt, sequence_id=i, max_tokens=1100) for i, prompt in enumerate(prompts)]
    for finished in generate_continuous(model, params, items, slots=32, eos_token_ids=[eos]):
        finished.item, finished.token_ids, finished.rows        # in the order in which sequences end

Tokens, log-probabilities and rows are those of ``generate_single_task_jitted`` for each sequence alone
(``sequence_ids=[item.sequence_id]``), and the same to the last bit in whichever slot, beside whichever
others and in whichever order they are made, for a given number of slots.

While one window of steps computes, the rows of the one before are copied to the host and whoever iterates
has the device's time for what was finished in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from qwen2_core.config import QwenConfig
from qwen2_core.requests import bucket_length, check_request
from qwen2_core.sampling import Sampling, SamplingArrays
from qwen2_core.sharding import layout_of
from qwen2_engine.decode_window import STEP_PIECE, PrefilledPrompt, SlotShape, SlotState, Window
from qwen2_engine.memory_plan import device_memory_budget, plan_stages, start_stage
from qwen2_engine.programs import SlotPrograms
from qwen2_jax import QwenModel


@dataclasses.dataclass(frozen=True, eq=False)
class WorkItem:
    """One sequence to generate."""

    prompt: np.ndarray  # int32 [n]
    sequence_id: int  # what its random keys derive from
    max_tokens: int
    capture_prompt: bool = False  # hand over the prompt's rows too
    name: Any = None  # the caller's own, handed back


@dataclasses.dataclass(frozen=True, eq=False)
class FinishedItem:
    """A sequence that has ended, on the host; n tokens, EOS included, and as many rows."""

    item: WorkItem
    token_ids: np.ndarray  # [n] int32
    logprobs: np.ndarray  # [n] float32
    finish_reason: str  # "stop" | "length"
    rows: np.ndarray | None  # [layers, n or prompt + n, hidden]; None for a model without hooks


class Occupancy(NamedTuple):
    """One window, as it was used."""

    slots: int
    steps: int  # made by every slot
    live_steps: int  # in which a slot's sequence was alive, over all slots
    prompts: int  # different ones read before it


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What decides tokens besides the model, as the programs take it."""

    sampling: SamplingArrays
    seed: np.uint32
    eos_token_ids: np.ndarray  # int32, padded with -1

    @classmethod
    def check(
        cls, config: QwenConfig, eos_token_ids: Sequence[int], sampling: Sampling, seed: int
    ) -> Drawing:
        """Raises: ValueError, as ``generate_single_task_jitted``."""
        request = check_request(config, np.zeros((1, 1), int), 1, eos_token_ids=eos_token_ids, seed=seed)
        return cls(sampling.traced(), request.seed, request.eos_token_ids)


def generate_continuous(
    model: QwenModel,
    params: Any,
    items: Iterable[WorkItem],
    *,
    slots: int = 8,
    window: int = STEP_PIECE,
    eos_token_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    cache_dtype: Any = None,
    memory_budget: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_window: Callable[[Occupancy], None] = lambda _: None,
) -> Iterator[FinishedItem]:
    """Generates ``items`` in up to ``slots`` at once; yields each as it ends.

    Args:
        slots: on each group of devices, where the weights are on a mesh of several (``device_mesh``).
        model: rows are captured where it is one of ``create_model_with_hooks``.
        window: steps between two refills, a multiple of 16. Short ones waste fewer steps of slots whose
            sequence has ended, about half a window each.
        memory_budget: bytes; by default ``slot_plan.device_memory_budget``. Fewer slots are used where all
            would take more.
        should_stop, on_window: as in ``run_slots``.

    Raises:
        ValueError: at once, as ``generate_single_task_jitted``.
    """
    drawing = Drawing.check(model.config, eos_token_ids, sampling, seed)
    ordered = order_items(model.config, items)
    capture_prompt = any(item.capture_prompt for item in ordered)
    longest = max((item.max_tokens for item in ordered), default=1)
    shape = SlotShape(slots, 1, longest, window, None if cache_dtype is None else np.dtype(cache_dtype))
    widths = {bucket_length(len(item.prompt)) for item in ordered}
    devices = layout_of(model.config, params).devices
    budget = device_memory_budget(devices) if memory_budget is None else memory_budget
    stages = plan_stages(model, params, widths, shape, budget, capture_prompt)

    def run() -> Iterator[FinishedItem]:
        for stage in stages:
            if should_stop():
                return
            programs, free = start_stage(
                model, params, stage, capture_prompt=capture_prompt, eos_slots=len(drawing.eos_token_ids)
            )
            of_stage = [item for item in ordered if bucket_length(len(item.prompt)) in stage.widths]
            yield from run_slots(
                programs, free, params, of_stage, drawing, should_stop=should_stop, on_window=on_window
            )

    return run()


def order_items(config: QwenConfig, items: Iterable[WorkItem]) -> list[WorkItem]:
    """Checked, from short prompts to long, those of one prompt together so that it is read once.

    Prompts of similar length are then in the slots at the same time: a step costs what the longest costs.

    Raises:
        ValueError: an item that cannot be done, as ``generate_single_task_jitted``.
    """
    groups: dict[bytes, list[WorkItem]] = {}
    for item in items:
        request = check_request(config, np.asarray(item.prompt)[None], item.max_tokens)
        item = dataclasses.replace(item, prompt=request.input_ids[0])
        groups.setdefault(item.prompt.tobytes(), []).append(item)
    ordered = sorted(groups.values(), key=lambda group: bucket_length(len(group[0].prompt)))
    return [item for group in ordered for item in group]


def run_slots(
    programs: SlotPrograms,
    slots: SlotState,
    params: Any,
    items: Iterable[WorkItem],
    drawing: Drawing,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_window: Callable[[Occupancy], None] = lambda _: None,
) -> Iterator[FinishedItem]:
    """Generates ``items``, in their order, in ``slots`` that are all free; yields each as it ends.

    Args:
        items: from ``order_items``; taken from the iterable as slots become free.
        should_stop: asked before each window; where it says so, the sequences that have ended by then are
            the last ones.
    """
    return _Driver(programs, slots, params, iter(items), drawing, should_stop, on_window).run()


class _Live:
    """A sequence in a slot, and what has been copied of it so far."""

    def __init__(self, item: WorkItem, prompt_rows: np.ndarray | None) -> None:
        self.item = item
        self.token_ids: list[np.ndarray] = []
        self.logprobs: list[np.ndarray] = []
        self.rows: list[np.ndarray] = [] if prompt_rows is None else [prompt_rows]

    def finish(self, eos_token_ids: np.ndarray) -> FinishedItem:
        token_ids = np.concatenate(self.token_ids)
        reason = "stop" if token_ids[-1] in eos_token_ids else "length"
        rows = np.concatenate(self.rows, axis=1) if self.rows else None
        return FinishedItem(self.item, token_ids, np.concatenate(self.logprobs), reason, rows)


class _Share(NamedTuple):
    """A sequence's part of a window."""

    live: _Live
    slot: int
    tokens: int
    ended: bool


class _ReadPrompts(NamedTuple):
    token_ids: list[bytes]  # of each group's prompt
    prompts: PrefilledPrompt
    rows: Array | None  # [layers, width, groups, hidden]


class _Driver:
    def __init__(
        self,
        programs: SlotPrograms,
        slots: SlotState,
        params: Any,
        items: Iterator[WorkItem],
        drawing: Drawing,
        should_stop: Callable[[], bool],
        on_window: Callable[[Occupancy], None],
    ) -> None:
        self._programs, self._slots, self._params = programs, slots, params
        self._items = items
        self._waiting: WorkItem | None = None  # taken from items, for the next round
        self._drawing, self._should_stop, self._on_window = drawing, should_stop, on_window
        self._live: list[_Live | None] = [None] * programs.all_slots
        self._read: _ReadPrompts | None = None
        self._prompts_read = 0

    def run(self) -> Iterator[FinishedItem]:
        activations, shares = None, []
        while True:
            stopping = self._should_stop()
            if not stopping:
                self._refill()
            window = None
            if not stopping and any(self._live):
                window = self._dispatch()
            yield from self._copy_out(activations, shares)
            if window is None:
                return
            activations, shares = window.activations, self._settle(window)

    def _refill(self) -> None:
        """Gives free slots the next items, in rounds of at most one for each group of devices."""
        drawing, groups = self._drawing, self._programs.layout.groups
        while chosen := self._choose():
            idle = next(iter(chosen.values()))  # what a group reads that has no free slot
            read = self._prompts([chosen.get(group, idle)[1].prompt for group in range(groups)])
            slots, limits = np.full(groups, -1, np.int32), np.zeros(groups, np.int32)
            sequence_ids = np.zeros(groups, np.uint32)
            for group, (slot, item) in chosen.items():
                slots[group], limits[group] = slot, item.max_tokens
                sequence_ids[group] = item.sequence_id & 0xFFFFFFFF
            self._slots = self._programs.insert(
                self._slots, read.prompts, slots, sequence_ids, limits, drawing.sampling, drawing.seed
            )
            for group, (slot, item) in chosen.items():
                rows = None
                if item.capture_prompt and read.rows is not None:
                    rows = np.array(np.asarray(read.rows)[:, : len(item.prompt), group])
                self._live[group * self._programs.shape.slots + slot] = _Live(item, rows)

    def _choose(self) -> dict[int, tuple[int, WorkItem]]:
        """By group of devices its first free slot and the item for it; prompts of one width alone."""
        chosen: dict[int, tuple[int, WorkItem]] = {}
        widths: set[int] = set()
        for group in range(self._programs.layout.groups):
            first = group * self._programs.shape.slots
            slots = self._live[first : first + self._programs.shape.slots]
            if None not in slots:
                continue
            item, self._waiting = self._waiting or next(self._items, None), None
            if item is None:
                break
            widths.add(bucket_length(len(item.prompt)))
            if len(widths) > 1:
                self._waiting = item
                break
            chosen[group] = (slots.index(None), item)
        return chosen

    def _prompts(self, prompts: list[np.ndarray]) -> _ReadPrompts:
        """A prompt for each group, read now unless they were the last ones too."""
        token_ids = [prompt.tobytes() for prompt in prompts]
        if self._read is None or self._read.token_ids != token_ids:
            self._read = None  # makes room for the next one
            input_ids = np.zeros((len(prompts), bucket_length(len(prompts[0]))), np.int32)
            for row, prompt in zip(input_ids, prompts, strict=True):
                row[: len(prompt)] = prompt
            lengths = np.array([len(prompt) for prompt in prompts], np.int32)
            read = self._programs.prefills[input_ids.shape[1]](self._params, input_ids, lengths)
            self._read = _ReadPrompts(token_ids, *read)
            self._prompts_read += len(set(token_ids))
        return self._read

    def _dispatch(self) -> Window:
        """Starts the next window; returns before it has computed."""
        drawing = self._drawing
        self._slots, window = self._programs.window(
            self._params, self._slots, drawing.sampling, drawing.seed, drawing.eos_token_ids
        )
        return window

    def _settle(self, window: Window) -> list[_Share]:
        """Waits for a window, takes its small results, and frees the slots whose sequence has ended."""
        token_ids, logprobs = np.asarray(window.token_ids), np.asarray(window.logprobs)
        counts, ended = np.asarray(window.counts), np.asarray(window.ended)
        shares = []
        for slot, live in enumerate(self._live):
            if live is None:
                continue
            count = int(counts[slot])
            live.token_ids.append(token_ids[slot, :count].copy())
            live.logprobs.append(logprobs[slot, :count].copy())
            shares.append(_Share(live, slot, count, bool(ended[slot])))
            if ended[slot]:
                self._live[slot] = None
        self._on_window(Occupancy(len(counts), int(counts.max()), int(counts.sum()), self._prompts_read))
        self._prompts_read = 0
        return shares

    def _copy_out(self, activations: Array | None, shares: list[_Share]) -> Iterator[FinishedItem]:
        rows = None if activations is None else np.asarray(activations)
        for share in shares:
            if rows is not None:
                share.live.rows.append(rows[:, : share.tokens, share.slot].copy())
            if share.ended:
                yield share.live.finish(self._drawing.eos_token_ids)
