"""Names and values that others chose, made safe to show: in the log, in Markdown, CSV and YAML.

A module's name may hold anything: line ends, terminal escapes, quotes, HTML, halves of surrogate pairs. Whatever is written for people goes through
`printable`, whatever is read back goes through `yaml_value`.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}  # words that YAML does not read as text
_FORMULA = ("=", "+", "-", "@")  # a spreadsheet computes cells that begin so
_MARKDOWN = re.compile(r"[\\`*\[\]|]")
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def printable(text: object, limit: int | None = None) -> str:
    r"""The text on one line, with escapes for what does not print: control characters, line ends, marks of direction, surrogates.

    Args:
        text: Anything; its ``str``.
        limit: How many characters at most; the middle is left out.

    >>> printable("a\n- b\x1b[31m"), printable("encoder.layer.0.attention", 11)
    ('a\\n- b\\x1b[31m', 'encod…ntion')
    """
    said = str(text)
    if not said.isprintable():
        said = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in said)
    if limit is not None and len(said) > limit:
        said = f"{said[: limit // 2]}…{said[len(said) - (limit - 1) // 2 :]}"
    return said


def last_parts(path: str, most: int) -> str:
    """The last parts of a module's path, which tell modules apart, as many as there is room for.

    >>> last_parts("encoder.layers.[0-11].attention", 20), last_parts("stem", 20)
    ('…[0-11].attention', 'stem')
    """
    if len(path) <= most or "…" in path:
        return path
    parts = path.split(".")
    kept = parts.pop()
    while parts and len(parts[-1]) + len(kept) + 2 <= most:
        kept = f"{parts.pop()}.{kept}"
    return f"…{kept}" if parts else kept


def is_within(path: str, modules: Iterable[str]) -> bool:
    """Whether a path is that of one of the modules, or of a part of one."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def module_of(path: str) -> str:
    """The module of a path, as messages name it.

    >>> module_of("net.head"), module_of("")
    ("module 'net.head'", 'the model itself')
    """
    return f"module '{path}'" if path else "the model itself"


def markdown_cell(text: object) -> str:
    r"""A cell of a Markdown table.

    >>> markdown_cell("a|<b>")
    'a\\|&lt;b&gt;'
    """
    said = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(lambda sign: "\\" + sign.group(), said)


def csv_cell(text: object) -> str:
    """A cell with a name in it, for a `csv.writer`: a spreadsheet must not take it for a formula.

    >>> csv_cell("=1+1"), csv_cell("conv.0")
    ("'=1+1", 'conv.0')
    """
    said = printable(text)
    return f"'{said}" if said.lstrip().startswith(_FORMULA) else said


def yaml_value(value: object) -> str:
    r"""A value of a recipe as YAML on one line; `load_settings` reads the same value back, also from a text with ``${`` in it.

    >>> yaml_value(["conv", "encoder.*", "a\nb", True, None])
    '[conv, \'encoder.*\', "a\\nb", true, null]'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{yaml_value(str(key))}: {yaml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(yaml_value, value)) + "]"
    if isinstance(value, str):
        text = str(literal(value))
        if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
            return text
        style = "'" if text.isprintable() else '"'
        return str(yaml.dump(text, Dumper=yaml.SafeDumper, default_style=style, allow_unicode=True, width=float("inf"))).rstrip("\n")
    return str(yaml.dump(value, Dumper=yaml.SafeDumper)).removesuffix("...\n").rstrip("\n")


def literal(value: Any) -> Any:
    r"""A value, or a container of values, in which OmegaConf reads ``${...}`` literally.

    >>> literal({"match": "${HOME}"})
    {'match': '\\${HOME}'}
    """
    if isinstance(value, str):
        return _INTERPOLATION.sub(lambda found: found.group(1) * 2 + "\\${", str(value))
    if isinstance(value, Mapping):
        return {key: literal(item) for key, item in value.items()}
    return [literal(item) for item in value] if isinstance(value, (list, tuple)) else value


class Interpolated(str):
    """Text that came out of an interpolation such as ``${oc.env:TOKEN}``: messages show what was written, never the value that it resolves to.

    Args:
        value: The text.
        source: What the recipe says.
    """

    source: str

    def __new__(cls, value: str, source: str) -> Interpolated:  # noqa: D102
        made = super().__new__(cls, value)
        made.source = source
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """What a copy is made of."""
        return str(self), self.source

    def __format__(self, spec: str) -> str:
        """What was written."""
        return format(self.source, spec)

    def __repr__(self) -> str:
        """What was written."""
        return repr(self.source)


class _Short(reprlib.Repr):
    """Shows any value in a few words, whatever its size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxstring = 2, 3, 80
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxarray = 3

    def repr1(self, x: Any, level: int) -> str:
        """By kind; what is neither text nor number nor container only by its type, since its own ``repr`` may be of any length."""
        if isinstance(x, Interpolated):
            return printable(repr(x), 200)
        if isinstance(x, str):
            return printable(repr(x[:100] + x[max(100, len(x) - 100) :]), self.maxstring)
        if isinstance(x, int) and x.bit_length() > 128:
            return f"a number of {x.bit_length()} bits"
        if isinstance(x, (bool, int, float, type(None))):
            return repr(x)
        if type(x) in (dict, list, tuple, set, frozenset):
            return super().repr1(x, level)
        return f"<{type(x).__name__}>"


def shown(value: object) -> str:
    """A value in a message, at most some hundred characters long.

    >>> shown("conv"), shown(list(range(100)))
    ("'conv'", '[0, 1, 2, ...]')
    """
    return _Short().repr(value)


def nearest(wanted: str, candidates: Iterable[str], count: int = 3) -> str:
    """Returns `` Did you mean 'a', 'b' or 'c'?`` with the candidates nearest to what was written, or an empty string.

    Before mere likeness come: the same in another case; the children of the module around it, when that one is written right; the
    same with outer modules more or less (``model.encoder.0`` for ``encoder.0``).
    """
    if len(wanted) > 200:  # likeness takes quadratic time, and nobody mistypes so much
        return ""
    pool = list(dict.fromkeys(candidates))
    lowered = wanted.lower()
    found = [name for name in pool if name.lower() == lowered]
    parent, _, child = wanted.rpartition(".")
    if parent:
        siblings = {name[len(parent) + 1 :]: name for name in pool if name.startswith(parent + ".") and "." not in name[len(parent) + 1 :]}
        found += [siblings[near] for near in difflib.get_close_matches(child, siblings, n=count, cutoff=0.4)]
    if wanted:
        found += [name for name in pool if name.lower().endswith("." + lowered) or lowered.endswith("." + name.lower())]
    if len(found) < count:
        found += difflib.get_close_matches(wanted, pool, n=count, cutoff=0.6)
    quoted = [quote(name) for name in dict.fromkeys(found)][:count]
    if not quoted:
        return ""
    return f" Did you mean {' or '.join([', '.join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)}?"


def list_names(names: Sequence[str], limit: int = 5) -> str:
    """Returns the names in quotes, cut after ``limit``.

    >>> list_names(["conv", "relu", "add"], limit=2)
    "'conv', 'relu' and 1 more"
    """
    shown = ", ".join(quote(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def quote(name: str) -> str:
    """Returns the name between single quotes, on one line, the middle of a very long one left out."""
    return f"'{printable(f'{name}', 160)}'"
