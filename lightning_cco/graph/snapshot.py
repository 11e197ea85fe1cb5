"""A snapshot of all that running a model may write to in it, restored afterwards: a look at a model must not count as a step of it.

A forward or a step may append to lists, count, move a queue, average a copy of the network, or draw from a generator of its own. What was run only to
capture, to calibrate or to measure must leave none of that, or the training goes on from something else than the float run does.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_cco.compat.modules import CONTENTS, OF_MODULES, buffers_of, cells_of, hooks_of
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.replayed_iterators import RecordingIterator, is_iterator
from lightning_cco.graph.undo import is_same, restore, undo_array, undo_contents, undo_generator

_NOT_ENTERED = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_cco", "torchvision", "torchaudio"}) | (
    sys.stdlib_module_names - {"collections"}
)
"""Packages whose objects hold no state of the user's."""
_MOST_ITEMS, _MOST_OBJECTS = 10_000, 50_000
_LARGE = 1 << 28
"""Bytes of a tensor or an array beyond which it is not copied: then it is data rather than something that steps write to."""
_MISSING = object()
_ACTIVE: ContextVar[tuple[Snapshot, ...]] = ContextVar("_ACTIVE", default=())


@dataclass
class _Attributes:
    """The attributes of an object now, and before; some of them are not looked at."""

    now: dict[str, Any]
    before: dict[str, Any]
    ignored: frozenset[str]
    of_module: bool

    @property
    def new(self) -> list[str]:
        return [name for name in self.now if name not in self.before and name not in self.ignored]


class Snapshot:
    """All that a forward may write to in a model: buffers, attributes of its modules, what is in them, generators of random numbers.

    A context manager, which restores it in the end.

    Lists, dictionaries, sets, arrays and tensors get their contents back, not only attributes their objects. Objects of the user's own classes and what the
    user's hooks refer to are entered; those of libraries and data sets are not.

    Args:
        model: The model, as it is now.
        parameters: Whether to keep the values of the parameters, too; see `keep_parameters`.
        others: Further objects, of which those of the user's own classes are kept, too.

    Attributes:
        stay: Attributes that stay as they are when the block ends; see `appeared`.
        constants: Tensors that stay where a forward has put them in place of nothing.
    """

    def __init__(self, model: nn.Module, parameters: bool = False, others: Iterable[Any] = ()) -> None:
        self.model = model
        self.stay: frozenset[tuple[int, str]] = frozenset()
        self.constants: Sequence[Tensor] = ()
        self._parameters = False
        self._undo: list[Callable[[], None]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._attributes: list[_Attributes] = []
        self._large: list[tuple[Tensor, int]] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._seen: dict[int, Any] = {}
        with torch.DisableTorchFunction(), torch.no_grad():
            self._seen.update((id(parameter), parameter) for parameter in model.parameters())
            self._enter(model)
            for other in others:
                self._enter(other)
        if parameters:
            self.keep_parameters()

    def __enter__(self) -> Snapshot:
        _ACTIVE.set((*_ACTIVE.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _ACTIVE.set(tuple(kept for kept in _ACTIVE.get() if kept is not self))
        self._restore()

    @staticmethod
    def around(model: nn.Module) -> Snapshot | None:
        """What has been kept of a model by the innermost block around this."""
        return next((kept for kept in reversed(_ACTIVE.get()) if kept.model is model), None)

    def keep_parameters(self) -> None:
        """Keep the values of the parameters, too, as they are now, on the CPU: a step may write to them."""
        if not self._parameters:
            self._parameters = True
            with torch.DisableTorchFunction(), torch.no_grad():
                for parameter in self.model.parameters():
                    self._keep_tensor(parameter, "cpu")

    def _restore(self) -> None:
        but = self.stay
        with torch.DisableTorchFunction(), torch.no_grad():
            for part in self._attributes:
                for name in part.new:
                    if (id(part.now), name) not in but and not self._is_constant(part.now[name]):
                        del part.now[name]
                parts = {name for kind in CONTENTS for name in part.now.get(kind, ())} if part.of_module else set()
                for name, value in part.before.items():
                    if name in parts:
                        continue  # a module or a parameter that the forward has made stays: it is hooked
                    if part.now.get(name, _MISSING) is value or (id(part.now), name) in but:
                        continue
                    if value is not None or not self._is_constant(part.now.get(name)):
                        part.now[name] = value
            for undo in self._undo:
                undo()
            for tensor, value in self._tensors:
                restore(tensor, value)
        written = [tuple(tensor.shape) for tensor, version in self._large if tensor._version != version]
        if written:
            warnings.warn(
                f"{type(self.model).__name__}: a forward that only looked at the layers has written to tensors too large for a copy, of shapes {written}: "
                "what it wrote stays. If that matters, let steps write to them only while self.trainer.training.",
                CCOWarning,
                stacklevel=2,
            )

    def appeared(self) -> dict[tuple[int, str], Any]:
        """Attributes of modules that were `None`, or not there, and now are something, by where they are."""
        return {
            (id(part.now), name): part.now[name]
            for part in self._attributes
            if part.of_module
            for name in (*part.new, *(name for name, value in part.before.items() if value is None))
            if part.now.get(name) is not None
        }

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
            if value.nbytes <= _LARGE or value.device.type == "meta":
                self._keep_tensor(value)
            elif not value.is_inference():
                self._large.append((value, value._version))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.nbytes <= _LARGE and not isinstance(value, np.memmap):
                self._undo.append(undo_array(value))
        elif isinstance(value, (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)):
            self._undo.append(undo_generator(value))
        elif isinstance(value, (FunctionType, MethodType, partial)):
            self._enter_function(value)
        elif isinstance(value, (list, deque, set, dict, tuple)):
            self._enter_container(value)
        elif _is_of_user(value):
            self._keep_attributes(vars(value))

    def _enter_module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            for buffer in module.buffers():
                self._enter(buffer)
            return
        self._keep_attributes(vars(module), OF_MODULES, of_module=True)
        self._keep_attributes(buffers_of(module), of_module=True)
        for hook in hooks_of(module):
            self._enter(hook)
        for child in module.children():
            self._enter(child)

    def _keep_attributes(self, attributes: dict[str, Any], ignored: frozenset[str] = frozenset(), of_module: bool = False) -> None:
        before = {name: value for name, value in attributes.items() if name not in ignored}
        self._attributes.append(_Attributes(attributes, before, ignored, of_module))
        for name, value in before.items():
            if is_iterator(value):
                attributes[name] = recording = RecordingIterator(value)
                self._undo.append(partial(_replay, attributes, name, recording))
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
            if not _of_a_library(function.__func__):
                self._enter(function.__self__)
        elif not _of_a_library(function):
            for cell in cells_of(function):
                self._keep_cell(cell)

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


def _replay(attributes: dict[str, Any], name: str, recording: RecordingIterator) -> None:
    attributes[name] = recording.rest()


def _of_a_library(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _NOT_ENTERED


def _is_of_user(value: Any) -> bool:
    """Whether an object is of a class of the user's own, which may keep something."""
    if isinstance(value, (type, Dataset, Sampler, DataLoader)) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    return not _of_a_library(type(value))
