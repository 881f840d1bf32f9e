"""Counts what a program that XLA has optimized does: kernels, waits for the device, bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

_NO_KERNEL = {"get-tuple-element", "parameter", "tuple", "bitcast", "constant", "after-all"}
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


class Cost(NamedTuple):
    """What one run of a computation does.

    A wait is a branch, or a turn of a loop whose length the host does not know: it must see what the device
    computed before it goes on. Of such a loop one turn is counted, of branches that with the fewest kernels.
    Bytes are the operands and results of all kernels; of what is sliced or updated in place, that part.
    """

    kernels: int = 0
    waits: int = 0
    bytes: int = 0

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """Returns the sum with so many of another."""
        return Cost(*(mine + times * its for mine, its in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Instruction:
    """One line of a program; ``rest`` is what follows the opening parenthesis."""

    name: str
    shape: str
    operation: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of what it takes."""
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])

    def named(self, role: str) -> str:
        """Returns the computation that has this role in it."""
        found = re.search(rf"{role}=%?([\w.\-]+)", self.rest)
        assert found is not None
        return found[1]


class Program:
    """An optimized HLO module: by computation, its instructions by name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], {})
                if header[1]:
                    self.entry = header[2]
            elif found := _INSTRUCTION.match(line):
                current[found[2]] = Instruction(found[2], found[3], found[4], found[5], bool(found[1]))

    def cost(self, name: str) -> Cost:
        """Returns what one run of a computation does."""
        total = Cost()
        for instruction in self.computations[name].values():
            if instruction.operation in _NO_KERNEL:
                continue
            if instruction.operation == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.rest)
                total = total.plus(self.cost(instruction.named("body")), int(known[1]) if known else 1)
                if not known:
                    total = total.plus(self.cost(instruction.named("condition"))).plus(Cost(waits=1))
            elif instruction.operation == "conditional":
                total = total.plus(min(map(self.cost, _branches(instruction.rest)))).plus(Cost(waits=1))
            elif instruction.operation == "call":
                total = total.plus(self.cost(instruction.named("to_apply")))
            else:
                total = total.plus(Cost(1, 0, self._bytes(instruction, self.computations[name])))
        return total

    def step(self) -> Cost:
        """Returns what a turn of the outermost loop does, the loop's own wait included."""
        (loop,) = (one for one in self.computations[self.entry].values() if one.operation == "while")
        body, test = self.cost(loop.named("body")), self.cost(loop.named("condition"))
        return body.plus(test).plus(Cost(waits=1))

    def _bytes(self, kernel: Instruction, among: dict[str, Instruction]) -> int:
        shapes = [among[operand].shape for operand in kernel.operands]
        if kernel.operation != "fusion":
            results = kernel.shape
            if kernel.operation == "custom-call":
                results = re.sub(r"s8\[\d+\]", "", results)  # a library's scratch memory
            if kernel.operation.startswith("dynamic-update-slice"):
                return 2 * _nbytes(shapes[1])
            if kernel.operation in ("dynamic-slice", "slice", "gather"):
                return 2 * _nbytes(results)
            return sum(map(_nbytes, shapes)) + _nbytes(results)
        inner = self.computations[kernel.named("calls")]
        total = 0
        for one in inner.values():
            if one.operation == "parameter":
                total += _read(one, inner)
            if one.is_root:
                outputs = [inner[name] for name in one.operands] if one.operation == "tuple" else [one]
                total += sum(_written(output, inner) for output in outputs)
        return total


def _read(parameter: Instruction, among: dict[str, Instruction]) -> int:
    """Returns the bytes that a fusion reads of one of its operands."""
    whole, total = _nbytes(parameter.shape), 0
    for user in among.values():
        if parameter.name not in user.operands:
            continue
        if user.operation in ("dynamic-slice", "slice", "gather"):
            total += _nbytes(user.shape)
        elif user.operation in ("bitcast", "get-tuple-element"):
            total += _read(user, among)
        elif not (user.operation == "dynamic-update-slice" and user.operands[0] == parameter.name):
            return whole
    return min(whole, total)


def _written(output: Instruction, among: dict[str, Instruction]) -> int:
    """Returns the bytes that a fusion writes of one of its results."""
    if output.operation == "bitcast" and output.operands[0] in among:
        return _written(among[output.operands[0]], among)
    if output.operation == "dynamic-update-slice":
        return _nbytes(among[output.operands[1]].shape)
    return _nbytes(output.shape)


def _branches(rest: str) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if found:
        return found[1].replace("%", "").split(", ")
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)


def _closing(rest: str) -> int:
    """Returns where the parenthesis closes that was open before ``rest``."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(rest)


def _nbytes(shape: str) -> int:
    """Returns the bytes of all arrays in a shape."""
    total = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        total += _SIZES.get(dtype, 4) * math.prod(int(size) for size in dimensions.split(",") if size)
    return total
