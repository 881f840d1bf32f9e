"""What every message to a person keeps to: similar names, masked passwords, escaped control characters."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_core.messages import did_you_mean, masked, printable


@pytest.mark.parametrize(
    ("asked", "similar"),
    [
        ("exmples/tiny-qwen2", "examples/tiny-qwen2"),
        ("examples/tiny_qwen2", "examples/tiny-qwen2"),
        ("exmaple/tiny-qwen", "examples/tiny-qwen2"),
        ("Training.json", "training.json"),
        ("./trainin.json", "training.json"),
        ("nothing/like/it", None),
        ("examples/zzz", None),
        ("training.json/below", None),
    ],
)
def test_a_path_that_is_not_there_brings_the_most_similar_one(
    asked: str, similar: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "examples" / "tiny-qwen2").mkdir(parents=True)
    (tmp_path / "training.json").touch()
    monkeypatch.chdir(tmp_path)
    assert did_you_mean(asked) == ("" if similar is None else f"; did you mean {similar}?")
    absolute = "" if similar is None else f"; did you mean {tmp_path / similar}?"
    assert did_you_mean(tmp_path / asked) == absolute


def test_a_folder_that_may_not_be_listed_brings_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def scandir(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", scandir)
    assert did_you_mean(tmp_path / "x") == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open s3://AKIA:se/cr+et@bucket/run: no", "cannot open s3://***@bucket/run: no"),
        ("http://user:pw@host:80/x and ftp://u:p@h", "http://***@host:80/x and ftp://***@h"),
        ("https://token@host/x", "https://***@host/x"),
        ("s3://u:p@ss@host/x", "s3://***@host/x"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://h/x?access_token=abc", "https://h/x?access_token=***"),
        ("gs://bucket/run@2/x", "gs://bucket/run@2/x"),
        ("me@example.com writes to /data/a:b@c", "me@example.com writes to /data/a:b@c"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, shown: str):
    assert masked(text) == shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("bell\x07 back\b nul\0", r"bell\x07 back\x08 nul\x00"),
        ("csi \x9b31m", r"csi \x9b31m"),
        ("two\nlines\r", r"two\nlines\r"),
        ("half \udcc3 of a pair", r"half \udcc3 of a pair"),
        ("turned \u202e round", r"turned \u202e round"),
        ("é, 日本 and 👩\u200d🚀 stay", "é, 日本 and 👩\u200d🚀 stay"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str):
    assert printable(text) == shown


def test_lines_stay_lines_where_they_are_wanted():
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
