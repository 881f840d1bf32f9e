"""Loading checkpoints: the parameter tree, one error for all that is wrong, no torch, no second copy."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lively import SHALLOW, Lively, rewrite_json, rewrite_safetensors

from qwen2_core import weights
from qwen2_core.checkpoint_files import CheckpointError
from qwen2_core.config import QwenConfig
from qwen2_core.sharding import Layout
from qwen2_core.weights import (
    convert_hf_to_jax_weights,
    load_params,
    load_qwen2,
    read_config,
    stack_layers,
)
from qwen2_jax_with_hooks import create_model_with_hooks

ROOT = Path(__file__).parents[2]
UNTIED = replace(SHALLOW, layers=2, tied=False, extract=(0, 1))
TIED = replace(UNTIED, tied=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return UNTIED.save(tmp_path / "model")


def assert_trees_equal(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- The tree ---


def test_the_tree_has_the_documented_names_and_transposed_kernels(checkpoint: Path):
    config, params = load_qwen2(checkpoint, scan_layers=False)
    state = UNTIED.state_dict()
    assert config == UNTIED.config()
    assert set(params) == {"embed_tokens", "layers_0", "layers_1", "norm", "lm_head"}
    assert set(params["layers_1"]) == {
        "self_attn",
        "mlp",
        "input_layernorm",
        "post_attention_layernorm",
    }
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["weight"], state["model.norm.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], state["lm_head.weight"].T)
    name = "model.layers.1.self_attn.k_proj"
    projection = params["layers_1"]["self_attn"]["k_proj"]
    assert projection["kernel"].shape == (64, 32)
    np.testing.assert_array_equal(projection["kernel"], state[f"{name}.weight"].T)
    np.testing.assert_array_equal(projection["bias"], state[f"{name}.bias"])
    assert set(params["layers_0"]["self_attn"]["o_proj"]) == {"kernel"}
    assert all(np.asarray(leaf).flags.c_contiguous for leaf in jax.tree.leaves(params))


def test_the_tree_is_the_one_that_the_model_itself_initialises(checkpoint: Path):
    for scan_layers in (False, True):
        config, params = load_qwen2(checkpoint, scan_layers=scan_layers)
        model = create_model_with_hooks(config, UNTIED.extract)
        made = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
            lambda a: (a.shape, a.dtype), made["params"]
        )


def test_the_weights_of_scanned_layers_are_the_stack_of_unrolled_ones(checkpoint: Path):
    _, params = load_qwen2(checkpoint, scan_layers=False)
    config, stacked = load_qwen2(checkpoint, scan_layers=True)
    assert config.scan_layers
    assert_trees_equal(stacked, stack_layers(params))


REAL, SMALL = QwenConfig(), UNTIED.config()  # layers of 60 MB and of 120 kB in float32


@pytest.mark.parametrize(
    ("platform", "kernels", "config", "scans"),
    [
        ("tpu", False, REAL, True),
        ("gpu", False, SMALL, False),
        ("cpu", False, SMALL, True),
        ("cpu", False, SMALL.replace(dtype="bfloat16"), True),
        ("cpu", True, REAL, False),
        ("cpu", False, REAL.replace(dtype="bfloat16"), False),
        ("cpu", True, REAL.replace(dtype="bfloat16"), True),
    ],
)
def test_layers_are_scanned_by_default_where_that_costs_no_speed(
    monkeypatch: pytest.MonkeyPatch, platform: str, kernels: bool, config: QwenConfig, scans: bool
):
    """On TPUs; on CPU small layers, and what the compiled kernels read within the stacks."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(weights, "is_available", lambda: kernels)
    assert weights.scans_layers_by_default(config) == scans


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about CPUs")
def test_a_small_checkpoint_loads_stacked_on_a_cpu(checkpoint: Path):
    assert read_config(checkpoint).scan_layers
    config, params = load_qwen2(checkpoint)
    assert config.scan_layers
    assert "layers" in params


def test_several_files_load_as_one_model(checkpoint: Path, tmp_path: Path):
    sharded = UNTIED.save(tmp_path / "sharded", max_shard_bytes=60_000)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert_trees_equal(load_qwen2(sharded)[1], load_qwen2(checkpoint)[1])


def test_a_state_dict_converts_to_what_its_checkpoint_loads_as(checkpoint: Path):
    converted = convert_hf_to_jax_weights(UNTIED.state_dict(), UNTIED.config())
    assert_trees_equal(converted, load_qwen2(checkpoint, scan_layers=False)[1])


def test_weights_have_the_dtype_asked_for_or_else_the_checkpoints_own(checkpoint: Path):
    config, params = load_qwen2(checkpoint, dtype=jnp.bfloat16)
    assert config.dtype == jnp.bfloat16
    full = load_qwen2(checkpoint)[1]
    assert_trees_equal(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), full))
    rewrite_json(checkpoint / "config.json", torch_dtype="bfloat16")
    rewrite_safetensors(
        checkpoint / "model.safetensors",
        lambda tensors: tensors.update({name: a.astype(jnp.bfloat16) for name, a in tensors.items()}),
    )
    config, own = load_qwen2(checkpoint)
    assert config.dtype == jnp.bfloat16
    assert_trees_equal(own, params)


def test_a_tied_head_that_the_checkpoint_stores_all_the_same_is_ignored(tmp_path: Path):
    path = TIED.save(tmp_path)
    before = load_qwen2(path)[1]
    assert "lm_head" not in before
    rewrite_safetensors(
        path / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
    )
    assert_trees_equal(load_qwen2(path)[1], before)


def test_a_head_that_the_config_calls_the_embedding_and_is_not_is_a_head_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = UNTIED.save(tmp_path)
    expected = load_qwen2(path)[1]
    assert caplog.messages == []
    rewrite_json(path / "config.json", tie_word_embeddings=True)
    config, params = load_qwen2(path)
    assert not config.tie_word_embeddings
    assert_trees_equal(params, expected)
    assert len(caplog.messages) == 1
    assert "says that the head is the embedding, but lm_head.weight has other values" in caplog.text
    tied = QwenConfig.from_hf(path)  # what the file says alone
    assert tied.tie_word_embeddings
    for load in (
        lambda: load_params(path, tied, Layout()),
        lambda: convert_hf_to_jax_weights(UNTIED.state_dict(), tied),
    ):
        with pytest.raises(CheckpointError, match=r"has a lm_head\.weight that is not the embedding"):
            load()


def test_one_value_of_the_head_that_differs_is_seen_wherever_it_is(tmp_path: Path):
    for row in (0, 159):
        path = TIED.save(tmp_path / str(row))

        def differ(tensors: dict[str, np.ndarray], row: int = row) -> None:
            head = tensors["model.embed_tokens.weight"].copy()
            head[row, -1] += 1
            tensors["lm_head.weight"] = head

        rewrite_safetensors(path / "model.safetensors", differ)
        assert not read_config(path).tie_word_embeddings


def test_a_dtype_that_no_config_names_is_that_of_the_weights(tmp_path: Path):
    path = UNTIED.save(tmp_path)
    rewrite_json(path / "config.json", torch_dtype=None)
    assert read_config(path).dtype == np.float32
    rewrite_safetensors(
        path / "model.safetensors",
        lambda tensors: tensors.update({name: a.astype(jnp.bfloat16) for name, a in tensors.items()}),
    )
    assert read_config(path).dtype == jnp.bfloat16
    assert load_qwen2(path)[1]["norm"]["weight"].dtype == jnp.bfloat16
    assert read_config(path, dtype="float32").dtype == np.float32
    rewrite_json(path / "config.json", dtype="float32")
    assert read_config(path).dtype == np.float32


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, jnp.float8_e4m3fn, np.complex64])
def test_a_state_dict_of_other_types_is_refused_by_name(dtype: Any):
    state = UNTIED.state_dict()
    state["model.norm.weight"] = state["model.norm.weight"].astype(dtype)
    with pytest.raises(CheckpointError, match=r"not of floats: model\.norm\.weight \w+\."):
        convert_hf_to_jax_weights(state, UNTIED.config())


def test_a_state_dict_without_the_prefix_converts_alike():
    state = TIED.state_dict()
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    assert_trees_equal(
        convert_hf_to_jax_weights(bare, TIED.config()), convert_hf_to_jax_weights(state, TIED.config())
    )
    with pytest.raises(CheckpointError, match=r"given twice: .*norm\.weight"):
        convert_hf_to_jax_weights(state | bare, TIED.config())


# --- What is wrong with a checkpoint ---


def test_missing_unexpected_and_mis_shaped_tensors_are_all_in_one_error(checkpoint: Path):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        del tensors["model.layers.1.self_attn.q_proj.bias"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
        tensors["model.rotary.inv_freq"] = np.zeros(8, np.float32)
        tensors["model.norm.weight"] = np.zeros(63, np.float32)
        tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"].T)

    rewrite_safetensors(checkpoint / "model.safetensors", spoil)
    with pytest.raises(CheckpointError) as error:
        load_qwen2(checkpoint)
    message = str(error.value)
    assert "does not fit its config (2 layers)" in message
    assert "missing: model.layers.0.mlp.up_proj.weight, model.layers.1.self_attn.q_proj.bias;" in message
    unexpected = re.search("unexpected: ([^;]*);", message)
    assert unexpected is not None
    assert set(unexpected[1].split(", ")) == {"model.layers.2.mlp.up_proj.weight", "model.rotary.inv_freq"}
    assert "model.norm.weight [63] instead of [64]" in message
    assert "lm_head.weight [64, 160] instead of [160, 64]" in message


def test_a_state_dict_is_checked_like_a_checkpoint():
    state = UNTIED.state_dict()
    del state["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"The state dict does not fit .* missing: model\.norm\.weight"):
        convert_hf_to_jax_weights(state, UNTIED.config())
    state = UNTIED.state_dict()
    state["lm_head.bias"] = np.zeros(160, np.float32)
    with pytest.raises(CheckpointError, match=r"unexpected: lm_head\.bias"):
        convert_hf_to_jax_weights(state, UNTIED.config())


def test_a_long_list_of_wrong_tensors_is_cut(checkpoint: Path):
    rewrite_json(checkpoint / "config.json", num_hidden_layers=40)
    with pytest.raises(CheckpointError, match=r"\(40 layers\): missing: .* and \d+ more") as error:
        load_qwen2(checkpoint)
    assert len(str(error.value)) < 2000


def test_another_architecture_is_refused_before_any_weight_is_read(checkpoint: Path):
    rewrite_json(checkpoint / "config.json", model_type="llama")
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="This is a 'llama' model; only model_type 'qwen2'"):
        load_qwen2(checkpoint)


def test_a_revision_of_a_directory_is_refused(checkpoint: Path):
    with pytest.raises(CheckpointError, match="revision 'main' is for hub models"):
        load_qwen2(checkpoint, revision="main")


# --- In a process of its own ---


def python(code: str, *arguments: str | Path) -> str:
    """Runs code with this checkout importable; returns what it printed."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_loading_and_running_need_no_torch(checkpoint: Path):
    code = """
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")

sys.meta_path.insert(0, NoTorch())
from generate_jitted import generate_single_task_jitted
from qwen2_jax import load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks

config, params = load_qwen2(sys.argv[1], scan_layers=True)
out = generate_single_task_jitted(create_model_with_hooks(config, (0, 1)), params, [[1, 2, 3]], 2)
assert "torch" not in sys.modules
print(out.activations.shape)
"""
    assert python(code, checkpoint).strip() == "(2, 2, 1, 64)"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_no_second_copy_of_the_weights_is_in_memory(tmp_path: Path, scan_layers: bool):
    big = Lively(layers=12, heads=8, kv_heads=2, hidden=512, inner=2048, vocab=16_000, extract=(0,))
    big.save(tmp_path)
    code = """
import threading, time
import jax
from qwen2_core.weights import load_qwen2

def anonymous():  # memory of our own; the mapped file is the page cache's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

jax.numpy.zeros(3).block_until_ready()
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
_, params = load_qwen2(sys.argv[1], scan_layers=sys.argv[2] == "True")
jax.block_until_ready(params)
done = True
thread.join()
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), peak - before)
"""
    size, grown = map(int, python(code, tmp_path, str(scan_layers)).split())
    assert size > 200e6
    # Beside the weights one tensor, of up to 33 MB, and huge pages that are not full.
    assert size < grown < size + 120e6


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="about Linux")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the host's memory")
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_on_cpu_large_weights_fill_huge_pages(tmp_path: Path, scan_layers: bool):
    """JAX took over the memory that the loader asked for: its own begins anywhere."""
    big = replace(UNTIED, hidden=512, vocab=2048)
    big.save(tmp_path)
    _, params = load_qwen2(tmp_path, scan_layers=scan_layers)
    large = [leaf for leaf in jax.tree.leaves(params) if leaf.nbytes >= 2**21]
    assert len(large) >= 2
    assert all(leaf.unsafe_buffer_pointer() % 2**21 == 0 for leaf in large)


def test_parameters_do_not_change_with_the_state_dict_that_they_were_made_from():
    state = UNTIED.state_dict()
    params = convert_hf_to_jax_weights(state, UNTIED.config())
    before = jax.tree.map(lambda leaf: np.array(leaf), params)
    for tensor in state.values():
        tensor[...] = 0
    assert_trees_equal(params, before)
