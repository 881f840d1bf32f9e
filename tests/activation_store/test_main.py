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
from activation_store.__main__ import main
from activation_store.command_line import make_parser


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
        (["verify", "{directory}/host-00000"], "is not an activation store"),
        (["verify", "{directory}", "--replay", "2", "--model_path", "{directory}"], "config.json"),
        (["stats", "{directory}/host-00000"], "is not an activation store"),
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

    monkeypatch.setattr("activation_store.commands.verify_store", interrupt)
    assert main(["verify", str(directory)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("command", ["verify", "stats"])
def test_a_reader_of_the_output_that_goes_away_is_no_error(directory: Path, command: str):
    """As in ``... | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, "-m", "activation_store", command, str(directory)]
    done = subprocess.run(
        arguments,
        cwd=Path(activation_store.__file__).parents[1],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


EXPORT = ["export", "{directory}", "--layer", "11", "--context_size", "4", "--output", "{directory}/../out"]
IMPORT = ["import-legacy", "{directory}", "--output", "{directory}/../out", "--hidden_size", "4"]


def changed(arguments: list[str], flag: str, value: str) -> list[str]:
    place = arguments.index(flag) + 1
    return [*arguments[:place], value, *arguments[place + 1 :]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["nothing"], "there is no command nothing; --help lists the commands"),
        (["verfy"], "there is no command verfy; did you mean verify?"),
        (["verify", "{directory}", "--repiar"], "unknown argument --repiar; did you mean --repair?"),
        (["stats", "{directory}", "again"], "unknown argument again; stats --help lists the flags"),
        (["verify"], "required"),
        (["export", "x"], "there is no directory x"),
        (["verify", "{directory}/nothing"], "there is no directory"),
        (["verify", "{directory}/manifest.json"], "there is no directory"),
        (["verify", "a\0b"], "is no path"),
        (["verify", "a\udcffb"], "is no path"),
        (["verify", ""], "is no path"),
        (["stats", "{directory}/nothing"], "there is no directory"),
        (
            ["verify", "{directory}", "--repair", "--dataset", "{directory}/none.json"],
            "there is no file",
        ),
        (
            ["verify", "{directory}", "--report", "{directory}/../store/manifest.jsn"],
            "; did you mean",
        ),
        (
            ["verify", "{directory}", "--dataset", "gs://bucket/tasks.json"],
            "there is no file gs://bucket/tasks.json",
        ),
        (["verify", "{directory}", "--replay", "2"], "--replay needs --model_path"),
        (["verify", "{directory}", "--replay", "-1"], "is no whole number from 0"),
        (["verify", "{directory}", "--replay", "1" * 23], "is no whole number from 0"),
        (["verify", "{directory}", "--seed", "nan"], "is no whole number from 0"),
        (changed(EXPORT, "--context_size", "0"), "is no whole number from 1"),
        (changed(EXPORT, "--context_size", "-3"), "is no whole number from 1"),
        (changed(EXPORT, "--context_size", "1e3"), "is no whole number from 1"),
        (changed(EXPORT, "--context_size", "9" * 5000), "is no whole number from 1"),
        (changed(EXPORT, "--context_size", "1048576"), "fewer than 1048576 such rows"),
        (changed(EXPORT, "--context_size", "\N{SUPERSCRIPT TWO}"), "is no whole number from 1"),
        (changed(EXPORT, "--layer", "3"), "layer 3 is not in"),
        (changed(EXPORT, "--layer", "-1"), "is no whole number from 0"),
        ([*EXPORT, "--first_position", "-1"], "is no whole number from 0"),
        ([*EXPORT, "--first_position", "99999"], "fewer than 4 such rows"),
        (changed(EXPORT, "--output", "{directory}"), "exists already"),
        (changed(EXPORT, "--output", "{directory}/new"), "is in the store itself"),
        (changed(EXPORT, "--output", "{directory}/host-00000/../new/er"), "is in the store itself"),
        (changed(EXPORT, "--output", "gs://bucket/x"), "to a local directory"),
        (changed(EXPORT, "--output", "a\0b"), "is no path"),
        (changed(IMPORT, "--hidden_size", "0"), "is no whole number from 1"),
        (["import-legacy", "{directory}/nothing", *IMPORT[2:]], "there is no directory"),
    ],
)
def test_bad_usage_is_a_sentence_and_exit_code_2(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    pytest.importorskip("datasets", reason="the export needs the extra `sae`")
    before = sorted(directory.parent.rglob("*"))
    try:
        code = main([argument.format(directory=directory) for argument in arguments])
    except SystemExit as error:  # as argparse ends
        code = error.code
    assert code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err.splitlines()[-1]
    assert len(said.err.splitlines()[-1]) < 500
    assert "Traceback" not in said.err
    assert sorted(directory.parent.rglob("*")) == before


def test_a_tilde_is_the_home_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HOME", str(directory.parent))
    assert main(["verify", "~/store"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("command", ["verify", "stats"])
def test_a_terminal_of_another_alphabet_shows_names_escaped(tmp_path: Path, command: str):
    with ActivationWriter(tmp_path / "é", SETTINGS, provenance={}) as writer:
        writer.submit(batch("é"))
        bad = batch("ü", samples=1)
        assert bad[0].rows is not None
        bad[0].rows[0, 0, 0] = np.nan
        writer.submit(bad)
    done = subprocess.run(
        [sys.executable, "-m", "activation_store", command, str(tmp_path / "é")],
        cwd=Path(activation_store.__file__).parents[1],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("note: task \\xfc test 0" in done.stdout) == (command == "verify")


def test_an_error_of_the_system_is_a_sentence(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error", "host-00000")

    monkeypatch.setattr("activation_store.commands.verify_store", fail)
    assert main(["verify", str(directory)]) == 1
    assert capsys.readouterr().err == "error: [Errno 5] Input/output error: 'host-00000'\n"


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
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "acts").mkdir()
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = make_parser().parse_args([word.replace("PATH", "~/acts") for word in words])
    assert str(tmp_path / "acts") in vars(options).values()
    for bad in ("a\0b", "\udcc3", ""):
        with pytest.raises(SystemExit) as raised:
            main([word.replace("PATH", bad) for word in words])
        assert raised.value.code == 2
    assert "is no path" in capsys.readouterr().err


def test_what_a_store_quotes_cannot_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = tmp_path / "\x1b[2J"
    with pytest.raises(SystemExit):
        main(["stats", str(name)])
    assert capsys.readouterr().err.endswith(f"there is no directory {tmp_path}/\\x1b[2J\n")
    name.mkdir()
    assert main(["stats", str(name)]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/\\x1b[2J is not an activation store: it has no manifest.json\n"
    )


def test_a_misspelt_place_brings_the_one_that_is_there(directory: Path, capsys: pytest.CaptureFixture[str]):
    for words in (["stats", f"{directory}x"], ["verify", str(directory), "--dataset", f"{directory}x"]):
        with pytest.raises(SystemExit) as raised:
            main(words)
        assert raised.value.code == 2
        assert f"{directory}x; did you mean {directory}?" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]"])
def test_nothing_is_repaired_where_the_data_set_cannot_be_read(
    directory: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
):
    damage(directory)
    (tmp_path / "tasks.json").write_text(content)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert main(["verify", str(directory), "--repair", "--dataset", str(tmp_path / "tasks.json")]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["verify", "stats"])
def test_an_output_that_is_closed_is_no_error(directory: Path, command: str):
    words = f'exec "$0" -m activation_store {command} "$1" >&-'
    done = subprocess.run(
        ["sh", "-c", words, sys.executable, str(directory)],
        cwd=Path(activation_store.__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
