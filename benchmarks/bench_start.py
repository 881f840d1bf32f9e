"""How long the command takes to its first generated tokens, the first time and when programs are kept.

    python -m benchmarks.bench_start [--rounds 5] [--output start.json] [-- FLAGS OF THE RUN]

Each round has a cache folder of its own: a first start compiles all programs, a second one loads them. Both
are processes of their own. They do what the command does, and note when its imports are done, its job is
prepared, its programs are there, and its first window of tokens is on the host. Processor seconds say more
than seconds where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

_STARTED, _REPORT = "BENCH_STARTED", "BENCH_REPORT"
MARKS = ("imports", "prepared", "programs", "first tokens")


def start_once(folder: Path, cache: Path, flags: list[str]) -> dict[str, Any]:
    """Runs the command in a new process: seconds and processor seconds at each mark, and the cache's use."""
    folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.bench_start", "--as_the_command"]
    command += ["--activations_dir", f"{folder}/store", "--output_filepath", f"{folder}/submission.json"]
    own = {"XDG_CACHE_HOME": str(cache), _STARTED: str(time.monotonic()), _REPORT: f"{folder}/marks.json"}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run([*command, *flags], env=environment | own, capture_output=True, text=True)
    if not (folder / "marks.json").exists():
        raise SystemExit(done.stderr)
    return json.loads((folder / "marks.json").read_text())


def as_the_command() -> int:
    """Does what the command does, and writes down when."""
    marks: dict[str, tuple[float, float]] = {}
    events: Counter[str] = Counter()

    def mark(name: str) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = time.monotonic() - float(os.environ[_STARTED]), used.ru_utime + used.ru_stime
        marks.setdefault(name, seconds)

    from arc_runner.signals import end_on_signals
    from arc_runner.start import begin

    end_on_signals()
    begin()
    import jax

    import distributed_kv_cached_inference as command
    from qwen2_engine import ContinuousEngine

    mark("imports")
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
    prepare, start = command.prepare, ContinuousEngine.start

    def prepared(options: Any) -> Any:
        job = prepare(options)
        mark("prepared")
        return job

    def started(engine: ContinuousEngine, stage: Any, compiling: Any) -> Any:
        slots: Any = start(engine, stage, compiling)
        mark("programs")
        generate = slots.generate

        def generating(requests: Any, *, should_stop: Any, on_window: Any) -> Any:
            def after(window: Any) -> None:
                mark("first tokens")
                on_window(window)

            return generate(requests, should_stop=should_stop, on_window=after)

        slots.generate = generating
        return slots

    command.prepare = prepared
    ContinuousEngine.start = started  # pyright: ignore[reportAttributeAccessIssue]
    code = command.main()
    report = {
        "seconds": {name: wall for name, (wall, _) in marks.items()},
        "processor_seconds": {name: used for name, (_, used) in marks.items()},
        "programs": {name: events[name] for name in ("cache_hits", "cache_misses")},
    }
    Path(os.environ[_REPORT]).write_text(json.dumps(report))
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the command to its first generated tokens.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", default=["--max_output_tokens", "64"], help="of the run")
    options = parser.parse_args()
    starts: dict[str, list[dict[str, Any]]] = {"first": [], "second": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            for name, found in starts.items():
                found.append(start_once(Path(scratch, name), Path(scratch, "cache"), options.flags))
    results: dict[str, Any] = {"machine": describe(), "flags": options.flags}
    for name, found in starts.items():
        results[name] = {"programs": found[0]["programs"]}
        for unit in ("seconds", "processor_seconds"):
            values = {mark: [round(one[unit][mark], 2) for one in found] for mark in MARKS}
            results[name][unit] = values
            shown = ", ".join(f"{mark} {statistics.median(each):.2f}" for mark, each in values.items())
            print(f"{name} start, {unit.replace('_', ' ')} (median): {shown}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as_the_command"]:
        del sys.argv[1]
        sys.exit(as_the_command())
    main()
