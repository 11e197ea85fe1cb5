"""Finds in source code what is private to other packages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "lightning_cco"
_TEXT = re.compile(r"(?:torch|lightning|torchmetrics|onnxscript|onnx_ir)(?:\.\w+)*\._\w|pkg\.torch")
_LOOKS = ("getattr", "hasattr", "setattr", "delattr")
_PUBLIC = {"_fields", "_getframe", "_replace", "_asdict"}  # of named tuples and of Python, documented
_OF_CODE = {"__code__", "__closure__"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name not in _PUBLIC and name.strip("_") != ""


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a file defines: functions, classes, variables, attributes of its objects."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def private_names(source: str, own: set[str], foreign: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each use of something private.

    Args:
        source: Of one file.
        own: Private names that the package defines.
        foreign: Those of other packages; where a name is both, it is the package's own after ``self`` alone.
    """
    tree = ast.parse(source)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            ours = node.attr in own and (_is_self(node.value) or node.attr not in foreign)
            if (is_private(node.attr) and not ours) or node.attr in _OF_CODE:
                yield node.lineno, node.attr
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            yield from ((node.lineno, name) for name in _imported(node) if is_private(name))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _LOOKS and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and (name.value not in own or name.value in foreign):
                yield node.lineno, str(name.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation and _TEXT.search(node.value):
            yield node.lineno, node.value
        if _reads_locals(node):
            yield node.lineno, "f_locals"  # type: ignore[attr-defined]


def _imported(node: ast.ImportFrom | ast.Import) -> list[str]:
    """The parts of the names that an import of another package has."""
    parts = [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.Import):
        return parts
    module = node.module or ""
    return [] if node.level or module.startswith(("lightning_cco", "__future__")) else [*module.split("."), *parts]


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _reads_locals(node: ast.AST) -> bool:
    """``frame.f_locals["name"]`` or ``frame.f_locals.get("name")``: names of variables in somebody else's code."""
    return isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.value, ast.Attribute) and node.value.attr == "f_locals"
