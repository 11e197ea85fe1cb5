"""The texts of the package's errors and warnings, read from its code: ``…`` stands for what is filled in."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_cco


def texts_in_code() -> list[str]:
    """Every piece of text in the package that is written as one expression, docstrings left out."""
    found = []
    for path in sorted(Path(lightning_cco.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.JoinedStr, ast.Constant)) and id(node) not in docstrings:
                found.append(_text(node))
    return [text for text in found if text]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""
