"""Where the workers of a run on Ray are to be: one for each TPU host or GPU, or on CPUs by number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

CPU = "CPU"
_ACCELERATORS = ("TPU", "GPU")


@dataclasses.dataclass(frozen=True)
class Place:
    """One worker's place in a cluster."""

    node: str  # Ray's id of it
    host: str  # its name
    kind: str  # the resource: "TPU", "GPU" or "CPU"
    amount: int  # of the resource: all TPU chips of a node, else 1
    number: int = 0  # among the node's places

    def __str__(self) -> str:
        return f"{self.host} {self.kind} {self.number}" if self.kind != "TPU" else f"{self.host} TPU"

    def options(self) -> dict[str, Any]:
        """Returns what Ray is asked for, beside the node."""
        if self.kind == "TPU":
            return {"num_cpus": 0, "resources": {"TPU": self.amount}}
        return {"num_cpus": 0, "num_gpus": 1} if self.kind == "GPU" else {"num_cpus": 1}


def find_kind(nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns what the workers of a cluster run on: TPUs where it has any, else GPUs, else CPUs."""
    for kind in (*_ACCELERATORS, CPU):
        if any(_count(node, kind) for node in nodes):
            return kind
    return None


def find_places(nodes: Sequence[Mapping[str, Any]], kind: str, most: int | None) -> list[Place]:
    """Returns the places of a kind that ``ray.nodes()`` offers, at most so many.

    By default there is one for each TPU host, GPU, or node with a CPU. Only on CPUs may there be more on a
    node, as many as it has CPUs: first one on each, then a second, and so on.
    """
    places = []
    for node in nodes:
        count = _count(node, kind)
        name, host = node["NodeID"], node.get("NodeManagerHostname") or node.get("NodeManagerAddress", "")
        if kind == "TPU" and count:
            places.append(Place(name, host, kind, count))
        elif kind == CPU:
            on_node = count if most else min(count, 1)
            places += [Place(name, host, kind, 1, number) for number in range(on_node)]
        else:
            places += [Place(name, host, kind, 1, number) for number in range(count)]
    if kind == CPU:
        places.sort(key=lambda place: place.number)
    return places[:most]


def _count(node: Mapping[str, Any], kind: str) -> int:
    return int(node.get("Resources", {}).get(kind, 0)) if node.get("Alive") else 0
