"""What a person writes for a layer: its name, a module path, or a glob; and the nearest names when nothing matches."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.layer import Layer
from lightning_cco.names import list_names, nearest, quote

PATH_PREFIX = "path:"
_GLOB = re.compile(r"[*?\[]")


class PathIndex:
    """Which layers are called in each module or below it; built once, linear in layers times depth."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._order = {layer.name: position for position, layer in enumerate(layers)}
        self._below: dict[str, list[str]] = {}
        for layer in layers:
            if layer.kind == "output":
                continue
            for path in containers(layer.path):
                self._below.setdefault(path, []).append(layer.name)

    @property
    def paths(self) -> Iterable[str]:
        """Every module path that calls a layer, directly or below it."""
        return self._below

    def below(self, path: str) -> list[str]:
        """Returns the layers called in the module or below it, in execution order; empty when there is no such path."""
        return self._below.get(path, [])

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Returns the names, each once, in execution order."""
        return sorted(set(names), key=self._order.__getitem__)


def containers(path: str) -> list[str]:
    """Returns a module path and those of the modules around it, outermost first.

    >>> containers("encoder.layer.0")
    ['encoder', 'encoder.layer', 'encoder.layer.0']
    """
    parts = path.split(".") if path else []
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def select_layers(pattern: str, by_name: Mapping[str, Layer], paths: PathIndex) -> list[str]:
    """Returns the names that a pattern selects, in execution order; see ``LayerGraph.select``."""
    only_paths = pattern.startswith(PATH_PREFIX)
    wanted = pattern[len(PATH_PREFIX) :].strip() if only_paths else pattern
    by_path = paths.below(wanted)
    if not only_paths and wanted in by_name:
        if any(name != wanted for name in by_path):
            warnings.warn(
                f"{quote(wanted)} is the name of a layer (called in {quote(by_name[wanted].path)}) and also the path of a module that "
                f"calls {list_names(by_path)}. The name counts. To select the module's layers, write {quote(PATH_PREFIX + wanted)}.",
                CCOWarning,
                stacklevel=3,
            )
        return [wanted]
    if by_path:
        return list(by_path)
    if _GLOB.search(wanted):
        matches = re.compile(fnmatch.translate(wanted)).match
        found = {name for path in paths.paths if matches(path) for name in paths.below(path)}
        if not only_paths:
            found |= {name for name, layer in by_name.items() if layer.kind != "output" and matches(name)}
        if found:
            return paths.in_order(found)
    raise CCOError(_no_match(pattern, wanted, only_paths, by_name, paths))


def _no_match(pattern: str, wanted: str, only_paths: bool, by_name: Mapping[str, Layer], paths: PathIndex) -> str:
    if not wanted:
        return f"{quote(pattern)} selects no layer. Write the name of a layer, a module path, or a glob such as 'encoder.*'."
    if only_paths and wanted in by_name:
        return f"No module has the path {quote(wanted)}, but a layer has that name: write {quote(wanted)} without {quote(PATH_PREFIX)}."
    what = "module path" if only_paths else "layer name or module path"
    verb = "matches" if _GLOB.search(wanted) else "is"
    candidates = list(paths.paths) if only_paths else [*by_name, *paths.paths]
    near = nearest(wanted, candidates)
    if not near and _GLOB.search(wanted):
        near = nearest(re.sub(r"\[[^]]*\]?|[*?]", "", wanted).strip("."), candidates)
    if not near:
        some = [path for path in paths.paths if "." not in path] if only_paths or "." in wanted else list(by_name)
        near = f" There are, for example, {list_names(some)}." if some else ""
    return f"No {what} {verb} {quote(wanted)}.{near}"
