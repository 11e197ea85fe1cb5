"""A snapshot of all that running a model may write to in it, restored afterwards: a trial forward must not count as a step.

A forward or a step may append to lists, count, move a queue, average a copy of the network, or draw from a generator of its own. What was run only to
capture, to calibrate or to measure must leave none of that, or the training goes on from something else than the float run does.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextvars import ContextVar
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_cco.compat.modules import OF_MODULES, buffers_of, cells_of, hooks_of
from lightning_cco.compat.torch_modes import is_functorch_wrapped
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.containers import bytes_of, tensors_in
from lightning_cco.graph.global_state import (
    ClassAttributes,
    Names,
    Slots,
    functions_of,
    is_own_code,
    names_in,
    of_a_library,
    slots_of,
)
from lightning_cco.graph.replayed_iterators import RecordingIterator, is_iterator, put_back
from lightning_cco.graph.saved_attributes import KeptAttributes
from lightning_cco.graph.saved_caches import environment_of, held_by, is_cache, undo_cache
from lightning_cco.graph.saved_hooks import undo_children, undo_hooks
from lightning_cco.graph.saved_values import is_same, restore, undo_array, undo_contents, undo_value

_MOST_ITEMS, _MOST_OBJECTS = 10_000, 50_000
_LARGE, _LARGE_OUTSIDE = 1 << 28, 1 << 20
"""Bytes of a tensor or an array beyond which it is not copied: then it is data rather than something that steps write to. Global names hold more of that."""
_ACTIVE: ContextVar[tuple[Snapshot, ...]] = ContextVar("_ACTIVE", default=())


class Snapshot:
    """All that a forward may write to in a model: buffers, attributes of its modules, what is in them, generators of random numbers.

    A context manager, which restores it in the end. Lists, dictionaries, sets, arrays and tensors get their contents back, not only attributes their objects.
    Objects of the user's own classes and what the user's hooks refer to are entered; those of libraries and data sets are not. So is what their code keeps
    elsewhere: attributes of classes and functions, default arguments, the global names that it knows, what its caches hold, and the variables of the
    environment that it names. Hooks that a forward registers on modules are taken off, those that it takes off come back.

    Args:
        model: The model, as it is now; `None`: only ``others``.
        parameters: Whether to keep the values of the parameters, too; see `keep_parameters`.
        others: Further objects, classes and functions, of which those of the user's own code are kept, too.
        iterators: Whether what is drawn from iterators comes again; else they are left alone.
        parts: Whether modules that a forward replaces come back. Not in the capture: what a first forward makes for good is hooked.

    Attributes:
        stay: Attributes and names that stay as they are when the block ends; see `appeared`.
        caches: What `functools.lru_cache` has made.
        constants: Tensors that stay where a forward has put them in place of nothing.
    """

    def __init__(
        self, model: nn.Module | None, parameters: bool = False, others: Iterable[Any] = (), *, iterators: bool = True, parts: bool = False
    ) -> None:
        self.model, self._iterators, self._parts = model, iterators, parts
        self.stay: frozenset[tuple[int, str]] = frozenset()
        self.constants: Sequence[Tensor] = ()
        self._parameters = False
        self._undo: list[Callable[[], None]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._attributes: list[KeptAttributes] = []
        self._large: list[tuple[Tensor, int]] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._seen, self.caches = dict[int, Any](), list[Any]()
        self._code: deque[type | FunctionType] = deque()
        self._most_bytes = _LARGE
        with torch.DisableTorchFunction(), torch.no_grad():
            if model is not None:
                self._seen.update((id(parameter), parameter) for parameter in model.parameters())
                self._enter(model)
            for other in others:
                self._enter(other)
            self._most_bytes = _LARGE_OUTSIDE
            while self._code:  # after all objects, which count first
                code = self._code.popleft()
                self._enter_class(code) if isinstance(code, type) else self._enter_code(code)
        if parameters:
            self.keep_parameters()

    def __enter__(self) -> Snapshot:
        _ACTIVE.set((*_ACTIVE.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _ACTIVE.set(tuple(kept for kept in _ACTIVE.get() if kept is not self))
        self.restore()

    @staticmethod
    def around(model: nn.Module) -> Snapshot | None:
        """What has been kept of a model by the innermost block around this."""
        return next((kept for kept in reversed(_ACTIVE.get()) if kept.model is model), None)

    def keep_parameters(self) -> None:
        """Keep the values of the parameters, too, as they are now, on the CPU: a step may write to them."""
        if not self._parameters and self.model is not None:
            self._parameters = True
            with torch.DisableTorchFunction(), torch.no_grad():
                for parameter in self.model.parameters():
                    self._keep_tensor(parameter, "cpu")

    def restore(self) -> None:
        """Put everything back."""
        with torch.DisableTorchFunction(), torch.no_grad():
            for part in self._attributes:
                part.restore(self.stay, self._is_constant)
            for undo in self._undo:
                undo()
            for tensor, value in self._tensors:
                restore(tensor, value)
        written = [tuple(tensor.shape) for tensor, version in self._large if tensor._version != version]
        if written:
            who = "The data" if self.model is None else type(self.model).__name__
            warnings.warn(
                f"{who}: a forward that only looked at the layers has written to tensors too large for a copy, of shapes {written}: "
                "what it wrote stays. If that matters, let steps write to them only while self.trainer.training.",
                CCOWarning,
                stacklevel=2,
            )

    def appeared(self) -> dict[tuple[int, str], Any]:
        """Attributes of modules and classes, and global names, that were `None`, or not there, and now are something, by where they are."""
        return {(id(part.now), name): value for part in self._attributes for name, value in part.appeared()}

    def changed(self) -> list[Tensor]:
        """The tensors that are now where something else was, and those whose values have changed: what the next forward may go on from."""
        with torch.DisableTorchFunction(), torch.no_grad():
            found = [tensor for tensor, value in self._tensors if not is_same(tensor, value)]
            for part in self._attributes:
                names = [*part.new, *(name for name, value in part.before.items() if part.now.get(name) is not value)]
                found += [tensor for name in names for _, tensor in tensors_in(part.now.get(name))]
            for container, items in self._containers:
                before = set(map(id, items))
                found += [tensor for _, tensor in tensors_in(container) if id(tensor) not in before]
        return [tensor for tensor in found if not isinstance(tensor, nn.Parameter)]

    def _is_constant(self, value: Any) -> bool:
        """Whether it consists of tensors that stay."""
        tensors = tensors_in(value) if self.constants else []
        return bool(tensors) and all(any(tensor is one for one in self.constants) for _, tensor in tensors)

    def _enter(self, value: Any) -> None:
        if isinstance(value, (str, bytes, int, float, complex, type(None))) or id(value) in self._seen or len(self._seen) > _MOST_OBJECTS:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            self._enter_module(value)
        elif isinstance(value, Tensor):
            self._enter_tensor(value)
        elif isinstance(value, np.ndarray):
            self._enter_array(value)
        elif isinstance(value, (FunctionType, MethodType, partial)):
            self._enter_function(value)
        elif isinstance(value, (list, deque, set, dict, tuple)):
            self._enter_container(value)
        elif isinstance(value, type):
            self._code.append(value)
        elif is_cache(value):
            self.caches.append(value)
            self._undo.append(undo_cache(value))
            for part in (value.__wrapped__, *held_by(value)):
                self._enter(part)
        elif (undo := undo_value(value)) is not None:
            self._undo.append(undo)
        elif _is_of_user(value):
            self._enter_object(value)

    def _enter_tensor(self, tensor: Tensor) -> None:
        if type(tensor) not in (Tensor, nn.Parameter) or is_functorch_wrapped(tensor):
            return  # somebody's trace or transform left it, in what a hook keeps: it has no values
        if bytes_of(tensor) <= self._most_bytes or tensor.device.type == "meta":
            self._keep_tensor(tensor)
        elif not tensor.is_inference():
            self._large.append((tensor, tensor._version))

    def _enter_array(self, array: np.ndarray) -> None:
        if array.flags.writeable and array.nbytes <= self._most_bytes and not isinstance(array, np.memmap):
            self._undo.append(undo_array(array))
            if array.dtype == object and array.size <= _MOST_ITEMS:
                for item in array.flat:
                    self._enter(item)

    def _enter_object(self, value: Any) -> None:
        self._keep_attributes(getattr(value, "__dict__", {}))
        if slots_of(type(value)):
            self._keep_attributes(Slots(value))
        self._code.append(type(value))

    def _enter_module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            for buffer in module.buffers():
                self._enter(buffer)
            return
        self._keep_attributes(vars(module), OF_MODULES, stays=True)
        self._keep_attributes(buffers_of(module), stays=True)
        self._code.append(type(module))
        self._undo.append(undo_hooks(module))
        if self._parts:
            self._undo.append(undo_children(module))
        for hook in hooks_of(module):
            self._enter(hook)
        for child in module.children():
            self._enter(child)

    def _enter_class(self, owner: type) -> None:
        for part in owner.__mro__:
            if is_own_code(part) and (part is owner or id(part) not in self._seen):
                self._seen[id(part)] = part
                self._keep_attributes(ClassAttributes(part), stays=True)
                for function in functions_of(part):
                    self._enter(function)

    def _enter_code(self, function: FunctionType) -> None:
        """What a function of the user's keeps, and what it knows by global names."""
        self._keep_attributes(function.__dict__)
        for item in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._enter(item)
        known = names_in(function.__code__)
        self._keep_attributes(Names(function.__globals__, known), stays=True)
        if (environment := environment_of(function)) is not None:
            self._keep_attributes(environment)
        for name in known:
            value = function.__globals__.get(name)
            if isinstance(value, ModuleType) and id(value) not in self._seen and is_own_code(value):
                self._keep_attributes(Names(vars(value), known), stays=True)

    def _keep_attributes(self, attributes: MutableMapping[str, Any], ignored: frozenset[str] = frozenset(), stays: bool = False) -> None:
        before = {name: value for name, value in attributes.items() if name not in ignored}
        if not self._iterators:
            ignored = ignored.union(name for name, value in before.items() if is_iterator(value))
            before = {name: value for name, value in before.items() if name not in ignored}
        self._attributes.append(KeptAttributes(attributes, before, ignored, stays))
        for name, value in before.items():
            if is_iterator(value):
                attributes[name] = recording = RecordingIterator(value)
                self._undo.append(partial(put_back, attributes, name, recording))
            else:
                self._enter(value)

    def _enter_container(self, value: Any) -> None:
        if not isinstance(value, tuple):
            self._undo.append(undo_contents(value, self._is_constant))
            self._containers.append((value, list(value.values() if isinstance(value, dict) else value)))
        if len(value) <= _MOST_ITEMS:
            for item in list(value.values()) if isinstance(value, dict) else list(value):
                self._enter(item)
        if _is_of_user(value):
            self._keep_attributes(vars(value))

    def _enter_function(self, function: Any) -> None:
        if isinstance(function, partial):
            for item in (function.func, *function.args, *function.keywords.values()):
                self._enter(item)
        elif isinstance(function, MethodType):
            if not of_a_library(function.__func__):
                self._enter(function.__self__)
        elif not of_a_library(function):
            for cell in cells_of(function):
                self._keep_cell(cell)
            if is_own_code(function):
                self._code.append(function)

    def _keep_cell(self, cell: CellType) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # it is empty
            return
        self._undo.append(partial(setattr, cell, "cell_contents", value))
        self._enter(value)

    def _keep_tensor(self, tensor: Tensor, device: str | None = None) -> None:
        if tensor.is_meta or tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            return
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # the first turns gradients on again
            self._tensors.append((tensor, tensor.detach().to(device or tensor.device, copy=True)))


def _is_of_user(value: Any) -> bool:
    """Whether an object may keep something: it is of a class of the user's own, or has no other use than that."""
    if isinstance(value, (SimpleNamespace, threading.local)):
        return True
    holds = isinstance(getattr(value, "__dict__", None), dict) or bool(slots_of(type(value)))
    return holds and not isinstance(value, (type, ModuleType, Dataset, Sampler, DataLoader)) and not of_a_library(type(value))
