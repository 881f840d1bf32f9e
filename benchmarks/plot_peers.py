"""Draws results of ``compare_peers.py``: tokens a second by batch, beside what memory would allow.

    python -m benchmarks.plot_peers docs/images/performance.png results.json [more.json ...]

Makes a panel of each file (extra ``plots``). The line is the limit of our bfloat16 program: the bytes that a
step reads, at the bandwidth that was measured beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import matplotlib as mpl  # pyright: ignore[reportMissingImports]

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    picture, *files = map(Path, sys.argv[1:])
    reports = [json.loads(file.read_text()) for file in files]
    figure, panels = plt.subplots(
        1, len(files), figsize=(4.5 * len(files), 4.5), squeeze=False, layout="constrained"
    )
    for panel, report in zip(panels[0], reports, strict=True):
        draw(panel, report)
    figure.savefig(picture, dpi=120)


def draw(panel: Any, report: dict[str, Any]) -> None:
    """Draws one machine: a group of bars a batch, a bar a contender."""
    results = report["results"]
    batches, names = (list(dict.fromkeys(r[key] for r in results)) for key in ("batch", "name"))
    width = 0.8 / len(names)
    for at, name in enumerate(names):
        of_name = {r["batch"]: r["tokens_per_second"] for r in results if r["name"] == name}
        places = [i - 0.4 + (at + 0.5) * width for i, batch in enumerate(batches) if batch in of_name]
        panel.bar(places, of_name.values(), width, label=name)
    ours = {r["batch"]: r for r in results if r["name"] == "jitted-bf16"}
    for i, batch in enumerate(batches):
        if batch in ours:
            limit = batch * limit_of(ours[batch])
            panel.hlines(limit, i - 0.42, i + 0.42, "black", "dashed", label=None if i else "limit of memory")
    panel.set(
        title=f"{report['machine']['cpu']}, {report['machine']['cores']} cores",
        xlabel="batch",
        ylabel="tokens a second",
        xticks=range(len(batches)),
        xticklabels=batches,
        yscale="log",
    )
    panel.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def limit_of(result: dict[str, Any]) -> float:
    """Returns the steps a second at which memory delivers a step's bytes."""
    return statistics.median(result["bandwidth_beside_rounds"]) / result["bytes_per_step"]


if __name__ == "__main__":
    main()
