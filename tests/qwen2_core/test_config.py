"""Reading config.json: both spellings of Transformers, and everything that is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lively import SHALLOW

from qwen2_core.checkpoint_files import CheckpointError
from qwen2_core.config import QwenConfig
from qwen2_core.rope import Yarn

# Qwen2.5-0.5B-Instruct, as Transformers 4 and 5 write it.
FOUR: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
FIVE = {key: value for key, value in FOUR.items() if key not in ("rope_theta", "torch_dtype")} | {
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "layer_types": ["full_attention"] * 24,
    "sliding_window": None,
}
SPELLINGS = pytest.mark.parametrize("hf", [FOUR, FIVE], ids=["transformers 4", "transformers 5"])


@SPELLINGS
def test_both_spellings_of_qwen_0_5b_read_as_the_defaults(hf: dict[str, Any]):
    expected = QwenConfig(dtype="bfloat16", sliding_window=hf["sliding_window"])
    assert QwenConfig.from_hf(hf) == expected
    assert expected.head_dim == 64
    assert expected.q_heads_per_kv_head == 7
    assert QwenConfig().dtype == np.float32


@SPELLINGS
def test_a_directory_a_string_and_a_config_object_read_alike(hf: dict[str, Any], tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(hf))
    expected = QwenConfig.from_hf(hf)
    assert QwenConfig.from_hf(tmp_path) == expected
    assert QwenConfig.from_hf(str(tmp_path)) == expected
    assert QwenConfig.from_hf(SimpleNamespace(to_dict=lambda: hf)) == expected


@pytest.mark.parametrize(
    "change", [{"rope_theta": 10000}, {"rope_theta": None, "rope_parameters": {"rope_theta": 10000}}], ids=str
)
def test_rope_theta_is_read_in_either_spelling(change: dict[str, Any]):
    hf = {key: value for key, value in (FOUR | change).items() if value is not None}
    assert QwenConfig.from_hf(hf).rope_theta == 10000.0


def test_missing_optional_keys_have_the_defaults_of_transformers():
    hf = {key: FOUR[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
    hf |= {"num_hidden_layers": 2, "num_attention_heads": 14, "num_key_value_heads": None}
    config = QwenConfig.from_hf(hf)
    assert config.num_key_value_heads == 14
    assert not config.tie_word_embeddings
    assert config.dtype == np.float32
    assert config.rope_theta == 10_000
    assert config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 32768


def test_a_config_of_layers_that_are_all_full_is_accepted_whatever_else_it_says_of_windows():
    assert QwenConfig.from_hf(FIVE | {"use_sliding_window": True}) == QwenConfig.from_hf(FIVE)
    for first in (24, 25, 2**70):
        hf = FOUR | {"use_sliding_window": True, "max_window_layers": first}
        assert QwenConfig.from_hf(hf) == QwenConfig.from_hf(FOUR)


def test_what_the_file_says_of_our_own_settings_counts_for_nothing():
    assert QwenConfig.from_hf(FOUR | {"scan_layers": True, "use_fixed_cache": 1}) == QwenConfig.from_hf(FOUR)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "vocab_size", "hidden_size", "max_position_embeddings"]
)
@pytest.mark.parametrize("value", [10**9 * 4, 10**4000, -1, 0, True, 2.0, "2", None, NAN, INF, [2], {"a": 2}])
def test_sizes_are_integers_of_a_plausible_range(name: str, value: Any):
    with pytest.raises(CheckpointError, match=f"{name} must be a positive integer, not .* \\(the most is"):
        QwenConfig.from_hf(FOUR | {name: value})


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize(
    "value", [1e308, 10**4000, -1, 0, True, "1e6", None, NAN, INF, -INF, [1.0], {"a": 2}]
)
def test_numbers_are_numbers_of_a_plausible_range(name: str, value: Any):
    with pytest.raises(CheckpointError, match=f"{name} must be a positive number, not .* \\(the most is"):
        QwenConfig.from_hf(FOUR | {name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a positive integer, not 1000000000"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads must be a positive integer, not '2'"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta must be a positive number, not '1e6'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
        ({"rope_scaling": [2.0]}, "rope_scaling must be an object"),
        ({"rope_parameters": 5}, "rope_parameters must be an object, not 5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, not None"),
        ({"use_sliding_window": "no"}, "use_sliding_window must be true or false, not 'no'"),
        ({"sliding_window": "4096"}, "sliding_window must be an integer or null, not '4096'"),
        ({"max_window_layers": "28", "layer_types": None}, "max_window_layers must be an integer, not '28'"),
        ({"layer_types": "full_attention"}, "layer_types must be a list of 24 names"),
        ({"layer_types": [["full_attention"]] * 24}, "layer_types .* is not one of"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"RoPE of type \['yarn'\] is not one of default, linear"),
        ({"hidden_act": {"silu": 1}}, "hidden_act .* is not implemented"),
        ({"hidden_act": None}, "hidden_act None is not implemented"),
        ({"head_dim": "64"}, "head_dim must be a positive integer, not '64'"),
        ({"head_dim": 0}, "head_dim must be a positive integer, not 0"),
        ({"head_dim": True}, "head_dim must be a positive integer, not True"),
        ({"dtype": ["float32"]}, r"dtype \['float32'\] is not one of"),
        ({"model_type": ["qwen2"]}, "This is a .* model"),
        ({"quantization_config": {}}, "quantization_config is not implemented"),
        ({"quantization_config": "awq"}, "quantization_config is not implemented"),
    ],
    ids=str,
)
def test_values_of_the_wrong_type_are_refused_by_name(change: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        QwenConfig.from_hf(FOUR | change)


# Qwen3-0.6B, as Transformers 4 writes it.
THREE = FOUR | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}


def test_a_qwen3_has_norms_of_its_heads_their_own_size_and_no_biases():
    config = QwenConfig.from_hf(THREE)
    assert config.head_dim == 128
    assert config.qk_norm
    assert not config.qkv_bias
    assert not config.output_bias
    assert config.max_position_embeddings == 40960
    assert config.q_heads_per_kv_head == 2
    biased = QwenConfig.from_hf(THREE | {"attention_bias": True})
    assert biased == config.replace(qkv_bias=True, output_bias=True)


def test_what_a_qwen3_config_does_not_say_is_as_transformers_has_it():
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = QwenConfig.from_hf({key: THREE[key] for key in names} | {"num_attention_heads": 32})
    assert (config.head_dim, config.num_key_value_heads) == (128, 32)
    assert not config.tie_word_embeddings
    assert not config.qkv_bias
    assert config.rope_theta == 10_000
    assert config.max_position_embeddings == 32768


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": None}, "head_dim must be a positive integer, not None"),
        ({"attention_bias": None}, "attention_bias must be true or false, not None"),
        ({"attention_bias": 0}, "attention_bias must be true or false, not 0"),
    ],
    ids=str,
)
def test_a_qwen3_config_that_transformers_refuses_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        QwenConfig.from_hf(THREE | change)


def test_a_head_dim_of_its_own_is_kept_when_a_config_is_changed_and_a_derived_one_follows():
    assert QwenConfig.from_hf(THREE).replace(hidden_size=512).head_dim == 128
    assert QwenConfig().replace(hidden_size=448).head_dim == 32
    assert QwenConfig().replace(num_attention_heads=8, head_dim=48).head_dim == 48


def test_the_residual_stream_is_float32_or_as_the_weights():
    half = QwenConfig(dtype="bfloat16")
    assert half.residual_dtype == np.float32
    assert half.replace(residual_dtype="bfloat16").residual_dtype == half.dtype
    for residual_dtype in ("float16", "int8", None):
        with pytest.raises(CheckpointError, match=r"residual_dtype .* is neither float32 nor that of the w"):
            half.replace(residual_dtype=residual_dtype)


def test_a_config_is_hashable_and_frozen():
    config = SHALLOW.config()
    assert hash(config) == hash(SHALLOW.config())
    assert config.replace(dtype="bfloat16") != config
    with pytest.raises(AttributeError):
        config.hidden_size = 3  # type: ignore[misc]


SLIDING = ["full_attention"] * 12 + ["sliding_attention"] * 12


@SPELLINGS
def test_the_layers_from_max_window_layers_on_have_a_window_or_those_that_layer_types_names(
    hf: dict[str, Any],
):
    windows = (None,) * 12 + (4096,) * 12
    first = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 12}
    by_number = QwenConfig.from_hf(hf | first | {"layer_types": None})
    by_name = QwenConfig.from_hf(hf | first | {"layer_types": SLIDING, "max_window_layers": 3})
    assert by_number == by_name
    assert by_number.windows == windows
    assert by_number.layer_types == tuple(SLIDING)
    everywhere = first | {"layer_types": None, "max_window_layers": -1}
    assert QwenConfig.from_hf(hf | everywhere).windows == (4096,) * 24
    assert QwenConfig.from_hf(hf | first | {"use_sliding_window": False, "layer_types": None}).windows == (
        (None,) * 24
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": None}, "layer_types must be a list of 6 names"),
        ({"layer_types": ("sliding_attention",) * 5}, "layer_types must be a list of 6 names"),
        ({"layer_types": ("chunked",) * 6}, "layer_types 'chunked' is not one of"),
        ({"sliding_window": None}, "sliding_window must be a positive integer, not None"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
        ({"use_sliding_window": 1}, "use_sliding_window must be true or false, not 1"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling must be one of the classes of qwen2_core.rope"),
    ],
    ids=str,
)
def test_a_config_made_by_hand_is_checked_too(change: dict[str, Any], message: str):
    config = SHALLOW.config(use_sliding_window=True, sliding_window=8, layer_types=("sliding_attention",) * 6)
    with pytest.raises(CheckpointError, match=message):
        config.replace(**change)
    assert config.replace(use_sliding_window=False).layer_types is None


@SPELLINGS
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_yarn_is_read_in_every_spelling_and_lengthens_the_context(hf: dict[str, Any], name: str, kind: str):
    yarn = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    expected = Yarn(
        original_max_position_embeddings=32768, factor=4.0, attention_factor=0.1 * math.log(4) + 1
    )
    config = QwenConfig.from_hf(hf | {name: yarn})
    assert config.rope_scaling == expected
    assert config.rope_theta == 1e6
    assert config.context_length == 131_072
    assert QwenConfig.from_hf(hf).context_length == 32_768
    beside = {key: value for key, value in yarn.items() if key != "original_max_position_embeddings"}
    config = QwenConfig.from_hf(hf | {name: beside, "original_max_position_embeddings": 8192})
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position_embeddings == 8192


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = [
    (YARN | {"factor": "4"}, "factor of RoPE must be a number from 1 to 1e\\+06, not '4'"),
    (YARN | {"factor": 0.5}, "factor of RoPE must be a number from 1 to"),
    (YARN | {"factor": True}, "factor of RoPE must be a number .* not True"),
    (YARN | {"factor": NAN}, "factor of RoPE must be a number .* not nan"),
    (YARN | {"attn_factor": 1.0}, "RoPE of type 'yarn' has no 'attn_factor'. Name another rope_type"),
    (YARN | {"beta_fast": 1, "beta_slow": 32}, "beta_fast of RoPE must be at least beta_slow, not 1 and 32"),
    (YARN | {"truncate": 1}, "truncate of RoPE must be true or false, not 1"),
    (
        YARN | {"original_max_position_embeddings": 32768.5},
        "original_max_position_embeddings of RoPE must be",
    ),
    (
        YARN | {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is not implemented with RoPE of type 'yarn'",
    ),
    ({"rope_type": "linear"}, "RoPE of type 'linear' needs factor"),
    (
        {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 8},
        "'linear' has no 'original_max",
    ),
    ({"type": "dynamic", "factor": None}, "RoPE of type 'dynamic' needs factor"),
    (LLAMA | {"high_freq_factor": 1}, "high_freq_factor of RoPE must be above low_freq_factor, not 1 and 1"),
    ({"type": "llama3", "factor": 8.0}, "RoPE of type 'llama3' needs low_freq_factor"),
    (LONG | {"long_factor": [1.0] * 31}, "needs a long_factor of 32 numbers .*, not 31"),
    (LONG | {"long_factor": [1.0, 0.0] * 16}, "long_factor of RoPE must be a list of positive numbers"),
    (LONG | {"short_factor": 2.0}, "short_factor of RoPE must be a list of positive numbers, not 2.0"),
    (
        {"rope_type": "mrope", "mrope_section": [16, 24, 24]},
        "RoPE of type 'mrope' is not one of default, linear",
    ),
    ({"rope_type": "axial"}, "RoPE of type 'axial' is not one of"),
    ({"factor": 4.0}, "RoPE of type 'default' has no 'factor'. Name another rope_type, or remove it"),
    ({"full_attention": {"rope_type": "default"}}, "RoPE of its own for each kind of layer"),
]


@pytest.mark.parametrize(
    ("rope", "message"), ROPES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_cannot_be_honoured_of_rope_is_refused_by_name(rope: dict[str, Any], message: str):
    for name in ("rope_scaling", "rope_parameters"):
        with pytest.raises(CheckpointError, match=message):
            QwenConfig.from_hf(FOUR | {name: rope})


@SPELLINGS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 23}, "layer_types must be a list of 24 names"),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types 'chunked_attention' is not one of"),
        ({"layer_types": SLIDING}, "layer_types has sliding_attention, but use_sliding_window is not true"),
        (
            {"layer_types": SLIDING, "use_sliding_window": True, "sliding_window": None},
            "sliding_window must be a positive integer, not None",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not implemented"),
        ({"model_type": "llama"}, "'llama' model; only model_type 'qwen2'"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' model; only model_type 'qwen2' .* and 'qwen3'"),
        ({"model_type": "qwen3_next"}, "'qwen3_next' model; only"),
        ({"dtype": "float64", "torch_dtype": "float64"}, "dtype float64 is not one of"),
        ({"num_attention_heads": 13}, "hidden_size 896 is not a multiple of num_attention_heads 13"),
        ({"num_key_value_heads": 4}, "num_attention_heads 14 is not a multiple of num_key_value_heads 4"),
        ({"num_attention_heads": 128, "num_key_value_heads": 2}, "head_dim 7 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"vocab_size": "151936"}, "vocab_size must be a positive integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_features_that_are_not_implemented_are_refused_by_name(
    hf: dict[str, Any], change: dict[str, Any], message: str
):
    with pytest.raises(CheckpointError, match=message):
        QwenConfig.from_hf(hf | change)


def test_rope_scaling_of_the_default_type_is_accepted():
    assert QwenConfig.from_hf(FOUR | {"rope_scaling": None}) == QwenConfig.from_hf(FOUR)
    assert QwenConfig.from_hf(FOUR | {"rope_scaling": {"rope_type": "default"}}) == QwenConfig.from_hf(FOUR)


def test_missing_required_keys_are_named():
    with pytest.raises(CheckpointError, match="lacks hidden_size, num_hidden_layers; is it a Qwen2"):
        QwenConfig.from_hf(
            {key: value for key, value in FOUR.items() if key not in ("hidden_size", "num_hidden_layers")}
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_size": ', "is not valid JSON"),
        ("[1, 2]", "holds no JSON object"),
        ("\xff", "is not valid JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not valid JSON .*digits"),
        ('{"a":' * 200_000, "is nested too deep"),
        ("[" * 200_000, "is nested too deep"),
        ('{"rope_theta": NaN}', "This is a None model"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        QwenConfig.from_hf(tmp_path)


def test_a_missing_directory_config_or_hub_model_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"There is no model directory .*/nowhere"):
        QwenConfig.from_hf(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        QwenConfig.from_hf(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="is a file; give the model's directory"):
        QwenConfig.from_hf(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"hub model nobody/nothing could not be had"):
        QwenConfig.from_hf("nobody/nothing")  # offline: not in the local cache
