"""Reads prompts: for slots that continue them, and for requests that want nothing but their prompts' rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from activation_store.format import FinishedSequence
from generate_jitted import Rows
from qwen2_core.compilation import program_settings, raise_on_nan, to_host
from qwen2_core.hook_points import RESID_POST
from qwen2_core.requests import SequenceRequest, pad_to
from qwen2_core.steering import Steering
from qwen2_engine.decode_window import PrefilledPrompt
from qwen2_engine.memory_plan import SlotMemory
from qwen2_engine.programs import PromptPrograms


class Occupancy(NamedTuple):
    """How one window's slots were used."""

    slots: int
    steps: int  # made by every slot
    live_steps: int  # in which a slot's sequence was alive, over all slots
    prompts: int  # different prompts that were read before it


class ReadPrompts(NamedTuple):
    """What reading a prompt for each group of devices gave."""

    keys: list[bytes]  # of each group's prompt
    prompts: PrefilledPrompt
    rows: Rows  # [layers, width, groups, hidden] each


class Prompts:
    """Reads a prompt for each group of devices at a time, and keeps what it read last."""

    def __init__(self, params: Any, steering: Steering | None) -> None:
        self._params, self._steering = params, steering
        self._read: ReadPrompts | None = None
        self.count = 0  # different prompts read; for the caller to reset

    def read(
        self, prefills: Mapping[int, jax.stages.Compiled], requests: list[SequenceRequest]
    ) -> ReadPrompts:
        """Reads the prompt of a request for each group, all of one width, unless they were the last ones.

        ``prefills`` are the programs by width.
        """
        keys = [prompt_key(request, self._steering) for request in requests]
        if self._read is None or self._read.keys != keys:
            self._read = None  # makes room for the next one
            width = requests[0].width
            prompts = pad_to([request.prompt_token_ids for request in requests], width)
            steered = ()
            if self._steering is not None:
                strengths = np.stack([_prompt_strengths(request, self._steering) for request in requests])
                steered = (dataclasses.replace(self._steering, strengths=strengths),)
            read = prefills[width](self._params, *prompts, *steered)
            self._read = ReadPrompts(keys, *read)
            self.count += len(set(keys))
        return self._read


class PromptReader:
    """Reads the prompts of requests that want no tokens; nothing but prefills is compiled for it."""

    def __init__(
        self, programs: PromptPrograms, params: Any, memory: SlotMemory, steering: Steering | None = None
    ) -> None:
        self.programs, self.memory = programs, memory
        self._prompts = Prompts(params, steering)

    def generate(
        self,
        requests: Iterable[SequenceRequest | None],
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_window: Callable[[Occupancy], None] = lambda _: None,
    ) -> Iterator[FinishedSequence]:
        """Reads requests' prompts in their order and yields each with its rows and without a token.

        Args:
            requests: from ``ContinuousEngine.order``; taken from the iterable as they are read. It ends at
                None, which says that there is none yet, as of ``RunningSlots.generate``.
            should_stop: as of ``ContinuousEngine.run``.
            on_window: called after each round of one prompt for each group, which has no steps.
        """
        before: Callable[[], list[FinishedSequence]] = list
        for chosen in self._rounds(requests):
            if should_stop():
                break
            finished = self._read(chosen)  # computes while the caller works on those before
            on_window(Occupancy(self.programs.layout.data_parallel, 0, 0, self._prompts.count))
            self._prompts.count = 0
            yield from before()
            before = finished
        yield from before()

    def _rounds(self, requests: Iterable[SequenceRequest | None]) -> Iterator[list[SequenceRequest]]:
        """Yields requests of one width, at most one for each group of devices."""
        chosen: list[SequenceRequest] = []
        for request in requests:
            if request is None:
                break
            groups = self.programs.layout.data_parallel
            if chosen and (len(chosen) == groups or request.width != chosen[0].width):
                yield chosen
                chosen = []
            chosen.append(request)
        if chosen:
            yield chosen

    @program_settings()
    def _read(self, chosen: list[SequenceRequest]) -> Callable[[], list[FinishedSequence]]:
        """Starts to read prompts; returns what waits for them and copies their rows."""
        groups = self.programs.layout.data_parallel
        idle = chosen[:1] * (groups - len(chosen))  # read by groups that have no request, for nothing
        read = self._prompts.read(self.programs.prefills, chosen + idle)

        def finished() -> list[FinishedSequence]:
            raise_on_nan(read.prompts.logits)
            rows = by_point(read.rows)
            return [_finished(request, group, rows) for group, request in enumerate(chosen)]

        return finished


def _finished(request: SequenceRequest, group: int, rows: Mapping[str, np.ndarray]) -> FinishedSequence:
    length = len(request.prompt_token_ids)
    points = {point: of[:, :length, group].copy() for point, of in rows.items()}
    of_layers = points.pop(RESID_POST, None)
    none, no_logprobs = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return FinishedSequence(
        request.id, none, no_logprobs, "length", of_layers, key=request.key, points=points
    )


def by_point(rows: Rows) -> dict[str, np.ndarray]:
    """Returns rows on the host, those of the chosen layers' outputs among the other points'."""
    activations, points = rows
    every = points if activations is None else {RESID_POST: activations, **points}
    return {point: to_host(of_point) for point, of_point in every.items()}


def prompt_key(request: SequenceRequest, steering: Steering | None) -> bytes:
    """Returns what decides what is read of a request's prompt."""
    tokens = request.prompt_token_ids.tobytes()
    return tokens if steering is None else tokens + _prompt_strengths(request, steering).tobytes()


def _prompt_strengths(request: SequenceRequest, steering: Steering) -> np.ndarray:
    return steering.of_prompt(request.strengths, len(request.prompt_token_ids))
