"""What a user's code keeps outside of its objects: under global names, in attributes of classes, in slots; and which code is the user's own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, MutableMapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

NOT_ENTERED = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_cco", "torchvision", "torchaudio"}) | (
    sys.stdlib_module_names - {"collections"}
)
"""Packages whose objects hold no state of the user's."""


def of_a_library(value: Any) -> bool:
    """Whether a class or a function is of one of the packages whose objects hold no state of the user's."""
    return (getattr(value, "__module__", None) or "").partition(".")[0] in NOT_ENTERED


def is_own_code(value: Any) -> bool:
    """Whether a class, a function or a module is of the user's own code, not of an installed package."""
    file: str | None
    if isinstance(value, FunctionType):
        name, file = value.__module__ or "", value.__code__.co_filename
    elif isinstance(value, ModuleType):
        name = value.__name__
        file = getattr(value, "__file__", None)
    else:
        name = getattr(value, "__module__", None) or ""
        file = getattr(sys.modules.get(name), "__file__", None)
    return is_own_file(name, file or "")


def is_own_file(module: str, file: str) -> bool:
    """Whether code is of the user's own by the name of its module and its file."""
    return module.partition(".")[0] not in NOT_ENTERED and "site-packages" not in file and "dist-packages" not in file


@functools.lru_cache(maxsize=10_000)
def names_in(code: CodeType) -> frozenset[str]:
    """All names that code, and the functions that are written in it, may look up or write to.

    >>> def count():
    ...     global calls
    ...     calls = calls + 1
    >>> sorted(names_in(count.__code__))
    ['calls']
    """
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def functions_of(owner: type) -> list[Any]:
    """The functions that are defined in a class: methods, static and class methods, properties, and caches of them."""
    found: list[Any] = []
    for value in vars(owner).values():
        parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,)
        found += [getattr(part, "__func__", getattr(part, "func", part)) for part in parts]
    return [value for value in found if isinstance(value, FunctionType) or hasattr(value, "cache_clear")]


class Names(MutableMapping[str, Any]):
    """Those names of a module, or of the environment, that some code knows, as a mapping.

    Args:
        module: The names of the module, as its functions see them; `os.environ`.
        known: The names.
    """

    def __init__(self, module: MutableMapping[str, Any], known: frozenset[str]) -> None:
        self._module, self._known = module, known

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            raise KeyError(name)
        return self._module[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._module[name] = value

    def __delitem__(self, name: str) -> None:
        del self._module[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._known if name in self._module)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ClassAttributes(MutableMapping[str, Any]):
    """What a class itself holds, without its code.

    >>> class Counting:
    ...     calls = 0
    ...     def call(self):
    ...         Counting.calls += 1
    >>> dict(ClassAttributes(Counting))
    {'calls': 0}
    """

    def __init__(self, owner: type) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Any:
        value = vars(self._owner)[name]
        if not _is_state(name, value):
            raise KeyError(name)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in list(vars(self._owner).items()) if _is_state(name, value))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _is_state(name: str, value: Any) -> bool:
    code = isinstance(value, (FunctionType, MethodType, staticmethod, classmethod, property)) or hasattr(type(value), "__get__")
    return not code and not (name.startswith("__") and name.endswith("__")) and name != "_abc_impl"


class Slots(MutableMapping[str, Any]):
    """What an object holds in slots."""

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        self._slots = slots_of(type(holder))

    def __getitem__(self, name: str) -> Any:
        try:
            return self._slots[name].__get__(self._holder)
        except AttributeError:  # it is empty
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        self._slots[name].__set__(self._holder, value)

    def __delitem__(self, name: str) -> None:
        self._slots[name].__delete__(self._holder)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._slots if name in self)

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except KeyError:
            return False
        return True

    def __len__(self) -> int:
        return sum(1 for _ in self)


def slots_of(owner: type) -> dict[str, Any]:
    """The descriptors of the slots of a class of the user's own, by name."""
    found: dict[str, Any] = {}
    for base in reversed(owner.__mro__):
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            mangled = f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            descriptor = vars(base).get(mangled)
            if mangled not in ("__dict__", "__weakref__") and hasattr(type(descriptor), "__set__"):
                found[mangled] = descriptor
    return found
