"""Stopping a run and going on: by kill and by signals, to the bytes of a run that was left alone."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runner_cases import (
    PYTHON,
    RUNNER,
    arguments,
    book,
    digests,
    environment,
    four,
    report,
    run_main,
    start_python,
    start_runner,
    store_of,
    submission,
)
from terminals import Terminal

from activation_store import verify_store
from arc_runner.loaded_model import LoadedModel

pytestmark = pytest.mark.slow

DONE, RESUMABLE = 0, 75
STOPPED = "stopped; nothing is lost, the same command continues\n"


class Uninterrupted(NamedTuple):
    """A run of four tasks that nothing came between."""

    flags: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module", params=["continuous", "task"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    # Each call and each window ends two of the eight sequences.
    flags = {"batch_size": 2, "generation": request.param}
    folder = four(tmp_path_factory.mktemp(f"uninterrupted-{request.param}"))
    assert run_main(folder, **flags).code == DONE
    return Uninterrupted(flags, folder)


SHARDS_OF_TWO = "from arc_runner import continuous_loop; continuous_loop.SHARD_SEQUENCES = 2"
# On the device, where no signal reaches Python before it ends.
COMPUTE_FOR_EVER = "jax.block_until_ready(jax.lax.while_loop(lambda i: i >= 0, lambda i: i // 2, 1))"


@contextlib.contextmanager
def third_call(folder: Path, flags: dict[str, Any], something: str) -> Iterator[subprocess.Popen[str]]:
    """The run of four tasks in a process of its own, its third call or window doing something first."""
    words = arguments(four(folder), **flags)
    with start_runner(3, something, *words, settings=SHARDS_OF_TWO) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            assert "here\n" in lines  # reads up to it
            yield process
        finally:
            process.kill()


def phases(folder: Path) -> list[str]:
    """The phases of a run, as its metrics have them."""
    lines = (folder / "submission.metrics.jsonl").read_text().splitlines()
    # There is one more of the same phase every ten seconds.
    return list(dict.fromkeys(json.loads(line)["phase"] for line in lines))


def assert_continues_to_the_same_bytes(folder: Path, expected: Uninterrupted, done: set[int]) -> None:
    assert len(digests(folder)) in done
    # A kill may leave one shard whose index lines were not written yet.
    assert all("no index line names it" in finding for finding in verify_store(store_of(folder)))
    outcome = run_main(folder, **expected.flags)
    assert (outcome.code, outcome.err) == (DONE, "")
    assert report(folder)["sequences_resumed"] in done
    assert digests(folder) == digests(expected.folder)
    assert submission(folder) == submission(expected.folder)
    assert list(verify_store(store_of(folder))) == []


# Calls are killed by benchmarks/crash_campaign.py.
@pytest.mark.parametrize("uninterrupted", ["continuous"], indirect=True)
def test_after_a_kill_the_same_command_continues_to_the_same_bytes(
    uninterrupted: Uninterrupted, tmp_path: Path
):
    with third_call(tmp_path, uninterrupted.flags, COMPUTE_FOR_EVER) as process:
        process.kill()
    assert (tmp_path / "submission.metrics.jsonl").read_text().endswith("\n")
    assert phases(tmp_path) == ["start", "loading", "compiling", "generating"]
    assert_continues_to_the_same_bytes(tmp_path, uninterrupted, done={0, 2, 4})


def test_sigterm_lets_the_running_call_end_and_the_same_command_continues(
    uninterrupted: Uninterrupted, tmp_path: Path
):
    with third_call(tmp_path, uninterrupted.flags, "time.sleep(1)") as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=100)
    assert process.returncode == RESUMABLE
    assert err == "stopping as soon as the running work is done; once more to stop at once\n"
    assert "stopped early; the same command continues" in out
    assert "sequences         6 (0 were there already" in out
    assert len(list(book(tmp_path).predictions())) == 6
    assert list(json.loads(submission(tmp_path))) == list(json.loads(submission(uninterrupted.folder)))
    assert_continues_to_the_same_bytes(tmp_path, uninterrupted, done={6})


@pytest.mark.parametrize("uninterrupted", ["continuous"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])  # the others: test_signals
def test_what_schedulers_and_terminals_send_lets_the_running_call_end(
    uninterrupted: Uninterrupted, number: signal.Signals, tmp_path: Path
):
    with third_call(tmp_path, uninterrupted.flags, "time.sleep(1)") as process:
        process.send_signal(number)
        time.sleep(0.3)
        process.send_signal(number)  # a terminal that closes sends it twice
        out, err = process.communicate(timeout=100)
    assert process.returncode == RESUMABLE
    assert err == f"{number.name}: stopping as soon as the running work is done\n"
    assert "stopped early; the same command continues" in out
    assert len(digests(tmp_path)) == 6
    assert list(verify_store(store_of(tmp_path))) == []


# As nohup starts it; the signal comes while it generates, and while it answers.
NOHUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:2], "-c", sys.argv[1], *sys.argv[2:]])
"""
HANGUPS = """
import os, runpy, signal
from activation_store import reader
from arc_runner import answers, loaded_model
def hung_up(owner, name):
    original = getattr(owner, name)
    def call(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGHUP)
        return original(*args, **kwargs)
    setattr(owner, name, call)
hung_up(loaded_model.LoadedModel, "load")
hung_up(answers, "write_all")
runpy.run_module("distributed_kv_cached_inference", run_name="__main__")
"""


def test_a_run_under_nohup_survives_its_terminal(tmp_path: Path):
    process = start_python(NOHUP, HANGUPS, *arguments(four(tmp_path)))
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (DONE, "")
    assert "sequences         8 (0 were there already, 0 failed)" in out


# A signal that comes to stay: while the answers are read, as the module is left, and as Python takes its
# modules apart, where it has given the signals back to the system.
IN_THE_END = """
import os, runpy, signal, sys, time
number, when = signal.Signals[sys.argv[1]], sys.argv[2]
del sys.argv[1:3]
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=number, sleep=time.sleep):
        kill(pid, number)
        sleep(0.2)
if when == "answering":
    from arc_runner import answers
    write_all = answers.write_all
    answers.write_all = lambda *args: (write_all(*args), os.kill(os.getpid(), number))
elif when == "exit":
    import atexit
    atexit.register(os.kill, os.getpid(), number)
else:
    sys.last = Last()
runpy.run_module("distributed_kv_cached_inference", run_name="__main__")
"""


@pytest.mark.parametrize("uninterrupted", ["continuous"], indirect=True)
@pytest.mark.parametrize(
    ("number", "when", "code"),
    [("SIGTERM", "answering", RESUMABLE), ("SIGUSR1", "exit", DONE), ("SIGTERM", "teardown", DONE)],
)
def test_a_signal_in_the_last_moment_is_never_what_the_run_died_of(
    number: str, when: str, code: int, uninterrupted: Uninterrupted
):
    process = start_python(IN_THE_END, number, when, *arguments(uninterrupted.folder, **uninterrupted.flags))
    _, err = process.communicate(timeout=200)
    assert process.returncode == code
    assert err == (STOPPED if code else "")
    assert run_main(uninterrupted.folder, **uninterrupted.flags).code == DONE


def test_a_signal_in_the_first_moments_is_a_sentence_once_python_runs_the_command(tmp_path: Path):
    codes = set()
    for delay in (0.0, 0.5):
        process = subprocess.Popen(
            [*PYTHON, "-m", "distributed_kv_cached_inference", *arguments(four(tmp_path))],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until_it_handles(process, signal.SIGTERM)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
        assert err == STOPPED
        codes.add(process.returncode)
    assert codes == {RESUMABLE}


def wait_until_it_handles(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Waits until the process has a handler of its own, as the system says."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        pytest.skip("this system does not say which signals a process handles")
    while True:
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("SigCgt")]
        if int(line.split()[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.005)


def test_sigterm_ends_the_wait_for_other_processes(tmp_path: Path, port: int):
    flags = {"coordinator_address": f"127.0.0.1:{port}", "num_processes": 4, "process_id": 0}
    process = start_python(WAITS_SAY_SO_AT_ONCE, *arguments(four(tmp_path), **flags))
    assert process.stdout is not None
    assert f"process 0 of 4: waiting for the other 3 at 127.0.0.1:{port}, 0 s so far\n" in iter(
        process.stdout.readline, ""
    )
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (RESUMABLE, STOPPED)


WAITS_SAY_SO_AT_ONCE = """
import runpy
from arc_runner import display
display._SAID_AFTER = (0.2, 0.4)
runpy.run_module("distributed_kv_cached_inference", run_name="__main__")
"""


@pytest.mark.parametrize("uninterrupted", ["continuous"], indirect=True)
def test_a_second_ctrl_c_ends_a_call_that_runs_on(uninterrupted: Uninterrupted, tmp_path: Path):
    with third_call(tmp_path, uninterrupted.flags, COMPUTE_FOR_EVER) as process:
        time.sleep(2)  # it has left Python by then
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "once more to stop at once" in process.stderr.readline()  # at once, though the call runs on
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == STOPPED
    assert process.returncode == RESUMABLE
    assert_continues_to_the_same_bytes(tmp_path, uninterrupted, done={0, 2, 4})


# Ctrl-C as a terminal sends it, which is that of the process.
ON_ITS_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"


@pytest.mark.parametrize("uninterrupted", ["continuous"], indirect=True)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_the_terminal_clean(times: int, uninterrupted: Uninterrupted, tmp_path: Path):
    something = COMPUTE_FOR_EVER if times == 2 else "time.sleep(1)"
    settings = f"{ON_ITS_TERMINAL}; {SHARDS_OF_TWO}"
    words = arguments(four(tmp_path), **uninterrupted.flags)
    terminal = Terminal(columns=60)
    with subprocess.Popen(
        [*PYTHON, "-c", RUNNER, settings, "3", something, *words],
        env=environment() | {"TERM": "xterm"},
        stdin=terminal.stream,
        stdout=terminal.stream,
        stderr=terminal.stream,
        start_new_session=True,
    ) as process:
        terminal.wait_for("here")
        terminal.wait_for("tokens/s")
        terminal.type("\x03")
        terminal.wait_for("once more to stop at once")
        terminal.wait_for("tokens/s", after="once more to stop at once")
        if times == 2:
            terminal.type("\x03")
        assert process.wait(timeout=100) == RESUMABLE
    terminal.close()
    lines = terminal.lines()
    assert not any("tokens/s," in line or "tokens/s \N{MIDDLE DOT}" in line for line in lines)
    assert "stopped early; the same command continues" in lines or lines[-2] == STOPPED.strip()
    assert phases(tmp_path)[:4] == ["start", "loading", "compiling", "generating"]


def interrupt_while_importing(tmp_path: Path, *command: str) -> tuple[int, str]:
    """Exit code and errors of a Python whose import of jax takes for ever, and is met by Ctrl-C."""
    (tmp_path / "jax.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(100)\n")
    process = subprocess.Popen(
        [*PYTHON, *command],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert "importing\n" in iter(process.stdout.readline, "")  # reads up to it
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=20), process.communicate()[1]


# As the script does that pip makes for the entry point.
INSTALLED_SCRIPT = """
import sys
sys.argv[0] = "/usr/bin/qwen2-arc-run"
from distributed_kv_cached_inference import main
"""


@pytest.mark.parametrize(
    "command",
    [("-m", "distributed_kv_cached_inference"), ("-c", INSTALLED_SCRIPT)],
    ids=["module", "script"],
)
def test_ctrl_c_while_the_command_imports_its_modules_is_a_sentence(command: tuple[str, ...], tmp_path: Path):
    assert interrupt_while_importing(tmp_path, *command) == (RESUMABLE, STOPPED)


def test_a_program_that_imports_the_runner_keeps_its_own_ctrl_c(tmp_path: Path):
    code, err = interrupt_while_importing(tmp_path, "-c", "import distributed_kv_cached_inference")
    assert code == -signal.SIGINT
    assert err.endswith("KeyboardInterrupt\n")


# Ctrl-C where Python passes over what a signal's handler raises.
IN_A_CALLBACK = """
import gc, importlib, runpy, signal, sys
def interrupt(*_, **__):
    gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))
    gc.collect()
module, name = sys.argv[1:3]
setattr(importlib.import_module(module), name, interrupt)
del sys.argv[1:3]
runpy.run_module("distributed_kv_cached_inference", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "name"), [("arc_puzzles", "load_tasks"), ("arc_runner.continuous_loop", "make_engine")]
)
def test_ctrl_c_before_the_first_call_ends_at_once(module: str, name: str, tmp_path: Path):
    process = start_python(IN_A_CALLBACK, module, name, *arguments(four(tmp_path)))
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (RESUMABLE, STOPPED)


def test_in_a_notebook_an_interrupt_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadedModel, "load", interrupt)
    outcome = run_main(four(tmp_path))
    assert (outcome.code, outcome.err) == (RESUMABLE, STOPPED)
