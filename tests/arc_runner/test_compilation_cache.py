"""Compiled programs that outlive their process (``--compilation_cache_dir``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from runner_cases import assert_refused, digests, four, run_main

import generate_jitted

CONFIGURED = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


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
    kept = sorted(cache.iterdir())
    assert found_by_the_first == 0
    assert len(kept) >= 2  # prefill and decode
    assert cache.stat().st_mode & 0o777 == 0o700
    second = run("second")
    assert sorted(cache.iterdir()) == kept
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
