"""Reading a recipe's YAML: what could blow up or hide something is refused while it is parsed, before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from lightning_cco.errors import CCOError
from lightning_cco.names import Interpolated, printable

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML was built with it: ten times as fast
_DEEPEST = 20
_LONGEST = 4096  # characters of a text: as long as a path may be
_MOST = 10_000  # values that aliases or interpolations may add to those that are written
_STANDARD = re.compile(r"!|tag:yaml\.org,2002:(null|bool|int|float|str|seq|map)")
_RESOLVER = yaml.resolver.Resolver()
_REFERENCE = re.compile(r"[\w.\-\[\]]+")


def parse_yaml(text: str, what: str) -> Any:
    """The content of a YAML text.

    Args:
        text: The YAML.
        what: What errors call it.

    Raises:
        CCOError: It is no YAML, or holds what no recipe needs: several documents, tags, a key twice, an alias of what is around it, nesting, texts
            or aliases without bounds; or what YAML reads as something else than it says: ``1:30`` as 90, ``010`` as 8, a date.
    """
    try:
        _Check(what).run(text)
        # libyaml does not read halves of surrogate pairs, which names of modules may hold.
        return yaml.load(text, yaml.SafeLoader if "\\uD" in text else LOADER)
    except (yaml.YAMLError, ValueError, RecursionError, UnicodeError) as error:
        raise CCOError(f"{what} is not valid YAML: {printable(error, 400)}") from error


@dataclass
class _Open:
    """A mapping or sequence that is being read."""

    is_mapping: bool
    anchor: str | None
    count: int = 0  # keys and values so far
    size: int = 1  # values in it, with those that aliases stand for
    keys: set[Any] = field(default_factory=set)
    key: str = ""


class _Check:
    """Goes through a text's events, and refuses at the first that is not a recipe's."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.around: list[_Open] = []
        self.sizes: dict[str, int] = {}
        self.documents = self.by_aliases = self.line = 0

    def run(self, text: str) -> None:
        of_event: dict[type, Callable[[Any], None]] = {
            yaml.DocumentStartEvent: self._document,
            yaml.AliasEvent: self._alias,
            yaml.ScalarEvent: self._scalar,
            yaml.MappingStartEvent: self._opened,
            yaml.SequenceStartEvent: self._opened,
            yaml.MappingEndEvent: self._closed,
            yaml.SequenceEndEvent: self._closed,
        }
        for event in yaml.parse(text, Loader=yaml.SafeLoader if "\\uD" in text else LOADER):
            self.line = event.start_mark.line + 1 if event.start_mark is not None else 0
            of_event.get(type(event), lambda _: None)(event)

    def _refuse(self, problem: str) -> CCOError:
        return CCOError(f"{self.what}, line {self.line}, {_where(self.around)}: {problem}")

    def _document(self, event: Any) -> None:
        self.documents += 1
        if self.documents > 1:
            raise self._refuse("expected one document, a second one begins here. Remove it.")

    def _alias(self, event: Any) -> None:
        if event.anchor not in self.sizes:
            raise self._refuse(f"the alias *{printable(event.anchor, 40)} refers to itself, or to nothing. Write it out.")
        self.by_aliases += self.sizes[event.anchor]
        if self.by_aliases > _MOST:
            raise self._refuse(f"aliases expand to more than {_MOST:,} values. Write fewer of them.")
        self._took(self.sizes[event.anchor])

    def _scalar(self, event: Any) -> None:
        self._tag(event.tag)
        if len(event.value) > _LONGEST:
            raise self._refuse(f"expected a text of at most {_LONGEST:,} characters, got one of {len(event.value):,}.")
        outer = self.around[-1] if self.around else None
        value = self._read_as(event)
        if outer is not None and outer.is_mapping and outer.count % 2 == 0:
            if value in outer.keys:
                raise self._refuse(f"the key '{printable(event.value, 80)}' comes twice. Keep one of them.")
            outer.keys.add(value)
            outer.key = event.value
        if event.anchor:
            self.sizes[event.anchor] = 1
        self._took(1)

    def _read_as(self, event: Any) -> Any:
        """What YAML makes of a scalar: of one without quotes a number, a truth value or a date, where it looks like one."""
        text = event.value
        tag = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False)) if event.implicit[0] else event.tag or ""  # type: ignore[no-untyped-call]
        kind = tag.rpartition(":")[2]
        if kind == "timestamp":
            raise self._refuse(f"{printable(text, 80)} is a date to YAML. Write it in quotes.")
        if kind not in ("bool", "int", "float"):
            return text
        value = yaml.load(text, yaml.SafeLoader)
        if kind in ("int", "float") and (":" in text or _is_octal(text)):
            base, number = ("60", "without colons") if ":" in text else ("8", "without leading zeros")
            raise self._refuse(
                f"{printable(text, 80)} is {printable(value, 80)} to YAML (a number to the base of {base}). Write a number {number}, or a name in quotes."
            )
        return value

    def _opened(self, event: Any) -> None:
        self._tag(event.tag)
        if len(self.around) >= _DEEPEST:
            raise self._refuse(f"expected values inside of each other at most {_DEEPEST} deep, got deeper ones.")
        self.around.append(_Open(isinstance(event, yaml.MappingStartEvent), event.anchor))

    def _closed(self, event: Any) -> None:
        closed = self.around.pop()
        if closed.anchor:
            self.sizes[closed.anchor] = closed.size
        self._took(closed.size)

    def _tag(self, tag: str | None) -> None:
        if tag is not None and not _STANDARD.fullmatch(tag):
            raise self._refuse(f"expected a plain value, got one with the tag '{printable(tag, 80)}'. Remove the tag.")

    def _took(self, size: int) -> None:
        if self.around:
            self.around[-1].count += 1
            self.around[-1].size += size


def _is_octal(text: str) -> bool:
    """Whether it is a number with a leading zero, which YAML reads to the base of 8, and which that makes another one."""
    digits = text.lstrip("+-").replace("_", "")
    return digits.isdecimal() and digits[0] == "0" and len(digits.lstrip("0")) > 1


def _where(around: list[_Open]) -> str:
    parts = [printable(outer.key, 60) if outer.is_mapping else f"[{outer.count}]" for outer in around[:6]]
    return ".".join(part for part in parts if part).replace(".[", "[") or "the top level"


def check_interpolations(content: Any) -> None:
    """Refuse interpolations that refer to so many of each other that they could never be resolved.

    Args:
        content: The recipe, or the configuration that it is a part of, not resolved yet.

    Raises:
        CCOError: They refer to too many.
    """
    by_path: dict[str, Any] = {}
    _index(content, "", by_path)
    sizes: dict[str, int] = {}

    def size(path: str, above: tuple[str, ...]) -> int:
        if path in above:
            return 1  # OmegaConf says of what refers to itself
        if path not in sizes:
            value, inside = by_path[path], (*above, path)
            if isinstance(value, str):
                parent = path.rpartition(".")[0]
                names = [name for part in value.split("${")[1:] for name in _REFERENCE.findall(part.split("}")[0])]
                targets = [_target(name, parent) for name in names]
                sizes[path] = len(value) + sum(size(target, inside) for target in targets if target in by_path)
            else:
                items = value.keys() if isinstance(value, Mapping) else range(len(value))
                sizes[path] = 1 + sum(size(f"{path}.{item}".lstrip("."), inside) for item in items)
            if sizes[path] > 100 * _MOST:
                raise CCOError(
                    f"{printable(path, 100) or 'The recipe'}: its interpolations expand to more than {100 * _MOST} values and characters. Write it out."
                )
        return sizes[path]

    texts = [path for path, value in by_path.items() if isinstance(value, str) and "${" in value]
    if any(re.search(r"\$\{[^}]*\$\{", by_path[path]) for path in texts) and len(texts) > 50:
        raise CCOError("The recipe has interpolations inside of interpolations, and more than 50 in all. Write them out.")
    for path in texts:
        size(path, ())


def _index(value: Any, path: str, found: dict[str, Any]) -> None:
    if isinstance(value, (str, Mapping, list)):
        found[path] = value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _index(item, f"{path}.{key}".lstrip("."), found)
        if not isinstance(item, (str, Mapping, list)):
            found[f"{path}.{key}".lstrip(".")] = ""


def _target(name: str, parent: str) -> str:
    path = name.replace("[", ".").replace("]", "")
    dots = len(path) - len(path.lstrip("."))
    for _ in range(dots - 1):
        parent = parent.rpartition(".")[0]
    return f"{parent}.{path.lstrip('.')}".lstrip(".") if dots else path.strip(".")


def marked(resolved: Any, source: Any) -> Any:
    """Resolved values in which texts remember that they come from an interpolation, so that no message shows them."""
    if isinstance(resolved, dict) and isinstance(source, dict):
        return {key: marked(value, source.get(key)) for key, value in resolved.items()}
    if isinstance(resolved, list) and isinstance(source, list):
        return [marked(value, item) for value, item in zip(resolved, source, strict=True)]
    if isinstance(source, str) and "${" in source and resolved != source:
        return _marked_below(resolved, source)
    return resolved


def _marked_below(value: Any, source: str) -> Any:
    if isinstance(value, dict):
        return {key: _marked_below(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked_below(item, source) for item in value]
    return Interpolated(value, source) if isinstance(value, str) else value
