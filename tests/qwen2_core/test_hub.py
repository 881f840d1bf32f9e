"""Hub models: the cache comes first, a dead hub costs seconds, all files are of one commit."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from lively import SHALLOW
from runner_cases import environment

from qwen2_core import hub
from qwen2_core.checkpoint_files import (
    checkpoint_folder,
    is_hub_id,
    optional_file,
    resolve_file,
    weight_files,
)
from qwen2_core.errors import CheckpointError

MODEL = "org/tiny-model"
COMMIT, LATER = "a" * 40, "b" * 40
SMALL = replace(SHALLOW, layers=1, extract=(0,))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill(cache: Path, commit: str = COMMIT, names: tuple[str, ...] = ()) -> Path:
    """A snapshot as huggingface_hub lays it out: links into the blobs; all files, or those of these names."""
    repo = cache / "models--org--tiny-model"
    snapshot = repo / "snapshots" / commit
    made = SMALL.save(cache.parent / "made")
    (made / "tokenizer_config.json").write_text("{}")
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in made.iterdir():
        if not names or file.name in names:
            file.rename(repo / "blobs" / f"{commit}{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/{commit}{file.name}")
    (repo / "refs" / "main").write_text(commit)
    return snapshot


def test_a_cached_model_is_used_without_the_network(cache: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = fill(cache)
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("the hub is asked"))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub is asked"))
    for revision in (None, "main", COMMIT):
        assert checkpoint_folder(MODEL, revision=revision) == snapshot
        assert weight_files(MODEL, revision=revision) == [snapshot / "model.safetensors"]
    assert resolve_file(MODEL, "config.json") == snapshot / "config.json"
    assert optional_file(MODEL, "chat_template.jinja") is None


def test_a_process_keeps_to_the_commit_that_it_found_first(cache: Path):
    snapshot = fill(cache)
    assert checkpoint_folder(MODEL) == snapshot
    later = fill(cache, LATER)  # by another process
    assert checkpoint_folder(MODEL) == snapshot
    assert checkpoint_folder(MODEL, revision=LATER) == later


def test_a_cached_model_is_a_hub_model_whatever_folders_are_near(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny-model2").mkdir(parents=True)
    assert not is_hub_id(MODEL)
    with pytest.raises(
        CheckpointError, match=r"did you mean org/tiny-model2\? .*`hf download org/tiny-model`"
    ):
        checkpoint_folder(MODEL)
    fill(cache)
    assert is_hub_id(MODEL)


def test_what_goes_wrong_is_said_without_a_password(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(error: Exception) -> None:
        def model_info(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=model_info))

    monkeypatch.setattr(constants, "ENDPOINT", "https://me:secret@mirror.example")
    fail(RuntimeError("502 for https://me:secret@mirror.example/api\nand more"))
    with pytest.raises(CheckpointError) as error:
        hub.list_files(MODEL)
    assert "https://mirror.example fails: RuntimeError: 502 for https://mirror.example/api)" in str(
        error.value
    )
    fail(OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match=f"the cache {cache} fails: No space left on device"):
        hub.list_files(MODEL)


@pytest.mark.parametrize("name", ["a..b/c", "org/" + "m" * 200, "org/model.git", "org--x/model"])
def test_what_is_no_hub_id_is_said(cache: Path, name: str):
    with pytest.raises(CheckpointError, match=r"that is no hub id|HF_HUB_OFFLINE"):
        checkpoint_folder(name)


def test_offline_a_model_that_is_not_cached_is_refused(cache: Path):
    with pytest.raises(CheckpointError, match="not in the cache, and HF_HUB_OFFLINE forbids to fetch it"):
        checkpoint_folder("nobody/nothing")
    fill(cache, names=("config.json",))
    with pytest.raises(CheckpointError, match="not in the cache, and HF_HUB_OFFLINE forbids to fetch it"):
        weight_files(MODEL)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        resolve_file(MODEL, "tokenizer_config.json")


# --- With a network: in processes of their own; huggingface_hub reads its settings when it is imported ------

SCRIPT = """
import sys
from qwen2_core.checkpoint_files import CheckpointError, optional_file, resolve_file, weight_files
try:
    model = sys.argv[1]
    print(resolve_file(model, "config.json"), *weight_files(model))
    print(resolve_file(model, "tokenizer_config.json"), optional_file(model, "chat_template.jinja"))
except CheckpointError as error:
    print("refused:", error)
"""


def run(cache: Path, endpoint: str, model: str = MODEL) -> tuple[str, float]:
    """What the script says, and how long it took beyond its imports."""
    cache.mkdir(exist_ok=True)
    variables = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache), "NO_PROXY": "*"}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, model],
        env=environment() | variables,
        capture_output=True,
        text=True,
        cwd=cache,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - begin


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Accepts, and never says anything."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.slow
def test_a_hub_that_refuses_or_never_answers_costs_seconds_and_a_sentence(tmp_path: Path, port: int):
    out, seconds = run(tmp_path / "hub", f"http://127.0.0.1:{port}")
    assert out.startswith("refused: There is no model directory ")
    assert (
        "the hub model org/tiny-model could not be had (it is not in the cache, and http://127.0.0.1:" in out
    )
    assert seconds < 20
    with silent_server() as endpoint:
        out, seconds = run(tmp_path / "hub", endpoint)
    assert f"could not be had (it is not in the cache, and {endpoint} fails: " in out
    assert out.count("\n") == 1
    assert seconds < 25


def test_a_cached_model_does_not_wait_for_a_hub_that_never_answers(tmp_path: Path):
    snapshot = fill(tmp_path / "hub")
    with silent_server() as endpoint:
        out, seconds = run(tmp_path / "hub", endpoint)
    assert out.split()[:2] == [str(snapshot / "config.json"), str(snapshot / "model.safetensors")]
    assert out.split()[2:] == [str(snapshot / "tokenizer_config.json"), "None"]
    assert seconds < 15


class FakeHub(http.server.BaseHTTPRequestHandler):
    """A hub with one model of one commit, and a list of what it was asked."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        body, status = b"", 404
        headers = {"X-Repo-Commit": COMMIT}
        if path.startswith(f"/api/models/{MODEL}"):
            siblings = [{"rfilename": name} for name in self.files]
            body, status = json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode(), 200
        elif path.startswith(f"/{MODEL}/resolve/") and (name := path.rpartition("/")[2]) in self.files:
            body, status = self.files[name], 200
            headers["ETag"] = f'"{name}"'
        elif path.startswith("/api/models/"):
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def fake_hub(tmp_path: Path) -> Iterator[tuple[str, list[str], Path]]:
    made = SMALL.save(tmp_path / "on the hub", max_shard_bytes=60_000)
    (made / "tokenizer_config.json").write_text("{}")
    (made / "pytorch_model.bin").write_bytes(b"not wanted")
    handler = type(
        "Handler", (FakeHub,), {"files": {f.name: f.read_bytes() for f in made.iterdir()}, "asked": []}
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked, made
        server.shutdown()


def test_a_model_is_fetched_once_whole_and_of_one_commit(
    fake_hub: tuple[str, list[str], Path], tmp_path: Path
):
    endpoint, asked, made = fake_hub
    out, _ = run(tmp_path / "hub", endpoint)
    snapshot = tmp_path / "hub" / "models--org--tiny-model" / "snapshots" / COMMIT
    shards = sorted(made.glob("*.safetensors"))
    assert out.split()[0] == str(snapshot / "config.json"), out
    assert out.split()[1:-2] == [str(snapshot / shard.name) for shard in shards]
    assert {file.name for file in snapshot.iterdir()} == {file.name for file in made.iterdir()} - {
        "pytorch_model.bin"
    }
    for file in snapshot.iterdir():
        assert file.read_bytes() == (made / file.name).read_bytes()
    assert not [line for line in asked if "chat_template" in line]  # it was not in the list
    after_the_first = [line for line in asked if "/resolve/" in line and "config.json" not in line]
    assert all(f"/resolve/{COMMIT}/" in line for line in after_the_first)
    asked.clear()
    again, _ = run(tmp_path / "hub", endpoint)
    assert again == out
    assert not [line for line in asked if MODEL in line]


def test_what_another_tool_left_out_of_the_cache_is_fetched_at_the_commit_of_the_rest(
    fake_hub: tuple[str, list[str], Path], tmp_path: Path
):
    endpoint, asked, made = fake_hub
    snapshot = fill(tmp_path / "hub", names=("config.json", "tokenizer_config.json"))
    out, _ = run(tmp_path / "hub", endpoint)
    assert out.split()[0] == str(snapshot / "config.json"), out
    assert {file.name for file in snapshot.iterdir()} >= {file.name for file in made.glob("*.safetensors")}
    assert (snapshot / "generation_config.json").is_file()
    of_the_model = [line for line in asked if MODEL in line]
    assert [line for line in of_the_model if f"/resolve/{COMMIT}/" not in line] == [
        f"GET /api/models/{MODEL}/revision/{COMMIT}"
    ]


def test_a_model_that_the_hub_does_not_have_is_named(fake_hub: tuple[str, list[str], Path], tmp_path: Path):
    out, seconds = run(tmp_path / "hub", fake_hub[0], "org/another")
    assert (
        "the hub model org/another could not be had (the hub has none of this name; if it is private" in out
    )
    assert "There is no model directory org/another, and" in out
    assert seconds < 15
    assert not list((tmp_path / "hub").iterdir())
