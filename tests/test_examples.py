"""The embedded tokenizer and tasks are what their scripts write; checkpoints of real shapes can be made."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoTokenizer

from arc_puzzles import build_messages, create_grid_encoder, encode_prompt, load_tasks
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY_MODEL = EXAMPLE_MODEL


@pytest.fixture
def scripts(monkeypatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def prompt(tokenizer) -> np.ndarray:
    task = load_tasks(EXAMPLE_TASKS).tasks[0]
    encoder = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
    return encode_prompt(tokenizer, build_messages(task, 0, encoder, "output-from-examples-v0"))


# --- The tiny checkpoint ------------------------------------------------------------------------------------


def test_the_committed_tokenizer_is_byte_for_byte_what_its_module_writes(scripts, tmp_path: Path):
    scripts("tiny_model.tokenizer").write_tokenizer(tmp_path)
    written, committed = contents(tmp_path), contents(TINY_MODEL)
    assert written.keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert [name for name in written if written[name] != committed[name]] == []
    assert sum(map(len, committed.values())) < 3_500_000


def test_the_committed_tasks_are_byte_for_byte_what_their_script_writes(scripts, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_sample_tasks.py", str(tmp_path / "tasks.json")])
    scripts("make_sample_tasks").main()
    assert (tmp_path / "tasks.json").read_bytes() == EXAMPLE_TASKS.read_bytes()


def test_the_tokenizer_splits_as_qwen2s_does(tokenizer):
    assert tokenizer.tokenize("Input:\n1 0123\n\n") == ["Input", ":", "\n1 ", "0", "1", "2", "3", "ĊĊ"]
    assert len(tokenizer) == json.loads((TINY_MODEL / "config.json").read_text())["vocab_size"] == 512
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [509, 510, 511]
    text = "Any text at all: naïve café, 漢字, \t\u200d🙂 it's\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_ids_that_end_a_sequence_agree(tokenizer):
    config = json.loads((TINY_MODEL / "config.json").read_text())
    generation = json.loads((TINY_MODEL / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_the_words_around_a_puzzle_are_few_tokens_and_every_cell_is_one(tokenizer, prompt):
    assert len(prompt) < 110  # 330 without tokens for whole phrases
    grids = tokenizer.decode(prompt).count("\n1 ")
    assert grids == 5
    tokens = tokenizer.convert_ids_to_tokens(prompt)
    assert {token.strip() for token in tokens if any(map(str.isdigit, token))} <= set("0123456789")


# --- Checkpoints of real shapes -----------------------------------------------------------------------------

SMALL = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_the_real_shapes_have_as_many_parameters_as_the_published_models(
    scripts, shape: str, parameters: int
):
    config = scripts("make_random_checkpoint").SHAPES[shape]
    shapes = scripts("checkpoint_writer").tensor_shapes(config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def run_main(script: ModuleType, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["make_random_checkpoint.py", *map(str, arguments)])
    script.main()


def test_shards_keep_to_their_limit_and_hold_the_same_tensors(scripts, tmp_path: Path, monkeypatch, capsys):
    script = scripts("make_random_checkpoint")
    monkeypatch.setitem(script.SHAPES, "qwen2.5-0.5b", SMALL)
    one, several = tmp_path / "one", tmp_path / "several"
    run_main(script, monkeypatch, one, "--dtype", "float32")
    run_main(script, monkeypatch, several, "--dtype", "float32", "--max-shard-gb", 1e-4)
    expected = safetensors.numpy.load_file(one / "model.safetensors")
    assert {name: tensor.shape for name, tensor in expected.items()} == scripts(
        "checkpoint_writer"
    ).tensor_shapes(SMALL)

    index = json.loads((several / "model.safetensors.index.json").read_text())
    shards = {
        file.name: safetensors.numpy.load_file(file) for file in sorted(several.glob("model-*.safetensors"))
    }
    assert len(shards) == 3
    assert next(iter(shards)) == "model-00001-of-00003.safetensors"
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= 100_000 for shard in shards.values())
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for shard in shards.values():
        for name, tensor in shard.items():
            np.testing.assert_array_equal(tensor, expected[name])
    assert contents(several)["tokenizer.json"] == contents(TINY_MODEL)["tokenizer.json"]
    assert "qwen2.5-0.5b, 3 weight file(s)" in capsys.readouterr().out


def test_the_seed_decides_every_tensor(scripts, tmp_path: Path, monkeypatch):
    script = scripts("make_random_checkpoint")
    monkeypatch.setitem(script.SHAPES, "qwen2.5-0.5b", SMALL)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_main(script, monkeypatch, tmp_path / out, "--seed", seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first, other = (safetensors.numpy.load_file(tmp_path / out / "model.safetensors") for out in "ac")
    assert all((first[name] != other[name]).any() for name in first)
    assert len({tensor.tobytes() for tensor in first.values()}) == len(first)  # a stream for each name
    assert {str(tensor.dtype) for tensor in first.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [
        ("model.layers.3.mlp.down_proj.weight", 0, 1.6 / 20),
        ("model.norm.weight", 1, 0.3),
        ("model.layers.0.self_attn.q_proj.bias", 0, 0.3),
    ],
)
def test_weights_have_the_deviation_of_their_role(scripts, name: str, mean: float, deviation: float):
    shape = (300, 400) if name.endswith("_proj.weight") else (120_000,)
    tensor = scripts("checkpoint_writer").lively_tensor(name, shape, 0, np.dtype(np.float32))
    assert tensor.mean() == pytest.approx(mean, abs=0.01 * deviation)
    assert tensor.std() == pytest.approx(deviation, rel=0.01)


def test_large_tensors_are_made_in_blocks_that_do_not_show(scripts, monkeypatch):
    writer = scripts("checkpoint_writer")
    whole = writer.lively_tensor("x.weight", (30, 41), 0, np.dtype(np.float32))
    monkeypatch.setattr(writer, "BLOCK", 64)
    np.testing.assert_array_equal(writer.lively_tensor("x.weight", (30, 41), 0, np.dtype(np.float32)), whole)


def test_weight_files_have_the_umasks_mode(scripts, tmp_path: Path):
    writer = scripts("checkpoint_writer")
    writer.write_safetensors(tmp_path / "x.safetensors", {"x": np.zeros(3, np.float32)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_bad_arguments_are_refused_before_anything_is_written(scripts, tmp_path: Path, monkeypatch, capsys):
    script = scripts("make_random_checkpoint")
    for arguments, problem in [
        ([tmp_path / "new", "--tokenizer", tmp_path], "has no tokenizer.json"),
        ([tmp_path / "new", "--seed", -1], "--seed is -1; it has to be 0 or more"),
        ([TINY_MODEL], "exists and is not an empty directory"),
        ([EXAMPLE_TASKS], "exists and is not an empty directory"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run_main(script, monkeypatch, *arguments)
        assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
