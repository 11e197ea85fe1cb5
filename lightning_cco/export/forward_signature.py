"""How arguments are bound to the signature of a forward, and given to it again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_cco.export.errors import ExportError
from lightning_cco.export.nested_tensors import ArgPath, mapped, name_of


class ForwardSignature:
    """The signature of a forward.

    Args:
        signature: Its signature.
        owner: Name of the model's class, for errors.
        cast: Whether floating-point tensors become float32.

    Attributes:
        parameters: Its parameters by name.
    """

    def __init__(self, signature: inspect.Signature, owner: str, cast: bool) -> None:
        self._signature, self._owner, self._cast = signature, owner, cast
        self.parameters: Mapping[str, inspect.Parameter] = signature.parameters

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by parameter, those of ``*rest`` and ``**inputs`` under its name.

        Raises:
            CCOError: The forward does not take them.
        """
        try:
            bound = dict(self._signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise ExportError(
                f"{self._owner}.forward does not take the example: {error}. It expects "
                f"{self._signature}; got {len(args)} positional arguments and {list(kwargs)}. "
                "Pass example_args=(tensor, ...) or example_kwargs={...}."
            ) from error
        return mapped(bound, lambda _, tensor: self._converted(tensor))  # type: ignore[no-any-return]

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self._cast and tensor.is_floating_point() else tensor

    def unbind(self, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call, of what `bind` gives."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if name not in arguments:
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += arguments[name]
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update(arguments[name])
            elif parameter.kind is parameter.KEYWORD_ONLY or len(args) < list(self.parameters).index(name):
                kwargs[name] = arguments[name]
            else:
                args.append(arguments[name])
        return tuple(args), kwargs

    def input_name(self, slot: ArgPath) -> str:
        """A name for an input; the keywords of ``**inputs`` name themselves."""
        parameter = self.parameters.get(slot[0])
        return name_of(slot[1:] if parameter is not None and parameter.kind is parameter.VAR_KEYWORD else slot)

    def is_default(self, slot: ArgPath, arguments: Mapping[str, Any]) -> bool:
        """Whether a constant of a call is the forward's default."""
        parameter = self.parameters.get(slot[0]) if len(slot) == 1 else None
        return parameter is not None and parameter.default is not parameter.empty and parameter.default == arguments[slot[0]]

    def optional(self, arguments: Mapping[str, Any]) -> list[str]:
        """Arguments that the forward can do without."""
        found = []
        for name, parameter in self.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                found += list(arguments.get(name, {}))
            elif parameter.default is None and name in arguments:
                found.append(name)
        return found

    def without(self, arguments: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """Bound arguments without some of them."""
        kept = {name: value for name, value in arguments.items() if name not in names}
        for name, parameter in self.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD and name in kept:
                kept[name] = {key: value for key, value in kept[name].items() if key not in names}
        return kept

    def by_name(self, entries: tuple[Any, ...] | list[Any]) -> dict[str, Any]:
        """Entries in the order of the first parameters, by their names.

        Raises:
            CCOError: There are more than parameters.
        """
        names = list(self.parameters)
        if len(entries) > len(names):
            raise ExportError(f"dynamic_shapes has {len(entries)} entries, but the forward's arguments are {names}.")
        return dict(zip(names, entries, strict=False))
