"""Generation on meshes of eight simulated devices: as on one. ``test_sharding`` runs this in a process.

(Devices are simulated before JAX starts, or not at all.)
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from lively import Lively, assert_lively, pad_right, row_errors
from qwen3_sizes import SIZES, qwen3
from runner_cases import LAYERS, assert_refused, digests, four, report, run_main, store_of, submission

from activation_store import FinishedSequence, verify_store
from generate_jitted import GenerateShape, Generation, Sampling, generate_single_task_jitted, lower_generate
from qwen2_core.config import QwenConfig
from qwen2_core.hook_points import LN_FINAL, RESID_POST, point_names
from qwen2_core.interventions import AblateHeads, Add
from qwen2_core.parameter_checks import abstract_params
from qwen2_core.sharding import Layout, bytes_on_device, layout_of, make_layout
from qwen2_core.weights import load_qwen2
from qwen2_engine import ContinuousEngine, SequenceRequest
from qwen2_engine.decode_window import SlotShape
from qwen2_engine.memory_plan import MemoryPlanner, SlotMemory
from qwen2_engine.programs import SlotPrograms, compile_slots
from qwen2_jax_with_hooks import create_model_with_hooks

SPLIT = Lively(layers=3, heads=8, kv_heads=4, extract=(0, 2), tied=False)  # divides by 2 and by 4
MESHES = [(8, 1), (4, 2), (2, 4)]
SLOTS, LONGEST = 4, 40
SAMPLING = Sampling(temperature=1.2, top_k=50, top_p=0.95)
EOS = (3, 50)
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"


@pytest.fixture(scope="module", autouse=True)
def there_are_eight() -> None:
    assert len(jax.devices()) == 8


@functools.cache
def loaded(mesh_shape: tuple[int, int]) -> tuple[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = SPLIT.save(Path(folder))
        config, params = load_qwen2(checkpoint, scan_layers=True, mesh_shape=mesh_shape)
    return create_model_with_hooks(config, SPLIT.extract), params


@functools.cache
def items() -> tuple[SequenceRequest, ...]:
    """48 sequences, more than slots: two samples of 24 prompts, in two buckets by turns, of mixed limits."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 24) + np.tile([0, 64], 12)
    prompts = SPLIT.prompts(tuple(int(n) for n in lengths))
    limits = np.concatenate([[LONGEST], rng.integers(1, LONGEST + 1, 47)])
    return tuple(
        SequenceRequest(prompts[i // 2], int(limits[i]), sampling_id=i, id=i, capture_prompt=i % 6 == 0)
        for i in range(48)
    )


def widths_on(mesh_shape: tuple[int, int]) -> tuple[int, ...]:
    """Where weights are split, one bucket is enough."""
    return (64, 128) if mesh_shape[1] == 1 else (64,)


@functools.cache
def generated(mesh_shape: tuple[int, int]) -> dict[int, FinishedSequence]:
    work = [item for item in items() if len(item.prompt_token_ids) <= max(widths_on(mesh_shape))]
    settings: dict[str, Any] = {"eos_token_ids": EOS, "sampling": SAMPLING, "seed": 4, "capture_prompt": True}
    finished: list[Any] = list(ContinuousEngine(*loaded(mesh_shape), slots=SLOTS, **settings).run(work))
    return {one.id: one for one in finished}


@functools.cache
def programs(mesh_shape: tuple[int, int]) -> SlotPrograms:
    widths = widths_on(mesh_shape)
    shape = SlotShape(SLOTS, max(widths), LONGEST, capture_prompt=True)
    model, params = loaded(mesh_shape)
    return compile_slots(model, params, layout_of(model.config, params), shape, widths)


def memory(mesh_shape: tuple[int, int]) -> SlotMemory:
    model, params = loaded(mesh_shape)
    return MemoryPlanner(model, params, layout_of(model.config, params)).memory(programs(mesh_shape))


# --- Where the weights are ----------------------------------------------------------------------------------


def test_weights_are_split_by_what_their_axes_are():
    _, params = loaded((2, 4))
    layer = params["layers"]
    for leaf, of_the_whole in [
        (params["embed_tokens"]["embedding"], (1 / 4, 1)),
        (params["lm_head"]["kernel"], (1, 1 / 4)),
        (params["norm"]["weight"], (1,)),
        (layer["self_attn"]["q_proj"]["kernel"], (1, 1, 1 / 4)),
        (layer["self_attn"]["k_proj"]["bias"], (1, 1 / 4)),
        (layer["self_attn"]["o_proj"]["kernel"], (1, 1 / 4, 1)),
        (layer["mlp"]["up_proj"]["kernel"], (1, 1, 1 / 4)),
        (layer["mlp"]["down_proj"]["kernel"], (1, 1 / 4, 1)),
        (layer["input_layernorm"]["weight"], (1, 1)),
    ]:
        part = tuple(int(size * share) for size, share in zip(leaf.shape, of_the_whole, strict=True))
        assert [shard.data.shape for shard in leaf.addressable_shards] == [part] * 8


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_the_weights_are_those_of_the_checkpoint(mesh_shape: tuple[int, int]):
    one, many = loaded((1, 1))[1], loaded(mesh_shape)[1]
    jax.tree.map(np.testing.assert_array_equal, many, one)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(one))
    on_device = sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(many))
    assert 1 / mesh_shape[1] <= on_device / total < 1 / mesh_shape[1] + 0.05  # norms and biases are whole


def test_what_does_not_divide_is_whole_and_that_is_said():
    config = QwenConfig(num_attention_heads=14, num_key_value_heads=2)
    assert make_layout(config, (4, 2)).describe(config) == "8 devices: 4 groups of 2, which split the weights"
    assert make_layout(config, (2, 4)).describe(config) == (
        "8 devices: 2 groups of 4, which split the weights but for the attention (2 KV heads), "
        "no multiple of 4"
    )
    assert (
        make_layout(config, (8, 1)).describe(config) == "8 devices: 8 groups of 1, each with all the weights"
    )
    assert make_layout(config, (1, 1)) == Layout()


def test_meshes_that_cannot_be_are_refused():
    config = QwenConfig()
    with pytest.raises(ValueError, match="a mesh of 3 x 3 devices cannot be: this process has 8"):
        make_layout(config, (3, 3))
    with pytest.raises(
        ValueError, match=r"nothing in this model can be split over 5 devices: it has 2 KV heads"
    ):
        make_layout(config, (1, 5))


# --- Qwen3 --------------------------------------------------------------------------------------------------


def test_a_qwen3_on_a_mesh_is_that_of_one_device():
    """Norms of heads and the bias of the output are whole on each device; the latter is added once."""
    lively = Lively(layers=2, kv_heads=4, head_dim=32, biased=True, extract=(0, 1), seed=11)
    ids, out = np.stack(lively.prompts((20,) * 8)), {}
    for mesh in ((1, 1), (2, 4)):
        with tempfile.TemporaryDirectory() as folder:
            config, params = load_qwen2(lively.save(Path(folder)), scan_layers=True, mesh_shape=mesh)
        model = create_model_with_hooks(config, lively.extract)
        out[mesh] = generate_single_task_jitted(model, params, ids, 24)
    one, many = out.values()
    np.testing.assert_array_equal(many.token_ids, one.token_ids)
    assert row_errors(many.activations, one.activations).max() < 1e-4


@pytest.mark.parametrize("name", SIZES)
def test_each_published_size_of_qwen3_is_traced_with_its_weights_split(name: str):
    config = qwen3(name)
    layout = make_layout(config, (1, 8))
    assert layout.describe(config) == "8 devices: 1 groups of 8, which split the weights"
    params = abstract_params(config, layout)
    weights = sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(params))
    assert weights < 1.01 * 2e9 * SIZES[name].billions / 8 + 2e7
    lowered = lower_generate(create_model_with_hooks(config), params, GenerateShape(8, 256, 1100))
    assert len(lowered) == 2


# --- Slots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_slots_on_a_mesh_are_those_of_one_device(mesh_shape: tuple[int, int]):
    one, many = generated((1, 1)), generated(mesh_shape)
    assert len(one) == 48
    assert len(many) == (48 if mesh_shape[1] == 1 else 24)
    for name, got in many.items():
        expected = one[name]
        np.testing.assert_array_equal(got.token_ids, expected.token_ids)
        np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-3)
        assert got.finish_reason == expected.finish_reason
        assert got.rows is not None
        assert row_errors(got.rows, expected.rows).max() < 1e-4


def test_the_work_is_lively():
    assert_lively([one.token_ids for one in generated((1, 1)).values() if len(one.token_ids) > 30], 12)
    assert {one.finish_reason for one in generated((1, 1)).values()} == {"stop", "length"}


def test_groups_that_split_nothing_compute_the_same_bits():
    for name, expected in generated((1, 1)).items():
        got = generated((8, 1))[name]
        assert got.rows is not None
        assert expected.rows is not None
        assert got.rows.tobytes() == expected.rows.tobytes()
        assert got.logprobs.tobytes() == expected.logprobs.tobytes()


def test_groups_hear_nothing_of_each_other():
    """Each has loops of its own, so a collective would also be a lock-step."""
    for program in (programs((8, 1)).window, *programs((8, 1)).prefills.values(), programs((8, 1)).insert):
        assert not re.findall(COLLECTIVES, str(program.as_text()))


def test_the_devices_of_a_group_exchange_sums_and_no_weights():
    text = str(programs((2, 4)).window.as_text())
    assert set(re.findall(rf"({COLLECTIVES})(?:-start)?\(", text)) == {"all-reduce"}
    assert set(re.findall(r"replica_groups=([^ ]*),", text)) == {"[2,4]<=[8]"}  # two groups of four, in order


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_slots_are_updated_in_place_on_each_device(mesh_shape: tuple[int, int]):
    model, params = loaded(mesh_shape)
    layout = layout_of(model.config, params)
    cache = programs(mesh_shape).shape.cache_config(model).nbytes * layout.kv_heads(model.config) / 4
    for program in (programs(mesh_shape).window, programs(mesh_shape).insert):
        memory: Any = program.memory_analysis()
        assert 0.99 * cache < memory.alias_size_in_bytes < 1.05 * cache
        assert memory.temp_size_in_bytes < cache / 2


def test_the_plan_is_for_each_device():
    one, split = memory((1, 1)), memory((2, 4))
    assert split.on_device < 0.5 * one.on_device
    assert split.host_rows == 2 * one.host_rows  # of both groups


# --- One call -----------------------------------------------------------------------------------------------


def one_call(prompts: int) -> Generation:
    """Two samples of the first prompts, on a mesh of 2 x 4."""
    ids, lengths = pad_right([item.prompt_token_ids for item in items()[: 2 * prompts : 2]], width=128)
    out = generate_single_task_jitted(
        *loaded((2, 4)),
        ids,
        LONGEST,
        prompt_lengths=lengths,
        samples_per_prompt=2,
        eos_token_ids=EOS,
        sampling=SAMPLING,
        seed=4,
        extract_prompt=True,
    )
    return jax.tree.map(np.asarray, out)


def test_one_call_on_a_mesh_is_that_of_one_device():
    out = one_call(4)
    for row, item in enumerate(items()[:8]):
        expected = generated((1, 1))[row]
        n, prompt = len(expected.token_ids), len(item.prompt_token_ids) if item.capture_prompt else 0
        assert n == min(out.lengths[row], item.max_tokens)
        np.testing.assert_array_equal(out.token_ids[row, :n], expected.token_ids)
        assert out.activations is not None
        assert out.prompt_activations is not None
        rows = (out.prompt_activations[:, :prompt, row // 2], out.activations[:, :n, row])
        assert row_errors(np.concatenate(rows, axis=1), expected.rows).max() < 1e-4


def test_points_and_interventions_on_a_mesh_are_those_of_one_device():
    ids, lengths = pad_right([item.prompt_token_ids for item in items()[:16:2]], width=128)

    def steered(mesh_shape: tuple[int, int]) -> Generation:
        model, params = loaded(mesh_shape)
        points = {point: True if point == LN_FINAL else 1 for point in point_names() if point != RESID_POST}
        model = create_model_with_hooks(model.config, SPLIT.extract, points=points)
        direction = np.random.default_rng(1).standard_normal(model.config.hidden_size)
        out = generate_single_task_jitted(
            model,
            params,
            ids,
            12,
            prompt_lengths=lengths,
            extract_prompt=True,
            interventions=[Add(RESID_POST, 1, direction, np.arange(8.0)), AblateHeads(1, [2, 5])],
        )
        return jax.tree.map(np.asarray, out)

    one, many = steered((1, 1)), steered((2, 4))
    np.testing.assert_array_equal(many.token_ids, one.token_ids)
    assert len(one.points) == len(one.prompt_points) == 12
    for got, expected in ((many.points, one.points), (many.prompt_points, one.prompt_points)):
        for point, rows in expected.items():
            np.testing.assert_allclose(got[point], rows, atol=1e-4 * np.abs(rows).max(), err_msg=point)


def test_prompts_that_the_groups_cannot_share_are_refused():
    with pytest.raises(ValueError, match="3 prompts cannot be shared among the 2 groups of devices"):
        one_call(3)


# --- The runner ---------------------------------------------------------------------------------------------


def run(folder: Path, *mesh_shape: int, **flags: Any) -> str:
    folder.mkdir(exist_ok=True)
    shape = {"mesh_shape": list(mesh_shape)} if mesh_shape else {}
    outcome = run_main(four(folder), batch_size=2, extract_prompt=True, **shape, **flags)
    assert (outcome.code, outcome.err) == (0, "")
    assert list(verify_store(store_of(folder))) == []
    return outcome.out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert "using one of 8 devices" in run(folder)
    return folder


def test_a_run_on_eight_devices_leaves_the_bytes_of_one(alone: Path, tmp_path: Path):
    out = run(tmp_path, 8, 1)
    assert "8 devices: 8 groups of 1, each with all the weights" in out
    assert digests(tmp_path) == digests(alone)
    assert submission(tmp_path) == submission(alone)
    assert (report(tmp_path)["slots"], report(tmp_path)["device"]) == (16, "8 x 1 cpu")


def test_one_call_a_task_may_split_the_weights_too(alone: Path, tmp_path: Path):
    run(tmp_path, 1, 2, generation="task")
    store, expected = store_of(tmp_path), store_of(alone)
    assert set(store.index) == set(expected.index)
    for key in store.index:
        for layer in range(LAYERS):
            got, rows = (one.rows(one[key], layer) for one in (store, expected))
            assert row_errors(got, rows).max() < 1e-4


@pytest.mark.parametrize(
    ("mesh_shape", "sentence"),
    [
        ([4, 4], "--mesh_shape 4 4: a mesh of 4 x 4 devices cannot be: this process has 8 (cpu)"),
        ([1, 3], "--mesh_shape 1 3: nothing in this model can be split over 3 devices"),
    ],
)
def test_meshes_that_cannot_be_are_refused_before_the_weights_are_read(
    mesh_shape: list[int], sentence: str, tmp_path: Path, no_weights: None
):
    assert_refused(run_main(four(tmp_path), mesh_shape=mesh_shape), sentence)
