"""Continuous generation: slots that are never left empty while there is work.

    engine = ContinuousEngine(model, params, slots=32, eos_token_ids=[eos])
    requests = [SequenceRequest(prompt, 1100, sampling_id=i, id=i) for i, prompt in enumerate(prompts)]
    for finished in engine.run(requests):
        finished.id, finished.token_ids, finished.rows        # in the order in which sequences end

Tokens, log-probabilities and rows are those of ``generate_single_task_jitted`` for each sequence alone
(``sequence_ids=[request.sampling_id]``). For given ``slots`` and ``max_tokens`` they are the same to the last
bit in whichever slot, beside whichever others and in whichever order they are made.

While one window of steps computes, the rows of the window before are copied to the host, and the caller may
work on finished sequences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np

from activation_store.format import FinishedSequence
from generate_jitted import Rows
from qwen2_core.compilation import check_surroundings, program_settings, raise_on_nan
from qwen2_core.hook_points import RESID_POST
from qwen2_core.inputs import cache_dtype_of, whole_number, yes_or_no
from qwen2_core.intervention_values import finite_numbers
from qwen2_core.kernels.attention import reads_prompts_by_index
from qwen2_core.parameter_checks import check_params
from qwen2_core.requests import (
    LEAST_SEQUENCE_ID,
    MOST_SEQUENCE_ID,
    SequenceRequest,
    check_max_tokens,
    check_prompts,
    unpadded,
)
from qwen2_core.sampling import Sampling, SamplingParams, sampling_params
from qwen2_core.sharding import layout_of
from qwen2_core.steering import Steering, steer
from qwen2_engine.decode_window import STEP_ALIGNMENT, NewSequence, SlotShape, SlotState, Window
from qwen2_engine.memory_plan import MemoryPlanner, SlotMemory, Stage, device_memory_budget
from qwen2_engine.programs import SlotPrograms, compile_prompts, compile_slots
from qwen2_engine.prompt_reading import Occupancy, PromptReader, Prompts, by_point, prompt_key
from qwen2_engine.prompt_rows import PromptRows
from qwen2_jax import QwenModel, check_model

logger = logging.getLogger(__name__)


class ContinuousEngine:
    """Generates sequences of one model in slots that take the next one as soon as theirs has ended."""

    def __init__(  # noqa: PLR0913 - the settings of a run; all but two have defaults
        self,
        model: QwenModel,
        params: Any,
        *,
        slots: int = 8,
        max_tokens: int | None = None,
        window: int = STEP_ALIGNMENT,
        eos_token_ids: Any = (),
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        seed: int = 0,
        cache_dtype: Any = None,
        capture_prompt: bool = False,
        memory_budget: int | None = None,
        interventions: Any = (),
    ) -> None:
        """Checks the settings; nothing is compiled or allocated yet.

        Args:
            model: rows are captured if it is one of ``create_model_with_hooks``.
            params: the parameter tree. Everything runs where the weights are.
            slots: sequences at once, on each group of devices; fewer where memory is short.
            max_tokens: generated tokens that a slot has room for; by default each plan's longest. 0 for
                requests of 0 tokens, which want their prompts' rows alone.
            window: steps between two refills, a multiple of 16. Each ending sequence wastes half a window.
                Another window may change results' last bits, as it changes the cache's size.
            eos_token_ids: ids that end a sequence.
            sampling: how tokens are chosen; greedy by default.
            seed: 0 to 2**32 - 1. Random keys derive from (seed, the request's sampling_id, step).
            cache_dtype: of the KV cache; the model's by default.
            capture_prompt: allows requests to ask for their prompt's rows.
            memory_budget: bytes on each device; by default ``memory_plan.device_memory_budget``.
            interventions: what to change on the way, of ``qwen2_core.interventions``, with one strength
                each. Requests may have their own ``strengths``.

        Raises:
            ValueError: a setting that cannot be, or parameters of another model.
        """
        check_model(model)
        check_surroundings(params)
        check_params(model.config, params)
        self.model, self.params = model, params
        self.layout = layout_of(model.config, params)
        self._sampling = sampling_params(sampling, seed, eos_token_ids, model.config.vocab_size)
        self._steering = steer(interventions, model.config, None)
        self._max_tokens = None if max_tokens is None else whole_number("max_tokens", max_tokens, 0)
        self._shape = SlotShape(
            whole_number("slots", slots, 1),
            prompt_width=1,
            max_tokens=self._max_tokens or 1,
            window=whole_number("window", window, 1),
            cache_dtype=cache_dtype_of(cache_dtype),
            capture_prompt=yes_or_no("capture_prompt", capture_prompt) and model.captures,
            sampling=self._sampling.shape,
            interventions=0 if self._steering is None else len(self._steering.placed),
            shared_prompts=reads_prompts_by_index(self.layout.platform),
        )
        self._budget = (
            device_memory_budget(self.layout.devices)
            if memory_budget is None
            else whole_number("memory_budget", memory_budget, 1)
        )
        placed = None if self._steering is None else self._steering.placed
        self._planner = MemoryPlanner(model, params, self.layout, placed)

    def run(
        self,
        requests: Any,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_window: Callable[[Occupancy], None] = lambda _: None,
    ) -> Iterator[FinishedSequence]:
        """Generates all requests and yields each as it ends.

        Args:
            requests: an iterable of ``SequenceRequest``, what to generate.
            should_stop: asked before each window. Once it returns True, the sequences that have ended by then
                are yielded, and no more.
            on_window: called with each window's use.

        Raises:
            ValueError: at once, for a request that cannot be done, as ``generate_single_task_jitted``.
        """
        check_surroundings(self.params)
        ordered = self.order(requests)
        stages = self.plan(ordered)

        def generate() -> Iterator[FinishedSequence]:
            for stage in stages:
                if should_stop():
                    return
                of_stage = filter(stage.takes, ordered)
                yield from self.start(stage).generate(of_stage, should_stop=should_stop, on_window=on_window)

        return generate()

    def order(self, requests: Any) -> list[SequenceRequest]:
        """Checks requests, of any iterable, and sorts them from short prompts to long, equal ones together.

        So a prompt is read once, and prompts of similar length share the slots: a step costs what the longest
        of its prompts costs.

        Raises:
            ValueError: a request that cannot be done, as ``generate_single_task_jitted``.
        """
        groups: dict[bytes, list[SequenceRequest]] = {}
        if not isinstance(requests, Iterable):
            raise ValueError(
                "requests must be a list, or another iterable, of SequenceRequest, not "
                f"{type(requests).__name__}."
            )
        for request in requests:
            request = self._checked(request)
            if self._max_tokens is not None and request.max_tokens > self._max_tokens:
                raise ValueError(
                    f"max_tokens {request.max_tokens} exceeds the engine's max_tokens of {self._max_tokens}."
                )
            if request.capture_prompt and self.model.captures and not self._shape.capture_prompt:
                raise ValueError(
                    "A request asks for its prompt's rows: make the engine with capture_prompt=True."
                )
            groups.setdefault(prompt_key(request, self._steering), []).append(request)
        ordered = sorted(groups.values(), key=lambda group: group[0].width)
        return [request for group in ordered for request in group]

    def _checked(self, request: Any) -> SequenceRequest:
        if not isinstance(request, SequenceRequest):
            raise ValueError(f"requests must be SequenceRequest, not {type(request).__name__}.")
        capture_prompt = yes_or_no("capture_prompt", request.capture_prompt)
        prompt_rows = capture_prompt and self.model.captures
        max_tokens = check_max_tokens(request.max_tokens, prompt_rows, "capture_prompt=True")
        rows = unpadded("prompt_token_ids", request.prompt_token_ids)
        if len(rows) != 1:
            raise ValueError(f"A SequenceRequest has one prompt, not {len(rows)}.")
        prompts = check_prompts(self.model.config, rows, [len(rows[0])], max_tokens)
        return dataclasses.replace(
            request,
            prompt_token_ids=prompts.input_ids[0],
            max_tokens=max_tokens,
            sampling_id=whole_number("sampling_id", request.sampling_id, LEAST_SEQUENCE_ID, MOST_SEQUENCE_ID),
            capture_prompt=capture_prompt,
            strengths=self._strengths(request.strengths),
        )

    def _strengths(self, given: Any) -> np.ndarray | None:
        """Returns a request's strength of each intervention; None where there are none."""
        if self._steering is None:
            if given is not None:
                raise ValueError("A request has strengths, and the engine has no interventions.")
            return None
        own = np.asarray(self._steering.strengths)[0]
        strengths = own if given is None else finite_numbers("strengths", given)
        if strengths.shape not in ((), own.shape):
            raise ValueError(
                f"strengths must be one number, or one for each of the {len(own)} interventions; it is of "
                f"shape {list(strengths.shape)}."
            )
        return np.broadcast_to(strengths, own.shape)

    def plan(self, requests: Sequence[SequenceRequest]) -> list[Stage]:
        """Returns the stages that requests are generated in, short prompts first (``memory_plan``).

        Requests of 0 tokens are in a stage of their own, the first, which has no slots.
        """
        longest = max((request.max_tokens for request in requests), default=1)
        read = self.stages({request.width for request in requests if request.max_tokens == 0}, 0)
        generated = {request.width for request in requests if request.max_tokens > 0}
        return [*read, *self.stages(generated, longest)]

    def stages(self, widths: Iterable[int], max_tokens: int) -> list[Stage]:
        """Returns the stages of requests whose prompts are of some widths; ``plan``, before they are known.

        ``max_tokens`` are the longest request's; 0 where all are of 0 tokens.
        """
        shape = dataclasses.replace(self._shape, max_tokens=self._max_tokens or max_tokens or 1)
        if max_tokens == 0:
            return self._planner.reading_stages(widths, shape)
        return self._planner.stages(widths, shape, self._budget)

    def estimate(self, stage: Stage) -> int:
        """Estimates the bytes that a stage takes on each device, before anything is compiled."""
        return self._planner.estimate(stage.shape)

    @program_settings()
    def start(
        self, stage: Stage, compiling: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext
    ) -> RunningSlots | PromptReader:
        """Compiles a stage's programs and makes its slots, all free; none for requests of 0 tokens.

        ``compiling(name)`` is entered around the compilation of each program, on threads.

        A window of free slots is run, for nothing but its memory. If that is not there, half as many slots
        are tried, and a warning is logged.
        """
        placed = () if self._steering is None else self._steering.placed
        asked = (self.model, self.params, self.layout, stage.shape, stage.widths, placed, compiling)
        if stage.shape.reads_only:
            reading = compile_prompts(*asked)
            return PromptReader(reading, self.params, self._planner.memory(reading), self._steering)
        programs = compile_slots(*asked)
        try:
            slots = programs.create()
            steered = (placed,) if placed else ()
            window = programs.window(self.params, slots, programs.idle_sampling, *steered)
            slots, _ = jax.block_until_ready(window)
            memory = self._planner.memory(programs)
            return RunningSlots(programs, slots, self.params, self._sampling, memory, self._steering)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error) or stage.shape.slots == 1:
                raise
        half = dataclasses.replace(stage.shape, slots=stage.shape.slots // 2)
        logger.warning("memory ran out with %d slots: trying %d", stage.shape.slots, half.slots)
        return self.start(dataclasses.replace(stage, shape=half), compiling)


class _RunningSequence:
    """A sequence in a slot, and what has been copied of it so far."""

    def __init__(self, request: SequenceRequest, prompt_row: int) -> None:
        self.request, self.prompt_row = request, prompt_row
        self._token_ids: list[np.ndarray] = []
        self._logprobs: list[np.ndarray] = []
        self._rows: dict[str, np.ndarray] = {}  # by point: [layers, room for all tokens, width]
        self._rows_filled = 0

    def add_tokens(self, token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        self._token_ids.append(token_ids.copy())
        self._logprobs.append(logprobs.copy())

    def add_rows(self, rows: Mapping[str, np.ndarray]) -> None:
        """Copies rows by point, [layers, tokens, width], to where they stay until they are on disk."""
        end = self._rows_filled
        for point, values in rows.items():
            if point not in self._rows:
                prompt = len(self.request.prompt_token_ids) if self.request.capture_prompt else 0
                room = prompt + self.request.max_tokens
                self._rows[point] = _fresh((values.shape[0], room, values.shape[2]), values.dtype)
            end = self._rows_filled + values.shape[1]
            self._rows[point][:, self._rows_filled : end] = values
        self._rows_filled = end

    def finish(self, eos_token_ids: np.ndarray) -> FinishedSequence:
        token_ids = np.concatenate(self._token_ids)
        reason = "stop" if token_ids[-1] in eos_token_ids else "length"
        points = {point: rows[:, : self._rows_filled] for point, rows in self._rows.items()}
        rows, request = points.pop(RESID_POST, None), self.request
        logprobs = np.concatenate(self._logprobs)
        return FinishedSequence(request.id, token_ids, logprobs, reason, rows, key=request.key, points=points)


class _Share(NamedTuple):
    """A sequence's part of a window."""

    sequence: _RunningSequence
    slot: int
    tokens: int
    ended: bool


class RunningSlots:
    """The slots of one stage, on the device, and the loop that refills them."""

    def __init__(
        self,
        programs: SlotPrograms,
        slots: SlotState,
        params: Any,
        sampling: SamplingParams,
        memory: SlotMemory,
        steering: Steering | None = None,
    ) -> None:
        self.programs, self.memory = programs, memory
        self._slots, self._params, self._sampling = slots, params, sampling
        self._steering = steering
        self._running: list[_RunningSequence | None] = [None] * programs.all_slots
        groups = range(programs.layout.data_parallel)
        self._prompt_rows = [PromptRows(programs.shape.slots) for _ in groups]
        self._requests: Iterator[SequenceRequest | None] = iter(())
        self._waiting: SequenceRequest | None = None  # taken from the requests, for the next round
        self._prompts = Prompts(params, steering)

    def generate(
        self,
        requests: Iterable[SequenceRequest | None],
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_window: Callable[[Occupancy], None] = lambda _: None,
    ) -> Iterator[FinishedSequence]:
        """Generates requests in their order and yields each as it ends; may be called again after its end.

        Args:
            requests: from ``ContinuousEngine.order``; taken from the iterable as slots become free. None says
                that there is none yet: it is asked for again before the next window. It ends once no slot is
                in use and there is none, or no more.
            should_stop: as of ``ContinuousEngine.run``.
            on_window: as of ``ContinuousEngine.run``.
        """
        self._requests = iter(requests)
        rows: Rows = None, {}
        shares: list[_Share] = []
        while True:
            stopping = should_stop()
            if not stopping:
                self._refill()
            window = None
            if not stopping and any(self._running):
                window = self._dispatch()
            yield from self._copy_out(rows, shares)
            if window is None:
                return
            rows, shares = (window.activations, window.points), self._settle(window, on_window)

    @program_settings()
    def _refill(self) -> None:
        """Gives free slots the next requests, in rounds of at most one for each group of devices."""
        groups = self.programs.layout.data_parallel
        while chosen := self._choose():
            idle = next(iter(chosen.values()))  # read by a group that has no free slot, for nothing
            of_groups = [chosen.get(group, idle)[1] for group in range(groups)]
            read = self._prompts.read(self.programs.prefills, of_groups)
            slots = {group: slot for group, (slot, _) in chosen.items()}
            new = self._new_sequences(slots, of_groups, read.keys)
            self._slots = self.programs.insert(self._slots, read.prompts, new, self._sampling)
            rows = by_point(read.rows) if any(one.capture_prompt for _, one in chosen.values()) else {}
            for group, (slot, request) in chosen.items():
                sequence = _RunningSequence(request, int(new.prompt_row[group]))
                if request.capture_prompt:
                    length = len(request.prompt_token_ids)
                    sequence.add_rows({point: of[:, :length, group] for point, of in rows.items()})
                self._running[group * self.programs.shape.slots + slot] = sequence

    def _new_sequences(
        self, slots: dict[int, int], requests: list[SequenceRequest], keys: list[bytes]
    ) -> NewSequence:
        """Returns what each group's slot, if it has one, is given; takes rows for the prompts."""
        slot: Any = np.array([slots.get(group, -1) for group in range(len(requests))], np.int32)
        row: Any = np.maximum(slot, 0)
        there: Any = np.zeros(len(requests), bool)
        if self.programs.shape.shared_prompts:
            for group in slots:
                in_use = {running.prompt_row for running in self._slots_of(group) if running}
                row[group], there[group] = self._prompt_rows[group].place(keys[group], in_use)
        sequence_ids: Any = np.array([one.sampling_id & 0xFFFFFFFF for one in requests], np.uint32)
        limits: Any = np.array([one.max_tokens for one in requests], np.int32)
        strengths: Any = None if self._steering is None else np.stack([one.strengths for one in requests])
        return NewSequence(slot, row, there, sequence_ids, limits, strengths)

    def _choose(self) -> dict[int, tuple[int, SequenceRequest]]:
        """Returns by group its first free slot and the request for it; prompts of one width alone."""
        chosen: dict[int, tuple[int, SequenceRequest]] = {}
        widths: set[int] = set()
        for group in range(self.programs.layout.data_parallel):
            slots = self._slots_of(group)
            if None not in slots:
                continue
            request, self._waiting = self._waiting or next(self._requests, None), None
            if request is None:
                break
            widths.add(request.width)
            if len(widths) > 1:
                self._waiting = request
                break
            chosen[group] = (slots.index(None), request)
        return chosen

    def _slots_of(self, group: int) -> list[_RunningSequence | None]:
        first = group * self.programs.shape.slots
        return self._running[first : first + self.programs.shape.slots]

    @program_settings()
    def _dispatch(self) -> Window:
        """Starts the next window; returns before it has computed."""
        steered = () if self._steering is None else (self._steering.placed,)
        self._slots, window = self.programs.window(self._params, self._slots, self._sampling, *steered)
        return window

    @program_settings()
    def _settle(self, window: Window, on_window: Callable[[Occupancy], None]) -> list[_Share]:
        """Waits for a window, takes its small results, and frees the slots whose sequence has ended."""
        token_ids, logprobs = np.asarray(window.token_ids), np.asarray(window.logprobs)
        counts, ended = np.asarray(window.counts), np.asarray(window.ended)
        shares = []
        for slot, sequence in enumerate(self._running):
            if sequence is None:
                continue
            count = int(counts[slot])
            sequence.add_tokens(token_ids[slot, :count], logprobs[slot, :count])
            shares.append(_Share(sequence, slot, count, bool(ended[slot])))
            if ended[slot]:
                self._running[slot] = None
        on_window(Occupancy(len(counts), int(counts.max()), int(counts.sum()), self._prompts.count))
        self._prompts.count = 0
        return shares

    def _copy_out(self, rows: Rows, shares: list[_Share]) -> Iterator[FinishedSequence]:
        on_host = by_point(rows)
        for share in shares:
            share.sequence.add_rows(
                {point: of[:, : share.tokens, share.slot] for point, of in on_host.items()}
            )
            if share.ended:
                finished = share.sequence.finish(np.asarray(self._sampling.eos_token_ids))
                raise_on_nan(finished.logprobs)
                yield finished


def _fresh(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns memory that takes room only where it is written, and is given back once it is dropped."""
    return (
        np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), np.uint8).view(dtype).reshape(shape)
    )


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in text or "out of memory" in text
