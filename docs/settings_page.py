"""Writes the tables of docs/settings.md from the dataclasses of the settings.

Run: ``python docs/settings_page.py --write`` (without it, the page goes to the output).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from pathlib import Path

import yaml

from lightning_cco._values import BOUNDS, CHOICES
from lightning_cco.sections import LayerRule
from lightning_cco.settings import Settings

PAGE = Path(__file__).with_name("settings.md")
_MARKS = "<!-- settings -->", "<!-- /settings -->"


def tables() -> str:
    """The tables, as Markdown: a section of the recipe each."""
    settings = Settings()
    parts = []
    for section in dataclasses.fields(Settings):
        value = getattr(settings, section.name)
        kind = type(value) if dataclasses.is_dataclass(value) else LayerRule
        parts.append(f"## {section.name}\n\n{_summary(kind)}\n\n{_table(kind)}")
    return "\n\n".join(parts)


def page() -> str:
    """The page with the tables of now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_MARKS[0])
    return f"{before}{_MARKS[0]}\n{tables()}\n{_MARKS[1]}{rest.partition(_MARKS[1])[2]}"


def descriptions(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it is derived from say of each field."""
    found: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__):
        text = inspect.cleandoc(ancestor.__doc__ or "")
        attributes = re.split(r"^(?=\S)", text.partition("Attributes:\n")[2], maxsplit=1, flags=re.MULTILINE)[0]  # up to the next section
        entries = re.split(r"^    (?=\w+: )", attributes, flags=re.MULTILINE)
        for name, _, said in (entry.partition(": ") for entry in entries if entry.strip()):
            found[name] = " ".join(said.split())
    return found


def _summary(kind: type) -> str:
    return _inline(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0])


def _table(kind: type) -> str:
    said = {"match": "A layer's name, a module's path, or a glob over either. Required."} | descriptions(kind)
    fields = sorted(dataclasses.fields(kind), key=lambda field: field.name != "match")
    rows = [f"| `{field.name}` | {_type(field)} | {_default(field)} | {_inline(said[field.name])} |" for field in fields]
    return "\n".join(["| key | value | default | |", "|---|---|---|---|", *rows])


def _type(field: dataclasses.Field[object]) -> str:
    if field.name in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[field.name])
    named = {
        "bool": "true, false",
        "int": "integer",
        "float": "number",
        "str": "text",
        "list[str]": "list of names",
        "list[BitsStage]": "list of stages",
        "None": "null",
    }
    words = ", ".join(named[part] for part in str(field.type).split(" | "))
    if field.name in BOUNDS:
        bound = BOUNDS[field.name][1]
        words = bound if "null" in bound or "null" not in words else f"{bound}, null"
    return words


def _default(field: dataclasses.Field[object]) -> str:
    if field.name == "match":
        return ""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def _inline(text: str) -> str:
    said = text.replace("``", "`").replace("|", "\\|").replace("\n", " ")
    for python, yaml_word in (("None", "null"), ("True", "true"), ("False", "false")):
        said = re.sub(rf"\b{python}\b", f"`{yaml_word}`", said)
    return said


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/settings.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
