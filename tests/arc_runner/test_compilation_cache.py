"""Compiled programs that outlive their process, by default in the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from runner_cases import assert_refused, digests, four, run_main

import generate_jitted
from arc_runner import compilation_cache as ours
from arc_runner.compilation_cache import use_own_cache

CONFIGURED = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
OWN = "qwen2-jax-activations"


@pytest.fixture(autouse=True)
def own_cache() -> Iterator[None]:
    """What the runner sets for its process is set back."""
    before = {name: getattr(jax.config, name) for name in CONFIGURED}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1000.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def hits() -> Iterator[list[str]]:
    """One entry for each program that was found compiled."""
    events: list[str] = []

    def listen(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            events.append(event)

    jax.monitoring.register_event_listener(listen)
    yield events
    jax.monitoring.unregister_event_listener(listen)


def programs(cache: Path) -> list[Path]:
    """What is kept in a directory, for this machine's kind of processor."""
    return sorted(cache.glob("*/*-cache"))


@pytest.mark.slow
def test_a_second_process_loads_the_programs_that_the_first_compiled(tmp_path: Path, hits: list[str]):
    cache = tmp_path / "new" / "cache"

    def run(name: str) -> Path:
        (tmp_path / name).mkdir()
        generate_jitted._compile.cache_clear()  # as if in a process of its own
        folder = four(tmp_path / name)
        flags = {"generation": "task", "max_output_tokens": 5, "compilation_cache_dir": cache}
        assert run_main(folder, **flags).code == 0
        return folder

    first, found_by_the_first = run("first"), len(hits)
    kept = programs(cache)
    assert found_by_the_first == 0
    assert len(kept) >= 2  # prefill and decode
    assert cache.stat().st_mode & 0o777 == 0o700
    second = run("second")
    assert programs(cache) == kept
    assert len(hits) >= 2
    assert digests(second) == digests(first)


def test_a_cache_that_other_users_may_write_is_refused(tmp_path: Path, no_weights: None):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    outcome = run_main(four(tmp_path), compilation_cache_dir=shared)
    assert_refused(outcome, "name a directory that only you can write")


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path, no_weights: None):
    (tmp_path / "file").write_text("")
    assert_refused(run_main(four(tmp_path), compilation_cache_dir=tmp_path / "file"), "file")


def test_a_cache_behind_a_url_is_refused(tmp_path: Path, no_weights: None):
    outcome = run_main(four(tmp_path), compilation_cache_dir="gs://bucket/cache")
    assert_refused(outcome, "is not a local directory")


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    outcome = run_main(four(tmp_path), compilation_cache_dir=tmp_path / "file" / "cache")
    assert_refused(outcome, "file/cache cannot be made a directory: Not a directory")


class TestTheUsersOwn:
    """Where no directory is named, programs are kept in the user's cache folder."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The user's cache folder, and a JAX that was told of none."""
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def compile_something(self, number: float) -> None:
        jax.jit(lambda x: x * number).lower(1.0).compile()

    def test_a_run_keeps_its_programs_there_for_this_user_alone(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, hits: list[str]
    ):
        monkeypatch.setattr(ours, "_processor", lambda: "x86_64-1")
        flags = {"generation": "task", "max_output_tokens": 1, "n_tasks": 1}
        for store in ("one", "other"):
            generate_jitted._compile.cache_clear()  # as if in a process of its own
            jax.config.update("jax_compilation_cache_dir", None)
            assert run_main(four(tmp_path), activations_dir=tmp_path / store, **flags).code == 0
        assert len(hits) == len(programs(cache / OWN)) >= 2  # prefill and decode
        assert {path.parent.name for path in programs(cache / OWN)} == {"x86_64-1"}
        for folder in (cache / OWN, cache / OWN / "x86_64-1"):
            assert folder.stat().st_mode & 0o777 == 0o700

    def test_another_kind_of_processor_does_not_load_them(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, hits: list[str]
    ):
        for kind in ("one", "other", "one"):
            jax.config.update("jax_compilation_cache_dir", None)
            monkeypatch.setattr(ours, "_processor", lambda kind=kind: kind)
            use_own_cache()
            self.compile_something(3.0)
        assert len(hits) == 1
        assert [path.parent.name for path in programs(cache / OWN)] == ["one", "other"]

    def test_nothing_is_kept_if_not_wanted(self, tmp_path: Path, cache: Path):
        flags = {"generation": "python", "max_output_tokens": 1, "n_tasks": 1}
        assert run_main(four(tmp_path), compilation_cache_dir="none", **flags).code == 0
        assert not cache.exists()
        assert jax.config.values["jax_compilation_cache_dir"] is None

    def test_a_directory_that_jax_was_told_stays(self, tmp_path: Path, cache: Path):
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
        use_own_cache()
        assert not cache.exists()
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "told")

    def test_where_it_cannot_be_used_one_line_says_so(self, cache: Path, capsys: pytest.CaptureFixture[str]):
        cache.write_text("a file")
        use_own_cache()
        cache.unlink()
        (cache / OWN).mkdir(parents=True)
        (cache / OWN).chmod(0o777)
        use_own_cache()
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == [
            "compiled programs are not kept for the next run"
        ] * 2
        assert "Not a directory" in lines[0]
        assert "other users" in lines[1]
        assert jax.config.values["jax_compilation_cache_dir"] is None

    def test_a_relative_or_missing_folder_of_the_environment_is_the_one_at_home(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for value in ("relative", ""):
            monkeypatch.setenv("XDG_CACHE_HOME", value)
            jax.config.update("jax_compilation_cache_dir", None)
            use_own_cache()
        assert list((tmp_path / "home" / ".cache").iterdir()) == [tmp_path / "home" / ".cache" / OWN]
        assert not Path("relative").exists()

    def test_the_programs_not_used_for_longest_go_first(self, cache: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(ours, "_MOST_BYTES", 250)
        monkeypatch.setattr(ours, "_processor", lambda: "one")
        kept = cache / OWN / "one"
        kept.mkdir(mode=0o700, parents=True)
        (cache / OWN).chmod(0o700)
        for number, name in enumerate(("old", "older", "new")):
            file = kept / f"{name}-cache"
            file.write_bytes(bytes(100))
            used = {"old": 2000, "older": 1000, "new": 3000}[name]
            os.utime(file, (used, number))
        use_own_cache()
        assert {path.name for path in kept.iterdir()} == {"old-cache", "new-cache"}
