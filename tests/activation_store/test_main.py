"""`python -m activation_store`: what it prints and how it exits."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from activation_fakes import SETTINGS, batch

import activation_store
from activation_store import ActivationWriter
from activation_store.__main__ import _parser, main


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with ActivationWriter(tmp_path / "store", SETTINGS, provenance={}) as writer:
        writer.submit(batch("a", "bb"))
    return tmp_path / "store"


def damage(directory: Path) -> Path:
    path = directory / "host-00000" / "shard-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def test_a_sound_store_verifies_with_exit_code_0(directory: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(directory)]) == 0
    assert capsys.readouterr().out == "4 sequences, 0 findings\n"


def test_a_finding_is_one_line_and_exit_code_1(directory: Path, capsys: pytest.CaptureFixture[str]):
    damage(directory)
    assert main(["verify", str(directory)]) == 1
    finding, summary = capsys.readouterr().out.splitlines()
    assert finding.startswith("host-00000/shard-000000.safetensors: has ")
    assert summary == "4 sequences, 1 findings"


def test_repair_drops_what_is_damaged(directory: Path, capsys: pytest.CaptureFixture[str]):
    damage(directory)
    assert main(["verify", str(directory), "--repair"]) == 0
    dropped, summary = capsys.readouterr().out.splitlines()
    assert dropped.startswith("repaired: host-00000/shard-000000.safetensors: has ")
    assert summary == "0 sequences, 0 findings"


def test_coverage_is_checked_against_the_puzzles_of_a_data_set(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    grid = [[1, 2], [3, 4]]
    pair = {"input": grid, "output": grid}
    puzzle = {"train": [pair], "test": [pair]}
    dataset = tmp_path / "tasks.json"
    dataset.write_text(json.dumps({"a": {**puzzle, "test": [pair, pair]}, "missing": puzzle}))
    assert main(["verify", str(directory), "--dataset", str(dataset)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "task a test 1 has no sequence",
        "task missing test 0 has no sequence",
        "4 sequences, 2 findings",
    ]


def test_the_module_runs_as_a_command(directory: Path):
    done = subprocess.run(
        [sys.executable, "-m", "activation_store", "verify", str(directory)],
        cwd=Path(activation_store.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4 sequences, 0 findings\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{directory}/nothing"], "is not an activation store"),
        (["verify", "{directory}", "--replay", "2"], "--replay needs --model_path"),
        (["verify", "{directory}", "--replay", "2", "--model_path", "{directory}"], "config.json"),
        (["verify", "{directory}", "--dataset", "{directory}/none.json"], "cannot read"),
        (["stats", "{directory}/nothing"], "is not an activation store"),
        (["export", "{directory}", "--layer", "3", "--context_size", "4", "--output", "x"], "layer 3 is not"),
        (["import-legacy", "{directory}", "--output", "x", "--hidden_size", "4"], "has no layer_"),
    ],
)
def test_an_error_is_one_sentence_and_exit_code_1(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert main([argument.format(directory=directory) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_ctrl_c_is_a_word_and_exit_code_130(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("activation_store.__main__.verify_store", interrupt)
    assert main(["verify", str(directory)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_of_the_output_that_goes_away_is_no_error(directory: Path):
    """As in ``... | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "activation_store", "verify", str(directory)]
    done = subprocess.run(
        command,
        cwd=Path(activation_store.__file__).parents[1],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["verify"], ["export", "x"]])
def test_bad_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    capsys.readouterr()


def test_statistics_are_listed_by_layer_and_kind(directory: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["stats", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [str(layer), group] for layer in (10, 11, 12) for group in ("generated", "prompt")
    ]
    assert float(lines[1].split()[3]) == pytest.approx(4.0, rel=0.1)  # the norm of 16 standard normals


def test_pickles_are_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "layer_3_batch_0.pkl").write_bytes(pickle.dumps([np.ones((2, 4), np.float32)]))
    output = tmp_path / "new"
    assert main(["import-legacy", str(tmp_path), "--output", str(output), "--hidden_size", "4"]) == 0
    assert capsys.readouterr().out == f"1 sequences in {output}\n"
    assert main(["verify", str(output)]) == 0


def test_a_layer_is_exported(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("datasets", reason="the export needs the extra `sae`")
    arguments = [
        "export",
        str(directory),
        "--layer",
        "11",
        "--context_size",
        "5",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--generated_only"]) == 0
    assert "windows of 5 rows in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        "export {d} --layer 11 --output x --context_size 999999999",
        "export {d} --layer -1 --output x --context_size 5",
        "export {d} --layer 11 --output x --context_size 5 --first_position 1e3",
        "import-legacy {d} --output x --hidden_size 0",
        "verify {d} --replay -1",
        "verify {d} --replay 99999999999999999999999",
        "verify {d} --seed nan",
    ],
)
def test_a_number_that_cannot_be_is_bad_usage(
    arguments: str, directory: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as raised:
        main(arguments.format(d=directory).split())
    assert raised.value.code == 2
    assert "is no whole number from" in capsys.readouterr().err


PATH_ARGUMENTS = [
    ["verify", "PATH"],
    ["verify", "x", "--dataset", "PATH"],
    ["verify", "x", "--model_path", "PATH"],
    ["stats", "PATH"],
    ["export", "PATH", "--layer=1", "--context_size=1", "--output=x"],
    ["export", "x", "--layer=1", "--context_size=1", "--output=PATH"],
    ["import-legacy", "PATH", "--output=x", "--hidden_size=1"],
    ["import-legacy", "x", "--output=PATH", "--hidden_size=1"],
]


@pytest.mark.parametrize("words", PATH_ARGUMENTS, ids=" ".join)
def test_home_is_expanded_in_every_path_and_what_is_no_path_is_bad_usage(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HOME", "/home/me")
    options = _parser().parse_args([word.replace("PATH", "~/acts") for word in words])
    assert "/home/me/acts" in vars(options).values()
    for bad in ("a\0b", "\udcc3", ""):
        with pytest.raises(SystemExit) as raised:
            main([word.replace("PATH", bad) for word in words])
        assert raised.value.code == 2
    assert "is no path" in capsys.readouterr().err


def test_what_a_store_quotes_cannot_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["stats", str(tmp_path / "\x1b[2J")]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/\\x1b[2J is not an activation store: it has no manifest.json\n"
    )


def test_a_misspelt_store_brings_the_one_that_is_there(directory: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["stats", f"{directory}x"]) == 1
    assert f"it has no manifest.json; did you mean {directory}?" in capsys.readouterr().err
