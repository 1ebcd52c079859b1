"""Digest of the code that makes a cell's numbers: everything that the cell's module imports.

The modules are found by following imports, so that no list can fall behind. What is hashed is the
parsed source without docstrings, comments and import lines: a reworded sentence and a moved file
leave the digest as it is, a changed constant does not. (The parsed form depends on Python's
version, as numbers depend on torch's.)
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Iterator

import torch
import transformers

from healing.config.fingerprint import fingerprint
from healing.registry import parse, source_file

EXCLUDED = {
    "healing.config": "every value that reaches a cell is a field of its resolved configuration",
    "healing.errors": "names of failures; a cell that fails leaves no numbers",
    "healing.data.hub": "how files are fetched; what they hold is hashed as weights and texts",
    "healing.data.kept_rows": "where rows of the Hub are kept; the texts made of them are hashed",
    "healing.kept_files": "how files are put into the cache; what they hold has digests",
    "healing.progress": "says how far a loop is, and changes nothing in it",
    "healing.registry": "which file a name stands for; the file in use is a root of its own",
    "healing.stages.cells.code_digest": "this module",
    "healing.stages.cells.events": "names of what a cell says to its driver",
}
"""What a cell reaches and its digest leaves out (with everything below it), and why."""


def imported(tree: ast.Module, package: str = "") -> Iterator[str]:
    """Names that the source imports, at any depth: modules, and what may be modules.

    Args:
        tree: Of the source.
        package: That relative imports start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if node.level:
                module = importlib.util.resolve_name(module, package)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@functools.cache
def parsed(path: pathlib.Path) -> ast.Module:
    """Syntax tree of a file."""
    return parse(path.read_text(encoding="utf-8"))


def is_excluded(name: str) -> bool:
    """Whether a module is left out, by itself or with its package."""
    return any(name == e or name.startswith(f"{e}.") for e in EXCLUDED)


def closure(*roots: str) -> dict[str, pathlib.Path]:
    """Module → file of the roots and of what they import of this project, plug-ins also of their
    own package.
    """
    found: dict[str, pathlib.Path] = {}
    followed = {"healing", *(root.partition(".")[0] for root in roots)}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        path = None if name in found or is_excluded(name) else source_file(name)
        if path is not None:
            found[name] = path
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            names = imported(parsed(path), package)
            waiting += [n for n in names if n.partition(".")[0] in followed]
    return dict(sorted(found.items()))


class _Stripped(ast.NodeTransformer):
    """Removes what cannot change a number: strings that stand alone, and imports."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None


def stripped(source: str) -> str:
    """The syntax tree of a source as text, without docstrings, comments and imports."""
    return ast.dump(_Stripped().visit(parse(source)))


@functools.cache
def code_digest(*roots: str) -> str:
    """Hash (16 hex digits) of the code behind some modules, and of torch's and transformers'
    versions.

    Modules count by content, not by name: moving one changes nothing.

    Args:
        roots: The cell's module, and what it loads by name (an arm, a healing method, a plug-in).
    """
    sources = (stripped(path.read_text(encoding="utf-8")) for path in closure(*roots).values())
    hashes = sorted(hashlib.sha256(source.encode()).hexdigest() for source in sources)
    return fingerprint(torch.__version__, transformers.__version__, *hashes)
