"""Continuous generation: each sequence as if it were alone, whichever slot it lands in, beside whomever."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import Lively, assert_lively, pad_right, row_errors

from activation_store import FinishedSequence
from generate_jitted import Sampling, generate_single_task_jitted
from qwen2_core.interventions import Add
from qwen2_core.kernels.cpu.library import is_available, unavailable_reason
from qwen2_core.sharding import Layout
from qwen2_engine import (
    ContinuousEngine,
    Occupancy,
    SequenceRequest,
    continuous_batching,
    decode_window,
    programs,
)
from qwen2_engine.decode_window import NewSequence, SlotShape, SlotState
from qwen2_engine.programs import compile_slots
from qwen2_engine.prompt_rows import PromptRows
from qwen2_jax import QwenModel
from qwen2_jax_with_hooks import create_model_with_hooks

TINY = Lively(layers=3, extract=(0, 2), tied=False, seed=5)
SAMPLES, PROMPTS, LONGEST, SLOTS = 3, 70, 60, 8
EOS = (3, 50, 97)  # one token in 53
SAMPLING = Sampling(temperature=1.2, top_k=50, top_p=0.95)
RING = 64  # positions for LONGEST tokens in whole windows, of 16 steps as of 32


@functools.cache
def built(scan_layers: bool = True) -> tuple[Any, Any]:
    return TINY.build(scan_layers=scan_layers)


@functools.cache
def workload() -> tuple[SequenceRequest, ...]:
    """210 sequences: prompts of 1 to 160 tokens in four buckets, three samples of each, mixed limits.

    The first twelve have all buckets and the longest limit among them, so that any part which begins with
    them, or with every fifth, is done by the same programs.
    """
    rng = np.random.default_rng(0)
    lengths = np.concatenate([[160, 1, 65, 128], rng.integers(1, 161, PROMPTS - 4)])
    prompts = TINY.prompts(tuple(int(n) for n in lengths))
    return tuple(
        SequenceRequest(
            prompt,
            max_tokens=LONGEST if number % 5 == 0 else int(rng.integers(1, LONGEST + 1)),
            sampling_id=number,
            id=number,
            capture_prompt=sample == 0 and index % 7 == 0,
        )
        for index, prompt in enumerate(prompts)
        for sample in range(SAMPLES)
        for number in [index * SAMPLES + sample]
    )


@functools.cache
def alone() -> Any:
    """What ``generate_single_task_jitted`` gives for the workload; batch mates are nothing to it."""
    items = workload()
    ids, lengths = pad_right([item.prompt_token_ids for item in items[::SAMPLES]], width=160)
    out = generate_single_task_jitted(
        *built(),
        ids,
        LONGEST,
        prompt_lengths=lengths,
        samples_per_prompt=SAMPLES,
        eos_token_ids=EOS,
        sampling=SAMPLING,
        seed=9,
        sequence_ids=[item.sampling_id for item in items],
        extract_prompt=True,
    )
    return jax.tree.map(np.asarray, out)


def generate(
    items: Iterable[SequenceRequest], model: Any = None, **kwargs: Any
) -> dict[int, FinishedSequence]:
    """By the items' names, each of which must come once."""
    calls = {name: kwargs.pop(name) for name in ("on_window", "should_stop") if name in kwargs}
    results: dict[int, FinishedSequence] = {}
    for finished in engine(*(model or built()), **kwargs).run(items, **calls):
        name: Any = finished.id
        assert name not in results
        results[name] = finished
    return results


def engine(model: Any, params: Any, **kwargs: Any) -> ContinuousEngine:
    settings: dict[str, Any] = {"slots": SLOTS, "eos_token_ids": EOS, "sampling": SAMPLING, "seed": 9}
    settings |= {"capture_prompt": True} | kwargs
    return ContinuousEngine(model, params, **settings)


@pytest.fixture(scope="module")
def finished() -> tuple[dict[int, FinishedSequence], list[Occupancy]]:
    windows: list[Occupancy] = []
    return generate(workload(), on_window=windows.append), windows


def assert_as_alone(results: dict[int, FinishedSequence], items: Sequence[SequenceRequest]) -> None:
    expected = alone()
    assert sorted(results) == sorted(item.id for item in items)
    for item in items:
        row, result = item.sampling_id, results[item.id]
        n = min(int(expected.lengths[row]), item.max_tokens)
        np.testing.assert_array_equal(result.token_ids, expected.token_ids[row, :n])
        np.testing.assert_allclose(result.logprobs, expected.logprobs[row, :n], atol=1e-3)
        assert result.finish_reason == ("stop" if expected.token_ids[row, n - 1] in EOS else "length")
        rows = expected.activations[:, :n, row]
        if item.capture_prompt:
            prompt_rows = expected.prompt_activations[:, : len(item.prompt_token_ids), row // SAMPLES]
            rows = np.concatenate([prompt_rows, rows], axis=1)
        assert result.rows is not None
        assert row_errors(result.rows, rows).max() < 1e-4


def assert_same_bytes(some: dict[int, FinishedSequence], of_all: dict[int, FinishedSequence]) -> None:
    for name, result in some.items():
        for field in ("token_ids", "logprobs", "rows"):
            np.testing.assert_array_equal(getattr(result, field), getattr(of_all[name], field))
        assert result.finish_reason == of_all[name].finish_reason


# --- Each sequence as if it were alone ----------------------------------------------------------------------


def test_210_sequences_are_those_of_generate_single_task_jitted(finished):
    results, windows = finished
    assert_lively([alone().token_ids[row] for row in np.flatnonzero(alone().lengths == LONGEST)])
    assert len({result.finish_reason for result in results.values()}) == 2
    assert_as_alone(results, workload())
    assert sum(window.steps for window in windows) > 5 * RING  # the ring was gone around, again and again


def test_every_step_of_every_slot_is_counted_and_few_are_idle(finished):
    results, windows = finished
    assert sum(window.live_steps for window in windows) == sum(len(r.token_ids) for r in results.values())
    assert {window.slots for window in windows} == {SLOTS}
    # Half a window of 16 lost for each sequence of about 30 tokens; slots that wait for others to end would
    # be idle for more than half of the time.
    busy = sum(window.live_steps for window in windows) / sum(w.steps * w.slots for w in windows)
    assert busy > 0.7


def test_samples_of_one_prompt_are_prefilled_once_in_whichever_order_they_arrive(finished):
    assert sum(window.prompts for window in finished[1]) == PROMPTS
    windows: list[Occupancy] = []
    items = np.random.default_rng(1).permutation(np.array(workload()[:24]))
    generate(items, on_window=windows.append)
    assert sum(window.prompts for window in windows) == 8


def test_without_hooks_the_tokens_are_the_same(finished):
    model, params = built()
    items = workload()[:SAMPLES]
    for name, result in generate(items, (QwenModel(model.config), params)).items():
        assert result.rows is None
        np.testing.assert_array_equal(result.token_ids, finished[0][name].token_ids)


@pytest.mark.slow
def test_unrolled_layers_give_the_same():
    items = workload()[: 2 * SAMPLES]
    assert_as_alone(generate(items, built(scan_layers=False), slots=2), items)


# --- To the last bit, whatever happens on the way -----------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_arrival_changes_not_a_bit(finished, seed: int):
    items = np.random.default_rng(seed).permutation(np.array(workload()))
    results = generate(items)
    assert list(results) != list(finished[0])
    assert len(results) == len(workload())
    assert_same_bytes(results, finished[0])


@pytest.mark.skipif(
    not is_available(), reason=f"XLA's bfloat16 knows a row's neighbours: {unavailable_reason()}"
)
def test_nor_in_bfloat16_by_our_own_kernels():
    model = TINY.build(dtype="bfloat16", scan_layers=False)
    items = workload()[:60]
    in_order, reversed_ = generate(items, model), generate(items[::-1], model)
    assert list(reversed_) != list(in_order)
    assert_same_bytes(reversed_, in_order)


def test_a_run_that_is_stopped_and_continued_gives_the_same_bits(finished):
    windows: list[Occupancy] = []
    first = generate(workload(), on_window=windows.append, should_stop=lambda: len(windows) >= 9)
    assert len(windows) == 9  # the one that was running is the last
    assert 0 < len(first) < len(workload()) / 2
    rest = generate([item for item in workload() if item.id not in first])
    assert len(first) + len(rest) == len(workload())
    assert_same_bytes(first | rest, finished[0])


def test_longer_windows_over_an_equally_long_ring_change_not_a_bit(finished):
    """The ring is as long as the longest sequence in whole windows: RING, of 16 steps as of 32.

    Rings of different lengths may give different last bits: XLA on CPU multiplies float32 queries by a block
    of 80 keys and by one of 96 in two ways, whose sums differ.
    """
    items = workload()[:20]
    assert -(-LONGEST // 16) * 16 == -(-LONGEST // 32) * 32 == RING
    assert_same_bytes(generate(items, window=32), finished[0])


def test_requests_that_come_while_others_run_or_after_all_have_ended_change_not_a_bit(finished):
    of_all, _ = finished
    one = engine(*built())
    ordered = one.order(workload()[::5])
    (stage,) = one.plan(one.order(workload()))
    longest = max(item.max_tokens for item in workload())
    assert one.stages({item.width for item in workload()}, longest) == [stage]
    slots = one.start(stage)
    results = {}
    for some in (ordered[:5], ordered[5:]):  # None: there is nothing yet
        feed = itertools.chain(some[:3], [None] * 4, some[3:], itertools.repeat(None))
        results |= {ended.id: ended for ended in slots.generate(feed)}
    assert results.keys() == {item.id for item in ordered}
    assert_same_bytes(results, of_all)


def test_one_slot_gives_the_same_as_many():
    items = workload()[::5]
    assert_as_alone(generate(items, slots=1), items)


def test_a_smaller_budget_takes_fewer_slots_for_long_prompts_and_gives_the_same():
    items = [item for item in workload()[::5] if not 64 < len(item.prompt_token_ids) <= 128]
    settings: dict[str, Any] = {"slots": 2, "memory_budget": 2_050_000}
    assert [stage.shape.slots for stage in engine(*built(), **settings).plan(items)] == [2, 1]
    assert_as_alone(generate(items, **settings), items)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_sequence_that_is_not_finite_does_not_spoil_the_next_one_in_its_slot_or_row(slots: int):
    """Nor, in another slot, that of a prompt which lies in the row after it."""
    model, params = built()
    prompts = TINY.prompts((129, 130), seed=1)

    def run(params: Any, *prompts: np.ndarray) -> list[FinishedSequence]:
        items = [SequenceRequest(prompt, LONGEST, sampling_id=0, capture_prompt=True) for prompt in prompts]
        return list(ContinuousEngine(model, params, slots=slots, capture_prompt=True).run(items))

    expected = [run(params, prompt)[0] for prompt in prompts]
    used = np.concatenate([*prompts, *(result.token_ids for result in expected)])
    poison = np.setdiff1d(np.arange(TINY.vocab), used)[0]
    embedding = np.array(params["embed_tokens"]["embedding"])
    embedding[poison] = np.nan
    params = params | {"embed_tokens": {"embedding": jnp.asarray(embedding)}}
    bad, *good = run(params, np.append(prompts[0], poison), *prompts)
    assert bad.rows is not None
    assert np.isnan(bad.rows).any()
    for result, alone in zip(good, expected, strict=True):
        np.testing.assert_array_equal(result.rows, alone.rows)


def test_whether_samples_share_their_prompts_row_changes_not_a_bit(finished, monkeypatch: pytest.MonkeyPatch):
    """As on CPUs, or a copy for each, as on TPUs and GPUs."""
    items = workload()[::-1][:45] + workload()[:12]
    monkeypatch.setattr(continuous_batching, "reads_prompts_by_index", lambda platform: False)
    assert_same_bytes(generate(items), finished[0])


def test_a_prompt_is_copied_into_the_slots_once_for_all_of_its_samples(monkeypatch: pytest.MonkeyPatch):
    places: list[NewSequence] = []
    take = continuous_batching.RunningSlots._new_sequences

    def noting(*args: Any) -> NewSequence:
        places.append(take(*args))
        return places[-1]

    monkeypatch.setattr(continuous_batching.RunningSlots, "_new_sequences", noting)
    generate(workload()[:60])
    copies = [place for place in places if not place.prompt_is_there[0]]
    assert (len(places), len(copies)) == (60, 60 / SAMPLES)


# --- Faults that the comparisons above would find -----------------------------------------------------------


def shift_start(state: SlotState, slot: Any, by: int) -> SlotState:
    ar = state.cache.ar
    ar = dataclasses.replace(ar, start=ar.start.at[slot].add(by))
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, ar=ar))


def shift_length(state: SlotState, slot: Any, by: int) -> SlotState:
    prefill, rows = state.cache.prefill, state.cache.prompt_row
    assert rows is not None
    prefill = dataclasses.replace(prefill, length=prefill.length.at[rows[slot]].add(by))
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, prefill=prefill))


def swap_prompt(state: SlotState, slot: Any, row: int) -> SlotState:
    assert state.cache.prompt_row is not None
    rows = state.cache.prompt_row.at[slot].set(row)
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, prompt_row=rows))


@pytest.mark.parametrize(
    "fault",
    [
        lambda state, slot: shift_start(state, slot, -1),
        lambda state, slot: shift_start(state, slot, +1),
        lambda state, slot: shift_length(state, slot, -1),
        lambda state, slot: shift_length(state, slot, +1),
        lambda state, slot: swap_prompt(state, slot, 0),
        lambda state, slot: swap_prompt(state, slot, -1),
        lambda state, slot: dataclasses.replace(state, sequence_ids=state.sequence_ids.at[slot].add(1)),
    ],
    ids=[
        "starts early",
        "starts late",
        "prompt too short",
        "prompt too long",
        "another's prompt",
        "no prompt",
        "another's random key",
    ],
)
def test_a_planted_fault_is_found(fault: Callable, monkeypatch: pytest.MonkeyPatch):
    def faulty(state: SlotState, prompt: Any, new: NewSequence, *args: Any) -> SlotState:
        return fault(decode_window.insert(state, prompt, new, *args), new.slot)

    monkeypatch.setattr(programs, "insert", faulty)
    programs.compile_insert.cache_clear()
    items = workload()[::5]
    try:
        # ValueError: a sequence that goes on for longer than it may finds no room on the host.
        with pytest.raises((AssertionError, ValueError)):
            assert_as_alone(generate(items), items)
    finally:
        programs.compile_insert.cache_clear()


@pytest.mark.parametrize("fault", ["a row that is read", "a prompt that is not there"])
def test_a_prompt_in_a_wrong_row_is_found(fault: str, monkeypatch: pytest.MonkeyPatch):
    place = PromptRows.place

    def faulty(rows: PromptRows, key: bytes, in_use: Any) -> tuple[int, bool]:
        if fault == "a row that is read":
            return place(rows, key, ())
        return place(rows, key, in_use)[0], True

    monkeypatch.setattr(PromptRows, "place", faulty)
    items = workload()[::5]
    with pytest.raises(AssertionError):
        assert_as_alone(generate(items), items)


# --- Memory and programs ------------------------------------------------------------------------------------


def test_memory_on_the_device_does_not_grow_with_the_number_of_sequences():
    sizes: list[int] = []

    def measure(_: Occupancy) -> None:
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))

    generate(workload(), on_window=measure)
    assert len(sizes) > 40
    rows = TINY.hidden * len(TINY.extract) * 4
    assert max(sizes) - min(sizes) < 2 * 160 * rows  # prompts that have been read differ in width


SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own prompts", "shared prompts"])


@SHARED
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_is_inserted_in_place(dtype: str, scan_layers: bool, shared: bool):
    config = TINY.config(dtype=dtype, scan_layers=scan_layers)
    shape = SlotShape(SLOTS, 160, LONGEST, shared_prompts=shared)
    model: Any = create_model_with_hooks(config, TINY.extract)
    memory: Any = programs.compile_insert(model, shape, Layout()).memory_analysis()
    assert memory.alias_size_in_bytes > shape.cache_config(model).nbytes
    assert memory.temp_size_in_bytes < 10_000


@SHARED
@pytest.mark.slow
@pytest.mark.parametrize(("scan_layers", "slots"), [(False, 2), (True, SLOTS)], ids=["unrolled", "scanned"])
def test_the_slots_are_updated_in_place(scan_layers: bool, slots: int, shared: bool):
    shape = SlotShape(slots, 160, LONGEST, capture_prompt=True, shared_prompts=shared)
    compiled = compile_slots(*built(scan_layers), Layout(), shape, (64, 160))
    cache_bytes = shape.cache_config(built()[0]).nbytes
    for program in (compiled.window, compiled.insert):
        memory: Any = program.memory_analysis()
        assert memory.alias_size_in_bytes > cache_bytes
        assert memory.temp_size_in_bytes < cache_bytes / 2


def test_a_second_run_compiles_nothing():
    generate(workload()[:30])
    counts = [f.cache_info().misses for f in COMPILERS]
    generate(workload()[::-1][:60], sampling=Sampling(0.3), seed=4, eos_token_ids=(1, 2))
    assert [f.cache_info().misses for f in COMPILERS] == counts


COMPILERS = (
    programs.compile_create,
    programs.compile_insert,
    programs.compile_window,
    programs.compile_prefill,
)


# --- What is refused, at once -------------------------------------------------------------------------------

ADD = Add("hook_resid_post", 0, np.ones(TINY.hidden))


@pytest.mark.parametrize(
    ("changes", "kwargs", "message"),
    [
        ({"prompt_token_ids": np.zeros(0, np.int32)}, {}, "Prompt 0 is empty"),
        ({"prompt_token_ids": np.array([1, 160])}, {}, "Token id 160 .* is outside the vocabulary of 160"),
        ({"max_tokens": -1}, {}, "max_tokens must be at least 0, not -1"),
        ({"max_tokens": 0}, {}, "max_tokens 0 generates nothing, .* say capture_prompt=True"),
        ({"max_tokens": 32768}, {}, "exceed the model's context"),
        ({}, {"seed": -1}, "seed must be between"),
        ({}, {"eos_token_ids": (160,)}, "EOS token id 160 is outside"),
        ({}, {"window": 24}, "window must be a multiple of 16, not 24"),
        ({}, {"slots": 0}, "slots must be at least 1, not 0"),
        ({}, {"slots": 1.5}, "slots must be a whole number, not 1.5"),
        ({}, {"max_tokens": "8"}, "max_tokens must be a whole number, not '8'"),
        ({}, {"sampling": 0.7}, "sampling must be a Sampling"),
        ({}, {"cache_dtype": "int8"}, "cache_dtype must be one of"),
        ({}, {"capture_prompt": "no"}, "capture_prompt must be True or False"),
        ({"max_tokens": 1.5}, {}, "max_tokens must be a whole number, not 1.5"),
        ({"sampling_id": "7"}, {}, "sampling_id must be a whole number, not '7'"),
        ({"prompt_token_ids": "text"}, {}, r"prompt_token_ids takes token ids, not text"),
        ({"prompt_token_ids": np.ones((2, 3), int)}, {}, "has one prompt, not 2"),
        ({"sampling_id": 2**32}, {}, r"sampling_id must be between -2147483648 and 2\*\*32 - 1"),
        ({}, {"memory_budget": "8GB"}, "memory_budget must be a whole number, not '8GB'"),
        ({}, {"memory_budget": float("nan")}, "memory_budget must be a whole number, not nan"),
        ({}, {"memory_budget": True}, "memory_budget must be a whole number, not True"),
        ({}, {"memory_budget": 0}, "memory_budget must be at least 1, not 0"),
        ({}, {"memory_budget": -1}, "memory_budget must be at least 1, not -1"),
        ({"max_tokens": 9}, {"max_tokens": 8}, "max_tokens [0-9]+ exceeds the engine's max_tokens of 8"),
        ({}, {"capture_prompt": False}, "make the engine with capture_prompt=True"),
        ({"strengths": 1.0}, {}, "A request has strengths, and the engine has no interventions"),
        ({"strengths": [1, 2]}, {"interventions": ADD}, "one number, or one for each of the 1 interventions"),
        ({"strengths": "x"}, {"interventions": ADD}, "strengths must be finite numbers"),
        (
            {},
            {"interventions": dataclasses.replace(ADD, strength=[1, 2])},
            "Add.strength must be one number: each request has its own",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_any_work(
    changes: dict[str, Any], kwargs: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(continuous_batching, "compile_slots", pytest.fail)
    items = [workload()[0], dataclasses.replace(workload()[1], **changes)]
    with pytest.raises(ValueError, match=message):
        engine(*built(), **kwargs).run(items)


@pytest.mark.parametrize(
    "requests", [None, SequenceRequest(np.array([1]), 4, 0), 5], ids=["none", "one", "5"]
)
def test_what_are_no_requests_is_refused(requests: Any):
    for method in (engine(*built()).run, engine(*built()).order):
        with pytest.raises(ValueError, match="requests must be a list, or another iterable, of SequenceReq"):
            method(requests)


def test_a_run_is_refused_whose_parameters_were_deleted_since():
    model, params = built()
    made = engine(model, jax.tree.map(jnp.copy, params))
    jax.tree.map(lambda leaf: leaf.delete(), made.params)
    with pytest.raises(ValueError, match="were deleted"):
        made.run(workload()[:1])


def test_a_requests_prompt_may_be_padded_where_its_own_mask_says_so():
    padded: Any = {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]}
    [ordered] = engine(*built()).order([SequenceRequest(padded, 4, 0)])
    assert ordered.prompt_token_ids.tolist() == [5, 6]


def test_a_prompt_is_read_once_for_all_strengths_of_what_does_not_reach_it():
    prompt = workload()[0].prompt_token_ids
    for positions, reads in (("generated", 1), ("all", 3)):
        add = dataclasses.replace(ADD, positions=positions)
        made, uses = engine(*built(), interventions=add, capture_prompt=False), []
        requests = [SequenceRequest(prompt, 2, i, strengths=float(i % 3)) for i in range(6)]
        assert len(list(made.run(requests, on_window=uses.append))) == 6
        assert sum(use.prompts for use in uses) == reads


def test_no_items_are_no_work():
    assert list(engine(*built()).run([])) == []
