"""The floors of the source tree, a reader of its imports, and what finds the wrong ones."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

# From top to bottom. A package's modules are on its floor, unless an inner package is named further down.
FLOORS = (
    "distributed_kv_cached_inference",
    "arc_runner",
    "qwen2_engine",
    "generate_jitted",
    "activation_store",
    "qwen2_jax_with_hooks",
    "qwen2_jax",
    "qwen2_core",
    "qwen2_core.kernels",
    "qwen2_core.kernels.cpu",
    "kvcache_utils",
    "arc_puzzles",
)
INSTALLED = frozenset(name for name in FLOORS if "." not in name)

Imports = Mapping[str, Collection[str]]  # of each module, the modules of the tree that it imports


def read_imports(root: Path, names: Collection[str]) -> Imports:
    """Returns the imports of the top-level modules and packages `names` below `root`, by module.

    Reads the source, so that imports inside functions, under TYPE_CHECKING and by `import_module("name")`
    count too. That a module's packages are imported with it does not count.
    """
    files = {}
    for name in names:
        for file in sorted((root / name).rglob("*.py")) or [root / f"{name}.py"]:
            parts = file.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {module: _imported(file, module, files) for module, file in files.items()}


def _imported(file: Path, module: str, known: Collection[str]) -> set[str]:
    """Returns the modules among `known` that one file imports."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for name in _names(node, package):
            # `from package import name` is an import of the module package.name, if there is one.
            owner = name if name in known else name.rpartition(".")[0]
            if owner in known and owner != module:
                found.add(owner)
    return found


def _names(node: ast.AST, package: Sequence[str]) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (one.name for one in names)
        case ast.ImportFrom(module=origin, names=names, level=level):
            base = [*package[: len(package) - level + 1]] if level else []
            yield from (".".join([*base, *([origin] if origin else []), one.name]) for one in names)
        case ast.Call(
            func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(text)), *_]
        ):
            if name in ("import_module", "__import__"):
                yield text


def upward_imports(imports: Imports, floors: Sequence[str]) -> list[str]:
    """Returns "importer -> imported" for each import of a module on a higher floor.

    `floors` names modules and packages from top to bottom; the innermost that contains a module is its floor.
    """

    def floor(module: str) -> int:
        owners = [one for one in floors if f"{module}.".startswith(f"{one}.")]
        return floors.index(max(owners, key=len))

    return [
        f"{module} -> {imported}"
        for module, all_imported in sorted(imports.items())
        for imported in sorted(all_imported)
        if floor(imported) < floor(module)
    ]


def find_cycle(imports: Imports) -> list[str]:
    """Returns the modules of one circle of imports, the first one again at its end; empty without one."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []
