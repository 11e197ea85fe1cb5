"""What the student's network was given and gave in the steps that are not yet learned from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_cco.distillation.plain_state import PlainState
from lightning_cco.errors import CCOError
from lightning_cco.graph.call_node import ModuleCall
from lightning_cco.graph.containers import tensors_held
from lightning_cco.graph.frames import Frames
from lightning_cco.random_numbers import RandomState

Way = tuple[Any, ...]
"""Where a tensor is in a result."""


@dataclass
class CallOfStudent:
    """One call of a module from outside of any other.

    Attributes:
        path: Path of the module; empty for the root.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        versions: How often each tensor among them had been written to; empty in compiled code.
        output: What it gave.
        output_versions: The same for the tensors that it gave.
        layers: What the layers in it gave, with their modules' paths, in order.
        random: The random states that it began with; `None` in compiled code.
        plain: What the student's modules held then beside their tensors; empty in compiled code.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int] = field(default_factory=list)
    output: Any = None
    output_versions: list[int] = field(default_factory=list)
    layers: list[tuple[str, Tensor]] = field(default_factory=list)
    random: RandomState | None = None
    plain: list[Any] = field(default_factory=list)


class StudentRecorder:
    """Looks on while the student's forwards run.

    Args:
        frames: The student's frames.
        paths: Paths of the modules in which something is captured, and of those around them.
        layers: Paths of the modules whose outputs are kept.
        plain: What student and teacher hold beside tensors.
        device: The student's.

    Attributes:
        on: Whether forwards are those of training steps.
        calls: What was seen.
    """

    def __init__(self, frames: Frames, paths: Collection[str], layers: Collection[str], plain: PlainState, device: torch.device) -> None:
        self.frames = frames
        self.plain = plain
        self._device = device
        self.on = False
        self.teaching = False
        self.calls: list[CallOfStudent] = []
        self._paths = frozenset(paths)
        self._layers = frozenset(layers)
        self._open: list[CallOfStudent] = []
        frames.entered, frames.left = self._entered, self._left

    def detach(self) -> None:
        """Look no more."""
        self.on = False
        self.clear()
        self.frames.entered = self.frames.left = None

    def clear(self) -> None:
        """Forget what was seen."""
        self.calls.clear()
        self._open.clear()

    def take(self) -> list[CallOfStudent]:
        """What was seen since the last time."""
        taken = list(self.calls)
        self.clear()
        return taken

    def _entered(self, frame: ModuleCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.teaching and not is_compiling():
            raise CCOError(
                f"distillation_settings: the teacher, a copy of the model, calls module '{frame.node.path}' of the model itself: something that is no "
                "module, such as a function or an object with a reference to it, was not copied. Reach modules through attributes of modules."
            )
        if not self.on or not frame.records or len(self.frames.stack()) != 1 or frame.node.path not in self._paths:
            return
        call = CallOfStudent(frame.node.path, args, dict(kwargs))
        if not is_compiling():
            call.versions = versions_of((args, kwargs))
            call.random, call.plain = RandomState(self._device), self.plain.of_student()
        self._open.clear()
        self._open.append(call)

    def _left(self, frame: ModuleCall, output: Any) -> None:
        if not self.on or not self._open:
            return
        if frame.node.path in self._layers and isinstance(output, Tensor):
            self._open[0].layers.append((frame.node.path, output))
        if len(self.frames.stack()) == 1:
            call = self._open.pop()
            if output is None:
                return
            call.output = output
            if not is_compiling():
                call.output_versions = versions_of(output)
            self.calls.append(call)


def versions_of(value: Any) -> list[int]:
    """How often each tensor in a value has been written to."""
    return [0 if tensor.is_inference() else tensor._version for _, tensor in tensors_held(value)]


def differentiable(output: Any) -> dict[Way, Tensor]:
    """The tensors in an output that are trained: floats that are more than one number and depend on parameters."""
    return {
        way: tensor
        for way, tensor in tensors_held(output)
        if tensor.requires_grad and tensor.dim() > 0 and (tensor.is_floating_point() or tensor.is_complex())
    }
