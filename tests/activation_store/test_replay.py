"""The audit: every silent error that was ever stored is planted here, and the replay reports it.

The faults are planted by writing the store anew, so checksums, norms and statistics all fit: a check of the
store against itself finds nothing, and only computing the rows again does.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from lively import Lively

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    SequenceId,
    StoreSettings,
    hook_name,
    verify_store,
)
from activation_store.format import INTERVENTIONS
from activation_store.interventions import interventions_sha256
from activation_store.replay import Forward, plain_forward, replay_sequences, replay_store
from generate_jitted import generate_single_task_jitted
from qwen2_core.checkpoint_files import checkpoint_fingerprint
from qwen2_core.hook_points import LN_FINAL, RESID_POST, full_name, point_names, width_of
from qwen2_core.intervention_files import decode_interventions, encode_interventions
from qwen2_core.interventions import AblateHeads, Add
from qwen2_core.sampling import Sampling
from qwen2_core.steering import steer
from qwen2_core.weights import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

pytestmark = pytest.mark.slow

LAYERS = (10, 11, 22, 23)
MODEL = Lively(layers=24, extract=LAYERS, inner=128, vocab=512, seed=8)
STEPS = 16
PROMPTS = (30, 17, 1)


class Run(NamedTuple):
    """A real generation, ready to be stored, and the forward pass to check it with."""

    settings: StoreSettings
    sequences: list[FinishedSequence]
    forward: Forward
    params: Any
    checkpoint: str


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(MODEL.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request: pytest.FixtureRequest, checkpoint: str) -> Run:
    config, params = load_qwen2(checkpoint, dtype=request.param, scan_layers=True)  # soon compiled
    model = create_model_with_hooks(config, LAYERS)
    prompts = np.random.default_rng(0).integers(0, 500, (len(PROMPTS), max(PROMPTS))).astype(np.int32)
    generation = generate_single_task_jitted(
        model,
        params,
        prompts,
        STEPS,
        prompt_lengths=np.array(PROMPTS),
        sampling=Sampling(temperature=1.0),
        extract_prompt=True,
    )
    assert generation.activations is not None
    assert generation.prompt_activations is not None
    of_prompts, generated = np.asarray(generation.prompt_activations), np.asarray(generation.activations)
    settings = StoreSettings(
        model_fingerprint=checkpoint_fingerprint(checkpoint),
        hook_names=tuple(map(hook_name, LAYERS)),
        hidden_size=config.hidden_size,
        dtype=request.param,
        capture_prompt=True,
        max_output_tokens=STEPS,
        sampling={"temperature": 1.0},
        seed=0,
        eos_token_ids=(),
        tokenizer_sha256="",
        prompt={},
        residual_dtype=config.residual_dtype.name,
    )
    sequences = [
        FinishedSequence(
            SequenceId(f"task{row}", 0, 0, "identity", prompts[row, :length]),
            np.asarray(generation.token_ids)[row],
            np.asarray(generation.logprobs)[row],
            "length",
            np.concatenate([of_prompts[:, :length, row], generated[:, :, row]], axis=1),
        )
        for row, length in enumerate(PROMPTS)
    ]
    forward = plain_forward(config, params, settings.hook_names)
    return Run(settings, sequences, forward, params, checkpoint)


def findings(
    directory: Path, run: Run, sequences: list[FinishedSequence], settings: StoreSettings | None = None
) -> list[str]:
    """What the replay of a store of these sequences says; the store must look right to every other check."""
    with ActivationWriter(directory, settings or run.settings, provenance={}) as writer:
        writer.submit(sequences)
    store = ActivationStore(directory)
    assert list(verify_store(store)) == []
    return list(replay_sequences(store, store.sequences(), run.forward))


def changed(run: Run, change: Callable[[np.ndarray], np.ndarray]) -> list[FinishedSequence]:
    """The run's sequences with the rows [layers, n, hidden] of the first one changed."""
    first, *others = run.sequences
    assert first.rows is not None
    rows = change(first.rows.copy()).astype(first.rows.dtype)
    return [dataclasses.replace(first, rows=rows), *others]


def test_a_sound_run_has_no_findings(tmp_path: Path, run: Run):
    assert findings(tmp_path, run, run.sequences) == []


def test_the_model_is_lively_enough_to_tell_faults(run: Run):
    for one in run.sequences:
        assert len(set(one.token_ids.tolist())) > STEPS // 2


def test_rows_shifted_by_one_are_found(tmp_path: Path, run: Run):
    def shift(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows[:, 1:], rows[:, -1:]], axis=1)

    found = findings(tmp_path, run, changed(run, shift))
    assert len(found) == len(LAYERS)
    assert all("task0" in line and "the rows are those of position +1" in line for line in found)


def test_swapped_neighbouring_layers_are_found(tmp_path: Path, run: Run):
    found = findings(tmp_path, run, changed(run, lambda rows: rows[[1, 0, 2, 3]]))
    assert [line.split(": ", 1)[1] for line in found] == [
        "blocks.10.hook_resid_post: the rows are those of layer 11",
        "blocks.11.hook_resid_post: the rows are those of layer 10",
    ]


def test_a_column_of_zeros_is_found(tmp_path: Path, run: Run):
    def zero(rows: np.ndarray) -> np.ndarray:
        rows[2, :, 7] = 0
        return rows

    (found,) = findings(tmp_path, run, changed(run, zero))
    assert "blocks.22.hook_resid_post" in found
    assert "differ" in found


def test_rows_of_another_sequence_are_found(tmp_path: Path, run: Run):
    other = run.sequences[1].rows
    assert other is not None

    def mix(rows: np.ndarray) -> np.ndarray:
        rows[:, -STEPS:] = other[:, -STEPS:]
        return rows

    found = findings(tmp_path, run, changed(run, mix))
    assert len(found) == len(LAYERS)
    assert all(f"{STEPS} of {PROMPTS[0] + STEPS} rows differ" in line for line in found)


@pytest.mark.parametrize("content", ["zero", "last row again"])
def test_a_stored_pad_row_is_found(tmp_path: Path, run: Run, content: str):
    first, *others = run.sequences
    assert first.rows is not None
    rows, tokens = first.rows.copy(), first.token_ids.copy()
    rows[:, -1] = 1e-3 if content == "zero" else rows[:, -2]
    tokens[-1] = 509  # the pad token
    found = findings(tmp_path, run, [dataclasses.replace(first, rows=rows, token_ids=tokens), *others])
    assert len(found) == 1 + len(LAYERS)
    assert "log-probability of generated token 15" in found[0]
    assert all("1 of 46 rows differ" in line for line in found[1:])


def test_rows_of_half_the_hidden_size_are_found(tmp_path: Path, run: Run):
    half = dataclasses.replace(run.settings, hidden_size=run.settings.hidden_size // 2)
    sequences = [
        dataclasses.replace(one, rows=one.rows[:, :, : half.hidden_size])
        for one in run.sequences
        if one.rows is not None
    ]
    found = findings(tmp_path, run, sequences, half)
    assert len(found) == len(sequences) * len(LAYERS)
    assert "(46, 32) values are stored, (46, 64) are computed" in found[0]
    assert list(replay_store(ActivationStore(tmp_path), run.checkpoint, 1)) == [
        "the stored rows are 32 wide, the model's are 64"
    ]


def test_a_final_norm_applied_to_the_last_layer_is_found(tmp_path: Path, run: Run):
    """What Hugging Face's hidden_states[-1] gives."""
    weight = np.asarray(run.params["norm"]["weight"], np.float32)

    def normed(rows: np.ndarray) -> np.ndarray:
        last = rows[-1].astype(np.float32)
        rows[-1] = last / np.sqrt((last**2).mean(axis=1, keepdims=True) + 1e-6) * weight
        return rows

    (found,) = findings(tmp_path, run, changed(run, normed))
    assert "blocks.23.hook_resid_post" in found
    assert "differ" in found


def test_positions_one_too_high_are_found(tmp_path: Path, run: Run):
    """The seam of a cache whose index was wrong: the generated rows were computed one position on.

    RoPE is relative, so a prompt and its continuation are needed for it to show.
    """
    first, *others = run.sequences
    assert first.rows is not None
    prompt = first.id.prompt_token_ids
    gapped, _ = run.forward(np.concatenate([prompt, prompt[-1:], first.token_ids]), len(prompt), ())
    rows = first.rows.copy()
    for of_layer, hook in zip(rows, run.settings.hook_names, strict=True):
        of_layer[len(prompt) :] = gapped[hook][len(prompt) + 1 :].astype(rows.dtype)
    found = findings(tmp_path, run, [dataclasses.replace(first, rows=rows), *others])
    assert len(found) == len(LAYERS)


def test_a_wrong_log_probability_is_found(tmp_path: Path, run: Run):
    first, *others = run.sequences
    logprobs = first.logprobs.copy()
    logprobs[3] -= 3
    (found,) = findings(tmp_path, run, [dataclasses.replace(first, logprobs=logprobs), *others])
    assert "log-probability of generated token 3" in found


@pytest.mark.parametrize("run", ["float32"], indirect=True)  # it loads and compiles the model once more
def test_the_whole_audit_loads_the_model_and_draws_sequences(tmp_path: Path, run: Run):
    assert findings(tmp_path, run, changed(run, lambda rows: rows[::-1])) != []
    store = ActivationStore(tmp_path)
    found = list(replay_store(store, run.checkpoint, count=99))
    assert len(found) == len(LAYERS)
    assert all("task0" in line for line in found)


def test_another_model_is_one_finding_and_nothing_is_replayed(tmp_path: Path, run: Run):
    other = dataclasses.replace(run.settings, model_fingerprint="00" * 32)
    findings(tmp_path, run, run.sequences, other)
    (found,) = replay_store(ActivationStore(tmp_path), run.checkpoint, 1)
    assert "is not the model that made the store" in found


def test_a_store_without_capture_has_its_log_probabilities_checked(tmp_path: Path, run: Run):
    bare = dataclasses.replace(run.settings, hook_names=())
    sequences = [dataclasses.replace(one, rows=None) for one in run.sequences]
    assert findings(tmp_path / "sound", run, sequences, bare) == []
    sequences[1] = dataclasses.replace(sequences[1], logprobs=sequences[1].logprobs - 3)
    (found,) = findings(tmp_path / "wrong", run, sequences, bare)
    assert "task1" in found


# --- Other points, and interventions ------------------------------------------------------------------------

POINTS: dict[str, Any] = {point: [11, 22] for point in point_names() if point not in (RESID_POST, LN_FINAL)}
HOOKS = (
    *map(hook_name, (11, 22)),
    *(full_name(point, layer) for point, layers in POINTS.items() for layer in layers),
    LN_FINAL,
)
VECTOR = np.random.default_rng(1).standard_normal(64)
STEERING = [
    Add("hook_resid_mid", 11, VECTOR, strength=0.5, positions="generated"),
    AblateHeads([22], [1], positions=[3, 20, 31]),
]
SWEEP = ((0.0, 0.0), (2.0, 1.0), (0.5, 1.0))  # the last are those of the file


class SteeredRun(NamedTuple):
    """A real generation of all points."""

    settings: StoreSettings
    sequences: list[FinishedSequence]
    config: Any
    params: Any
    interventions: bytes | None
    forward: Forward

    def findings(self, directory: Path, sequences: list[FinishedSequence]) -> list[str]:
        of, data = self.settings, self.interventions
        with ActivationWriter(directory, of, provenance={}, interventions=data) as writer:
            writer.submit(sequences)
        store = ActivationStore(directory)
        assert list(verify_store(store)) == []
        return list(replay_sequences(store, store.sequences(), self.forward))


def make_run(checkpoint: str, dtype: str, steering: list[Any], *, before: bool = False) -> SteeredRun:
    config, params = load_qwen2(checkpoint, dtype=dtype, scan_layers=True)
    model = create_model_with_hooks(config, (11, 22), points=POINTS | {LN_FINAL: True}, capture_before=before)
    prompts = np.random.default_rng(0).integers(0, 500, (len(PROMPTS), max(PROMPTS))).astype(np.int32)
    strengths = np.array(SWEEP).T
    generation = generate_single_task_jitted(
        model,
        params,
        prompts,
        STEPS,
        prompt_lengths=np.array(PROMPTS),
        sampling=Sampling(temperature=1.0),
        extract_prompt=True,
        interventions=[
            dataclasses.replace(one, strength=of_rows)
            for one, of_rows in zip(steering, strengths, strict=False)
        ],
    )
    data = encode_interventions(steering) if steering else None
    of_points = {RESID_POST: generation.activations} | generation.points
    of_prompts = {RESID_POST: generation.prompt_activations} | generation.prompt_points
    sequences = []
    for row, length in enumerate(PROMPTS):
        points = {
            point: np.concatenate(
                [np.asarray(of_prompts[point])[:, :length, row], np.asarray(values)[:, :, row]], axis=1
            )
            for point, values in of_points.items()
        }
        steered = SWEEP[row] if steering and row < 2 else ()
        sequences.append(
            FinishedSequence(
                SequenceId(f"task{row}", 0, 0, "identity", prompts[row, :length], steered),
                np.asarray(generation.token_ids)[row],
                np.asarray(generation.logprobs)[row],
                "length",
                points.pop(RESID_POST),
                points=points,
            )
        )
    settings = StoreSettings(
        model_fingerprint=checkpoint_fingerprint(checkpoint),
        hook_names=HOOKS,
        hidden_size=config.hidden_size,
        dtype=dtype,
        capture_prompt=True,
        max_output_tokens=STEPS,
        sampling={"temperature": 1.0},
        seed=0,
        eos_token_ids=(),
        tokenizer_sha256="",
        prompt={},
        widths={point: width_of(point, config) for point in (*POINTS, LN_FINAL)},
        interventions=interventions_sha256(data) if data else "",
        capture_before=before,
    )
    done = steer(decode_interventions(data, "") if data else None, config, 1)
    forward = plain_forward(config, params, HOOKS, done, before)
    return SteeredRun(settings, sequences, config, params, data, forward)


@pytest.fixture(scope="module")
def plain(checkpoint: str) -> SteeredRun:
    return make_run(checkpoint, "float32", [])


@pytest.fixture(scope="module")
def steered(checkpoint: str) -> SteeredRun:
    return make_run(checkpoint, "float32", STEERING)


def test_rows_of_every_point_are_those_of_a_plain_pass_and_shifted_ones_are_found(
    tmp_path: Path, plain: SteeredRun
):
    assert plain.findings(tmp_path / "sound", plain.sequences) == []

    def shifted(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows[:, 1:], rows[:, -1:]], axis=1)

    first, *others = plain.sequences
    assert first.rows is not None
    points = {point: shifted(rows) for point, rows in first.points.items()}
    first = dataclasses.replace(first, rows=shifted(first.rows), points=points)
    found = plain.findings(tmp_path / "shifted", [first, *others])
    assert [line.split(": ")[1] for line in found] == list(HOOKS)
    assert all("the rows are those of position +1" in line for line in found)


def test_rows_of_another_point_are_found_by_its_name(tmp_path: Path, plain: SteeredRun):
    first, *others = plain.sequences
    points = {
        **first.points,
        "hook_resid_pre": first.points["hook_resid_mid"],
        "attn.hook_k": first.points["attn.hook_v"],
    }
    found = plain.findings(tmp_path, [dataclasses.replace(first, points=points), *others])
    assert [line.split(": ", 1)[1] for line in found] == [
        f"blocks.{layer}.{point}: the rows are those of blocks.{layer}.{other}"
        for point, other in (("hook_resid_pre", "hook_resid_mid"), ("attn.hook_k", "attn.hook_v"))
        for layer in (11, 22)
    ]


def test_in_16_bits_every_point_is_within_what_is_allowed(tmp_path: Path, checkpoint: str):
    run = make_run(checkpoint, "bfloat16", [])
    assert run.findings(tmp_path, run.sequences) == []


def test_a_steered_run_is_replayed_with_each_sequences_strengths(tmp_path: Path, steered: SteeredRun):
    assert steered.findings(tmp_path, steered.sequences) == []
    store = ActivationStore(tmp_path)
    clean = plain_forward(steered.config, steered.params, HOOKS)

    def unsteered(tokens: np.ndarray, prompt_length: int, strengths: Sequence[float]) -> Any:
        return clean(tokens, prompt_length, ())

    without = list(replay_sequences(store, store.sequences(), unsteered))
    assert {line.split()[3] for line in without} == {"task1", "task2"}  # task0 has strengths of 0
    assert any("blocks.11.hook_resid_mid: " in line for line in without)
    assert not any("blocks.11.hook_resid_pre: " in line for line in without)


def test_strengths_of_other_interventions_are_a_finding(tmp_path: Path, steered: SteeredRun):
    first, *_ = steered.sequences
    identity = dataclasses.replace(first.id, strengths=(0.0, 0.0, 0.0))
    (found,) = steered.findings(tmp_path, [dataclasses.replace(first, id=identity)])
    assert "it has 3 strengths of 2 interventions" in found


def test_rows_from_before_an_intervention_are_replayed_as_such(tmp_path: Path, checkpoint: str):
    run = make_run(checkpoint, "float32", STEERING, before=True)
    assert run.findings(tmp_path, run.sequences) == []
    after = plain_forward(run.config, run.params, HOOKS, steer(STEERING, run.config, 1))
    store = ActivationStore(tmp_path)
    found = list(replay_sequences(store, store.sequences(), after))
    assert {line.split(": ")[1] for line in found} == {"blocks.11.hook_resid_mid", "blocks.22.attn.hook_z"}


def test_the_whole_audit_takes_interventions_from_the_store(
    tmp_path: Path, steered: SteeredRun, checkpoint: str
):
    assert steered.findings(tmp_path, steered.sequences) == []
    assert list(replay_store(ActivationStore(tmp_path), checkpoint, count=99)) == []
    (tmp_path / INTERVENTIONS).write_bytes(b"{}")
    (found,) = replay_store(ActivationStore(tmp_path), checkpoint, count=1)
    assert "is not the file that the manifest names" in found


def test_interventions_that_do_not_fit_the_model_are_a_finding(
    tmp_path: Path, steered: SteeredRun, checkpoint: str
):
    for number, data in enumerate((b"{}", encode_interventions(Add("hook_resid_post", 11, np.ones(63))))):
        of = dataclasses.replace(steered.settings, interventions=interventions_sha256(data))
        with ActivationWriter(tmp_path / str(number), of, provenance={}, interventions=data):
            pass
        (found,) = replay_store(ActivationStore(tmp_path / str(number)), checkpoint, count=1)
        assert found.startswith("interventions.safetensors ")


def test_a_width_that_is_not_the_models_is_a_finding(tmp_path: Path, plain: SteeredRun, checkpoint: str):
    of = dataclasses.replace(plain.settings, widths=plain.settings.widths | {"mlp.hook_post": 5})
    with ActivationWriter(tmp_path, of, provenance={}):
        pass
    assert list(replay_store(ActivationStore(tmp_path), checkpoint, 1)) == [
        "the stored rows of blocks.11.mlp.hook_post are 5 wide, the model's are 128"
    ]
