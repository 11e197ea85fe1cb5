"""The network that a step calls, for a file: its modules, and what the step computes between them, run once more on other tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.export.errors import ExportError
from lightning_cco.export.nested_tensors import leaves, mapped
from lightning_cco.graph.compiled import BlockMode
from lightning_cco.quantization.model import HookedModel

_SIZED = {"view", "reshape", "expand"}
"""Functions whose first size is often the batch's."""


@dataclass
class _Event:
    """A call of a module, by its path, or of a torch function, that the step made itself."""

    call: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None
    written: set[int] = field(default_factory=set)

    @property
    def reads(self) -> list[Tensor]:
        return [value for _, value in leaves([self.args, self.kwargs]) if isinstance(value, Tensor)]

    @property
    def gives(self) -> list[Tensor]:
        return [value for _, value in leaves(self.result) if isinstance(value, Tensor)]


class StepNetwork:
    """A part of a model that a file can hold: arguments and result are those of the calls that the step makes.

    Attributes:
        signature: Its arguments.
        args: Positional arguments of the step's own call.
        kwargs: Keyword arguments of it.
    """

    def __init__(self, model: nn.Module, events: list[_Event], ends: list[_Event]) -> None:
        self.model = model
        self._events, self._ends = events, ends
        self._names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self.args: tuple[Any, ...]
        self.kwargs: dict[str, Any]
        self._path = events[0].call if len(events) == 1 and isinstance(events[0].call, str) else None
        if self._path is not None:
            self.signature = inspect.signature(model.get_submodule(self._path).forward)
            self.args, self.kwargs = _by_name(self.signature, events[0].args, events[0].kwargs)
            return
        self._inputs = self._find_inputs()
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in self._inputs]
        self.signature = inspect.Signature(parameters)
        self.args, self.kwargs = tuple(self._inputs.values()), {}

    def _find_inputs(self) -> dict[str, Tensor]:
        """The tensors that the events read and none of them makes, by name."""
        known = set(self._names)
        found: dict[str, Tensor] = {}
        for event in self._events:
            for name, tensor in self._named_arguments(event):
                if id(tensor) in known:
                    continue
                known.add(id(tensor))
                name = name if name.isidentifier() else "input"
                while name in found:
                    stem, _, number = name.rpartition("_")
                    name = f"{stem}_{int(number) + 1}" if stem and number.isdigit() else f"{name}_2"
                found[name] = tensor
            known.update(map(id, event.gives))
        return found

    def _named_arguments(self, event: _Event) -> Iterator[tuple[str, Tensor]]:
        bound: Mapping[str, Any] = {"input": event.args, **event.kwargs}
        if isinstance(event.call, str):
            bound = inspect.signature(self.model.get_submodule(event.call).forward).bind(*event.args, **event.kwargs).arguments
        for slot, value in leaves(dict(bound)):
            if isinstance(value, Tensor):
                yield next((part for part in reversed(slot) if isinstance(part, str)), "input"), value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network on these arguments."""
        if self._path is not None:
            return self.model.get_submodule(self._path)(*args, **kwargs)
        given = self.signature.bind(*args, **kwargs).arguments
        now: dict[int, Tensor] = {id(tensor): given[name] for name, tensor in self._inputs.items()}

        def replaced(_: Any, tensor: Tensor) -> Tensor:
            name = self._names.get(id(tensor))
            if name is None:
                return now.get(id(tensor), tensor)
            path, _, attribute = name.rpartition(".")
            return getattr(self.model.get_submodule(path), attribute)  # type: ignore[no-any-return]

        results = {}
        for event in self._events:
            args, kwargs = mapped(event.args, replaced), mapped(event.kwargs, replaced)
            if isinstance(event.call, str):
                result = self.model.get_submodule(event.call)(*args, **kwargs)
            else:
                result = event.call(*_with_own_batch(event, args), **kwargs)
            fresh = [value for _, value in leaves(result) if isinstance(value, Tensor)]
            now.update({id(before): after for before, after in zip(event.gives, fresh, strict=True)})
            results[id(event)] = result
        found = [results[id(event)] for event in self._ends]
        return found[0] if len(found) == 1 else tuple(found)


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call as keyword arguments, if the signature names them all."""
    unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    if not args or any(signature.parameters[name].kind in unnamed for name in signature.bind(*args, **kwargs).arguments):
        return args, kwargs
    named = [name for name, parameter in signature.parameters.items() if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return (), {**dict(zip(named, args, strict=False)), **kwargs}


def _with_own_batch(event: _Event, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a call that gives a shape, its first size being that of the tensor."""
    if getattr(event.call, "__name__", "") not in _SIZED or len(args) < 2 or not event.args[0].dim():
        return args
    sizes = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
    if not sizes or not isinstance(sizes[0], int) or sizes[0] != event.args[0].shape[0]:
        return args
    return args[0], (args[0].shape[0], *sizes[1:])


class _Watching(BlockMode):
    """Writes down what a step calls outside of modules."""

    def __init__(self, events: list[_Event]) -> None:
        super().__init__()
        self.events, self.depth = events, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        event = _Event(func, args, kwargs)
        versions = [(tensor, tensor._version) for tensor in event.reads if not tensor.is_inference()]
        event.result = func(*args, **kwargs)
        event.written = {_memory(tensor) for tensor, version in versions if tensor._version != version}
        self.events.append(event)
        return event.result

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.depth:
            self.events.append(_Event(path, args, kwargs))
        self.depth += 1

    def leave(self, path: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        self.depth -= 1
        if not self.depth:
            self.events[-1].result = result


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[_Event]]:
    events: list[_Event] = []
    mode = _Watching(events)
    handles = []
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(partial(mode.enter, path), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(mode.leave, path)))
    try:
        with mode:
            yield events
    finally:
        for handle in handles:
            handle.remove()


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def network_of_the_step(quantized: HookedModel, forward: Callable[[nn.Module, Any], Any], batch: Any) -> StepNetwork:
    """Run a step on a batch and write down the network that it calls.

    Args:
        quantized: The captured model.
        forward: How a batch goes through it.
        batch: The batch, on the model's device; it is not changed.

    Raises:
        CCOError: The step calls none of the captured modules on this batch.
    """
    model, wanted = quantized.model, quantized.capture.called
    with quantized.evaluating(), quantized.disabled(), quantized.forked_random(), _watching(model) as events:
        forward(model, batch)
    if type(model).forward is not nn.Module.forward and "" in wanted:
        wanted = ("",)  # what inference calls
    parameters = set(map(id, model.parameters()))
    tracked: set[int] = set()
    following = []
    for event in events:
        if event.call in wanted or any(id(tensor) in tracked or id(tensor) in parameters for tensor in event.reads):
            following.append(event)
            tracked.update(map(id, event.gives))
    targets: dict[str, _Event] = {}
    for event in following:
        if isinstance(event.call, str) and event.call in wanted:
            targets.setdefault(event.call, event)
    if not targets:
        raise ExportError(
            f"the step called none of {list(wanted)} on the held batch. Pass example_args=(tensor, ...) for a forward of its own."
        )
    chosen = _needed(following, list(targets.values()))
    read = {id(tensor) for event in chosen for tensor in event.reads}
    last = next(event for event in reversed(chosen) if any(event is target for target in targets.values()))
    ends = [event for event in targets.values() if event is last or not any(id(tensor) in read for tensor in event.gives)]
    return StepNetwork(model, chosen, ends)


def _needed(events: Sequence[_Event], targets: Sequence[_Event]) -> list[_Event]:
    """The targets, and what they are worked out of, in order."""
    wanted: set[int] = set()
    memories: set[int] = set()
    chosen: list[_Event] = []
    for event in reversed(events):
        if any(event is target for target in targets) or any(id(tensor) in wanted for tensor in event.gives) or event.written & memories:
            chosen.append(event)
            wanted.update(map(id, event.reads))
            memories.update(map(_memory, event.reads))
    return chosen[::-1]
