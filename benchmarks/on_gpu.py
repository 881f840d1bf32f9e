"""Runs all that a GPU has to show: parity, equal bytes, speed beside Transformers, kernels.

    benchmarks/on_gpu.sh                # on a machine with an H100 or H200, in under eight minutes
    benchmarks/on_gpu.sh --small        # the same code at a tiny shape on a CPU

Each section prints its result as it ends, what matters most first. The results so far are written after each
section, as JSON and as Markdown. A section that fails is one line, and the exit code is 1 at the end. After
BUDGET_SECONDS no further section begins.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import on_gpu_checks as checks
from benchmarks import on_gpu_speed as speed
from benchmarks.machine import describe
from benchmarks.on_gpu_models import REAL, SMALL, Bench, Scale

ROOT = Path(__file__).parent.parent
BUDGET_SECONDS = 450.0
LISTED_KERNELS = 25
ALL_KINDS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
Section = Callable[[Bench], checks.Outcome]


def sections(scale: Scale) -> dict[str, Section]:
    """Returns all sections by name, in the order of what they are worth."""

    def each(
        name: str, section: Callable[..., checks.Outcome], batches: tuple[int, ...]
    ) -> dict[str, Section]:
        return {f"{name}, batch {batch}": functools.partial(section, batch=batch) for batch in batches}

    first, more = scale.batches[:2], scale.batches[2:]
    compiled = functools.partial(speed.transformers, compiled=True)
    return {
        "bandwidth": speed.bandwidth,
        "parity float32": checks.parity_float32,
        **each("decode", speed.decode, first),
        **each("transformers", speed.transformers, first),
        "equal bytes, tiny model": checks.equal_bytes_tiny,
        "equal bytes": checks.equal_bytes_real,
        "parity bfloat16": checks.parity_bfloat16,
        "equal bytes, another process": checks.equal_bytes_elsewhere,
        **each("kernels", speed.kernels, first),
        "command buffers, none": functools.partial(with_command_buffers, kinds=""),
        "command buffers, whole loop": functools.partial(with_command_buffers, kinds=ALL_KINDS),
        **each("decode", speed.decode, more),
        "prefill": speed.prefill,
        "goodput": speed.goodput,
        **each("transformers", speed.transformers, more),
        **each("transformers compiled", compiled, first),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and measure everything on a GPU.")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try the program on a CPU")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="sections whose names begin so")
    options = parser.parse_args()
    started = time.perf_counter()
    budget = float(os.environ.get("BUDGET_SECONDS", BUDGET_SECONDS))
    if jax.default_backend() != "gpu" and not options.small:
        print(f"JAX runs on {jax.default_backend()} here, not on a GPU; --small tries the program on a CPU.")
        return 2
    scale = SMALL if options.small else REAL
    chosen = {
        name: section
        for name, section in sections(scale).items()
        if not options.only or any(begins(name, only) for only in options.only)
    }
    report = {
        "machine": machine(),
        "command": " ".join(["benchmarks/on_gpu.sh", *sys.argv[1:]]),
        "sections": {},
        "skipped": [],
    }
    place = output_place(options.small)
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), flush=True)
    bench = Bench(scale)
    for name, section in chosen.items():
        if time.perf_counter() - started > budget:
            report["skipped"].append(name)
            continue
        report["sections"][name] = run_section(section, bench)
        print(f"[{time.perf_counter() - started:5.0f} s] {line(name, report['sections'][name])}", flush=True)
        write(report, place)
    write(report, place)
    failed = [name for name, result in report["sections"].items() if result["problems"]]
    if report["skipped"]:
        print(f"Skipped after {budget:.0f} s: {'; '.join(report['skipped'])}.")
    if failed:
        print(f"Failed: {'; '.join(failed)}.")
    print(f"Written: {place}.json and .md, {time.perf_counter() - started:.0f} s in all.", flush=True)
    return 1 if failed else 0


def begins(name: str, only: str) -> bool:
    """Returns whether a section's name begins so; "batch 1" is not the beginning of "batch 128"."""
    return name.startswith(only) and not name[len(only) :][:1].isdigit()


def run_section(section: Section, bench: Bench) -> dict[str, Any]:
    """Runs one section; an exception becomes one of its problems."""
    started = time.perf_counter()
    result: dict[str, Any] = {}
    try:
        figures, problems = section(bench)
    except Exception as error:
        figures, problems = {}, [speed.one_line(error)]
        result["traceback"] = traceback.format_exc()
    return {"seconds": time.perf_counter() - started, "figures": figures, "problems": problems, **result}


def with_command_buffers(bench: Bench, kinds: str) -> checks.Outcome:
    """Decodes the smallest batches in another process, with command buffers (CUDA graphs) of these kinds."""
    names = [f"decode, batch {batch}" for batch in bench.scale.batches[:2]]
    command = [sys.executable, "-m", "benchmarks.on_gpu", *(["--small"] * (bench.scale is SMALL))]
    command += ["--only", *names]
    with tempfile.TemporaryDirectory() as place:
        environment = os.environ | {
            "OUT": place,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer={kinds}",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the card is in use already
        }
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
        )
        if run.returncode:
            raise RuntimeError(f"The other process failed: {(run.stderr or run.stdout).strip()[-250:]}")
        (written,) = Path(place).glob("*.json")
        results = json.loads(written.read_text(encoding="utf-8"))["sections"]
    figures = {
        f"batch_{name.rpartition(' ')[2]}_tokens_s": result["figures"]["captured_tokens_s"]
        for name, result in results.items()
        if name in names
    }
    return checks.Outcome(figures)


def machine() -> dict[str, Any]:
    """Returns the card, its driver, versions, date and commit."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "nvidia_smi": output_of(
            "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
        ),
        **describe(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": os.environ.get("COMMIT") or output_of("git", "rev-parse", "HEAD"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compilation_cache": os.environ.get("JAX_COMPILATION_CACHE_DIR", "none"),
    }


def output_of(*command: str) -> str:
    """Returns what a command prints, or "unknown"."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()


def output_place(small: bool) -> Path:
    """Returns the path of the results without their suffix."""
    card = re.sub(r"[^a-z0-9]+", "-", jax.local_devices()[0].device_kind.lower()).strip("-")
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"gpu-{card}{'-small' if small else ''}"


def write(report: dict[str, Any], place: Path) -> None:
    """Writes the results so far."""
    place.with_name(f"{place.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    place.with_name(f"{place.name}.md").write_text(markdown(report), encoding="utf-8")


def line(name: str, result: dict[str, Any]) -> str:
    """Returns a section's result in one line."""
    text = f"{name}: {shown(result['figures'])}".rstrip(": ")
    return text + "".join(f"; FAILED: {problem}" for problem in result["problems"][:5])


def shown(figures: dict[str, Any]) -> str:
    """Returns figures as text; of kernels the longest three."""
    parts = []
    for name, value in figures.items():
        if name == "kernels":
            longest = ", ".join(f"{k['name'][:40]} {k['microseconds']:.0f} us" for k in value[:3])
            parts.append(f"longest: {longest}")
        elif isinstance(value, list):
            parts.append(f"{name} {'-'.join(number(one) for one in value)}")
        else:
            parts.append(f"{name} {number(value)}")
    return ", ".join(parts)


def number(value: Any) -> str:
    """Returns a number with four digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def markdown(report: dict[str, Any]) -> str:
    """Returns the results as a page: decode beside Transformers, all sections, and the longest kernels."""
    results = report["sections"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in report["machine"].items()),
        f"\n`{report['command']}`\n",
        "| batch | captured, tokens/s | not captured | Transformers, hidden states | the same, compiled "
        "| captured against the better | of the limit | step, ms | compile, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if name.startswith("decode") and result["figures"]:
            lines.append(decode_row(name.rpartition(" ")[2], results))
    lines += ["\n| section | seconds | result | problems |", "|---|---|---|---|"]
    for name, result in results.items():
        problems = "; ".join(result["problems"]).replace("|", "/")
        text = shown(result["figures"]).replace("|", "/")
        lines.append(f"| {name} | {result['seconds']:.1f} | {text} | {problems} |")
    lines += [f"| {name} | | skipped: the time was up | |" for name in report["skipped"]]
    for name, result in results.items():
        if found := result["figures"].get("kernels"):
            steps = result["figures"]["steps"]
            lines += [f"\n{name}, a step\n", "| kernel | us | runs |", "|---|---|---|"]
            lines += [
                f"| `{kernel['name'].replace('|', '/')}` | {kernel['microseconds'] / steps:.2f} "
                f"| {kernel['runs'] / steps:.2f} |"
                for kernel in found[:LISTED_KERNELS]
            ]
    return "\n".join(lines) + "\n"


def decode_row(batch: str, results: dict[str, Any]) -> str:
    """Returns a line of the first table."""
    ours = results[f"decode, batch {batch}"]["figures"]
    peers = [
        results.get(f"{name}, batch {batch}", {}).get("figures", {}).get("hidden_states_tokens_s")
        for name in ("transformers", "transformers compiled")
    ]
    best = max((peer for peer in peers if peer), default=None)
    cells = [
        batch,
        f"{ours['captured_tokens_s']:.0f} ({'-'.join(f'{rate:.0f}' for rate in ours['captured_range'])})",
        f"{ours['not_captured_tokens_s']:.0f}",
        *(f"{peer:.0f}" if peer else "" for peer in peers),
        f"{ours['captured_tokens_s'] / best:.2f}x" if best else "",
        f"{ours['captured_share_of_limit']:.0%}",
        f"{ours['captured_step_ms']:.3f}",
        f"{ours['captured_compile_seconds']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
