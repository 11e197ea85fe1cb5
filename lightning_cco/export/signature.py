"""The forward that a file holds: tensors in, tensors out. Everything else of a call is fixed as in the example."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError
from lightning_cco.export.nested import ArgPath, follow, items_of, leaves, mapped, name_of
from lightning_cco.export.network import Network
from lightning_cco.graph.failing import failing_module

PREFIX = "model"
"""Name of the model in `Deployed`, and so the beginning of all paths that the exporter sees."""
_LABELS = ("label", "labels", "target", "targets", "y", "y_true", "start_positions", "end_positions")


class Deployed(nn.Module):
    """A model behind a signature of tensors alone.

    Arguments by keyword, ``**inputs``, an unused ``*rest``, defaults, dictionaries and dataclasses are bound as in the example; labels, without which
    the model gives the same outputs but no loss, are left out; so is a loss beside other outputs.

    Args:
        model: The model, in evaluation mode.
        args: Positional arguments of one forward.
        kwargs: Keyword arguments of it.
        cast: Whether floating-point inputs become float32.
        network: What to call in the place of the model's forward.

    Attributes:
        names: Name of each input.
        outputs: Name of each output.
        dropped: Arguments that are labels.
        fixed: Numbers, strings and flags of the example that are constants in the file, in words.
        lost: Outputs that are not in the file, in words.

    Raises:
        CCOError: The forward does not take the example, or gives no tensor.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cast: bool = False, network: Network | None = None
    ) -> None:
        super().__init__()
        self.model, self._cast, self._network = model, cast, network
        self.dropped: list[str] = []
        self.training = model.training
        example = self._bound(args, kwargs)
        self.dropped = self._labels(example)
        self._example = self._without_labels(example)
        found = leaves(self._example)
        self._slots = [slot for slot, value in found if isinstance(value, Tensor)]
        self.names = _unique([self._input_name(slot) for slot in self._slots])
        self.fixed = [
            f"{self._input_name(slot)}={value!r}" for slot, value in found if isinstance(value, (int, float, str)) and self._matters(slot)
        ]
        result = self._called_on_example()
        kept = [(slot, value) for slot, value in leaves(result) if isinstance(value, Tensor)]
        losses = [slot for slot, value in kept if slot and slot[-1] == "loss" and value.dim() == 0]
        self._kept = [slot for slot, _ in kept if slot not in losses or len(kept) == len(losses)]
        self.lost = [name_of(slot) for slot in losses if slot not in self._kept] + _others(result)
        if not self._kept:
            raise CCOError(
                f"export: {type(model).__name__}.forward returned {type(result).__name__} without a tensor in it; a tensor, or a tuple, mapping or dataclass "
                "of tensors was expected."
            )
        names = [name_of(slot) for slot in self._kept]
        self.outputs = [name if name and not name[0].isdigit() else f"output_{number}" for number, name in enumerate(names)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the model with the tensors in the places of the example's."""
        args, kwargs = self.call(tensors)
        return self.kept(self._run(*args, **kwargs))

    def kept(self, result: Any) -> tuple[Tensor, ...]:
        """Of what the model gives, the tensors that are outputs.

        Raises:
            CCOError: One of the example's is missing.
        """
        found = {slot: value for slot, value in leaves(result) if isinstance(value, Tensor)}
        missing = [slot for slot in self._kept if slot not in found]
        if missing:
            raise CCOError(
                f"export: {type(self.model).__name__} gave no '{name_of(missing[0])}' on these inputs, but did on the example. "
                "If the model gives another number of tensors in evaluation, export in that form."
            )
        return tuple(found[slot] for slot in self._kept)

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """The inputs of a call, in order; `None` if it is not of the example's form (other keys, other numbers), so that the file does not compute it."""
        try:
            bound = self._without_labels(self._bound(args, kwargs))
        except CCOError:
            return None
        theirs, ours = leaves(bound), leaves(self._example)
        if [slot for slot, _ in theirs] != [slot for slot, _ in ours]:
            return None
        for (_, value), (_, wanted) in zip(theirs, ours, strict=True):
            if isinstance(value, Tensor) != isinstance(wanted, Tensor) or (
                not isinstance(value, Tensor) and value is not wanted and value != wanted
            ):
                return None
        return tuple(value for _, value in theirs if isinstance(value, Tensor))

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The example's tensors."""
        return tuple(value for _, value in leaves(self._example) if isinstance(value, Tensor))

    def spread(self, shapes: Any, used: str) -> list[Any]:
        """What the user said of each argument, for each tensor in it.

        Args:
            shapes: A mapping by the arguments' names, or a tuple in their order, nested as the arguments are.
            used: Name of the option, for errors.
        """
        arguments = {name: self._example.get(name) for name in self._signature()}
        if not isinstance(shapes, Mapping):
            if not isinstance(shapes, (tuple, list)):
                raise CCOError(
                    f"export: {used} expects a mapping by argument or a tuple in the order of the arguments, got {type(shapes).__name__}."
                )
            shapes = dict(zip(self._positional(len(shapes)), shapes, strict=False))
        flat = {name: value for name, value in shapes.items() if name not in arguments}
        for name, parameter in self._signature().items():
            inside = self._example.get(name)
            if parameter.kind is parameter.VAR_KEYWORD and isinstance(inside, dict):
                shapes = {
                    **shapes,
                    name: {**{key: flat.pop(key) for key in list(flat) if key in inside or key in self.dropped}, **shapes.get(name, {})},
                }
        unknown = [name for name in flat if name not in self.dropped]
        if unknown:
            raise CCOError(f"export: {used} names {unknown}, but the forward's arguments are {list(arguments)}.")
        return [follow(shapes, slot) for slot in self._slots]

    def _signature(self) -> Mapping[str, inspect.Parameter]:
        return self._called.parameters

    @property
    def _called(self) -> inspect.Signature:
        return inspect.signature(self.model.forward) if self._network is None else self._network.signature

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return (self.model if self._network is None else self._network)(*args, **kwargs)

    def _positional(self, count: int) -> list[str]:
        """Names of the first tensor arguments' parameters, one for each entry of a tuple."""
        names = list(self._signature())
        if count > len(names):
            raise CCOError(f"export: dynamic_shapes has {count} entries, but the forward's arguments are {names}.")
        return names[:count]

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = dict(self._called.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise CCOError(
                f"export: {type(self.model).__name__}.forward does not take the example: {error}. It expects "
                f"{self._called}; got {len(args)} positional arguments and {list(kwargs)}. "
                "Pass example_args=(tensor, ...) or example_kwargs={...}."
            ) from error
        return mapped(bound, lambda _, tensor: self._converted(tensor))  # type: ignore[no-any-return]

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self._cast and tensor.is_floating_point() else tensor

    def _input_name(self, slot: ArgPath) -> str:
        """A name for an input; the keywords of ``**inputs`` name themselves."""
        parameter = self._signature().get(slot[0])
        return name_of(slot[1:] if parameter is not None and parameter.kind is parameter.VAR_KEYWORD else slot)

    def call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model's own forward with these tensors in them."""
        given = dict(zip(self._slots, tensors, strict=True))
        return self._arguments(mapped(self._example, lambda slot, _: given[slot]))

    def nested(self, specifications: Sequence[Any]) -> dict[str, Any]:
        """One entry for each tensor in the form of the arguments, as `torch.export` wants its dynamic shapes."""
        given = dict(zip(self._slots, specifications, strict=True))

        def of(value: Any, slot: ArgPath) -> Any:
            if isinstance(value, Tensor):
                return given[slot]
            items = items_of(value)
            if items is None:
                return None
            inside = {key: of(item, (*slot, key)) for key, item in items}
            return (
                inside
                if isinstance(value, Mapping)
                else type(value)(inside.values())
                if type(value) in (tuple, list)
                else list(inside.values())
            )

        return {name: of(value, (name,)) for name, value in self._example.items()}

    def _called_on_example(self) -> Any:
        try:
            return self._call(self._example)
        except CCOError:
            raise
        except Exception as error:
            given = ", ".join(
                f"{self._input_name(slot)} {list(value.shape)}" for slot, value in leaves(self._example) if isinstance(value, Tensor)
            )
            raise CCOError(
                f"export: the forward of {type(self.model).__name__} failed on the example ({given or 'no tensor'}){failing_module(self.model, error)}: "
                f"{type(error).__name__}: {error}. Give an example that it takes: example_args=(tensor, ...) or example_kwargs={{...}}."
            ) from error

    def _call(self, arguments: dict[str, Any]) -> Any:
        args, kwargs = self._arguments(arguments)
        return self._run(*args, **kwargs)

    def _arguments(self, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, parameter in self._signature().items():
            if name not in arguments:
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += arguments[name]
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update(arguments[name])
            elif parameter.kind is parameter.KEYWORD_ONLY or len(args) < list(self._signature()).index(name):
                kwargs[name] = arguments[name]
            else:
                args.append(arguments[name])
        return tuple(args), kwargs

    def _optional(self, arguments: Mapping[str, Any]) -> list[str]:
        """Arguments with tensors that the forward can do without."""
        found = []
        for name, parameter in self._signature().items():
            if parameter.kind is parameter.VAR_KEYWORD:
                found += list(arguments.get(name, {}))
            elif parameter.default is None and name in arguments:
                found.append(name)
        return found

    def _without(self, arguments: dict[str, Any], names: list[str]) -> dict[str, Any]:
        kept = {name: value for name, value in arguments.items() if name not in names}
        for name, parameter in self._signature().items():
            if parameter.kind is parameter.VAR_KEYWORD and name in kept:
                kept[name] = {key: value for key, value in kept[name].items() if key not in names}
        return kept

    def _without_labels(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._without(arguments, self.dropped) if self.dropped else arguments

    def _labels(self, arguments: dict[str, Any]) -> list[str]:
        """Optional arguments without which a single number, the loss, is no longer returned and all else is."""
        optional = [
            name for name in self._optional(arguments) if any(isinstance(value, Tensor) for _, value in leaves(self._find(arguments, name)))
        ]
        if not optional:
            return []
        whole = self._outputs(arguments)
        if whole is None or not any(_is_loss(value) for value in whole):
            return []
        labels = [name for name in optional if _only_loses_losses(whole, self._outputs(self._without(arguments, [name])))]
        more = [name for name in optional if labels and name not in labels and name in _LABELS]
        return labels + [name for name in more if self._outputs(self._without(arguments, [*labels, name])) is not None]

    def _find(self, arguments: Mapping[str, Any], name: str) -> Any:
        return (
            arguments[name] if name in arguments else next((v[name] for v in arguments.values() if isinstance(v, dict) and name in v), None)
        )

    def _matters(self, slot: ArgPath) -> bool:
        """Whether a constant of the example is another than the forward's default."""
        parameter = self._signature().get(slot[0]) if len(slot) == 1 else None
        return parameter is None or parameter.default is parameter.empty or parameter.default != self._example[slot[0]]

    def _outputs(self, arguments: dict[str, Any]) -> list[Tensor] | None:
        try:
            return [value for _, value in leaves(self._call(arguments)) if isinstance(value, Tensor)]
        except Exception:  # it is needed after all
            return None


def _is_loss(value: Tensor) -> bool:
    return value.dim() == 0 and value.is_floating_point()


def _only_loses_losses(whole: list[Tensor], less: list[Tensor] | None) -> bool:
    if not less or sum(map(_is_loss, less)) >= sum(map(_is_loss, whole)):
        return False
    others = [value for value in whole if not _is_loss(value)]
    rest = [value for value in less if not _is_loss(value)]
    if not others:
        return bool(rest)
    return len(rest) >= len(others) and all(
        any(value.shape == same.shape and torch.allclose(value.double(), same.double(), equal_nan=True, atol=1e-4) for same in rest)
        for value in others
    )


def _unique(names: list[str]) -> list[str]:
    """Names that a file takes for inputs."""
    taken: dict[str, int] = {}
    found = []
    for name in names:
        name = re.sub(r"\W+", "_", name).strip("_") or "input"
        name = f"input_{name}" if name[0].isdigit() else name
        count = taken[name] = taken.get(name, 0) + 1
        found.append(name if count == 1 else f"{name}_{count}")
    return found


def _others(result: Any) -> list[str]:
    """Outputs that are neither tensors nor numbers, such as a cache of keys and values."""
    return [
        f"{name_of(slot)} ({type(value).__name__})" for slot, value in leaves(result) if not isinstance(value, (Tensor, int, float, str))
    ]
