"""Writes docs/modules.md: every module of the package, with the first paragraph of its docstring.

Run: ``python docs/modules_page.py --write`` (without it, the page goes to the output). It reads the files without importing them.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

PAGE = Path(__file__).with_name("modules.md")
PACKAGE = PAGE.parents[1] / "lightning_cco"
_TOP = "The modules at the top: the callback, what a run does when, settings, and what all share."


def page() -> str:
    """The page as it should be now."""
    folders = sorted(
        {path.parent for path in PACKAGE.rglob("*.py")}, key=lambda folder: (len(folder.relative_to(PACKAGE).parts) > 0, folder)
    )
    parts = [
        "# Modules",
        "Every file of the package by the first paragraph of its docstring; [how it works](architecture.md) has the way of a model through them. "
        "Made by `python docs/modules_page.py --write`.",
    ]
    for folder in folders:
        name = "/".join(folder.relative_to(PACKAGE).parts)
        about = _about(folder / "__init__.py") if name and (folder / "__init__.py").is_file() else _TOP
        rows = [f"| `{path.stem}` | {_about(path)} |" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
        if rows:
            parts.append(f"## {f'`{name}/`' if name else '`lightning_cco/`'}\n{about}\n\n| module | |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _about(path: Path) -> str:
    """The first paragraph of a module's docstring, in one line of a table."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.partition("\n\n")[0].split())
    return re.sub(r"`+", "`", first).replace("|", "\\|")


def main() -> None:
    """Print the page, or write it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true")
    if arguments.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
