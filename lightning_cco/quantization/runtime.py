"""Each torch call of a hooked model: found in the plan, fake-quantized, or given to what the thread does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting

from lightning_cco.compat.autograd import graph_task
from lightning_cco.compat.dynamo import traced_line
from lightning_cco.graph.call_node import ModuleCall
from lightning_cco.graph.captured import Capture
from lightning_cco.graph.compiled import eager
from lightning_cco.graph.frames import Frames
from lightning_cco.graph.loop_calls import number_of
from lightning_cco.graph.operator_calls import OTHER_NAMES
from lightning_cco.graph.python_calls import calling_position
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.bias_correction import BiasCorrection
from lightning_cco.quantization.call_arguments import renormalized
from lightning_cco.quantization.capture_mismatches import COMPUTES, CaptureMismatches
from lightning_cco.quantization.measured_calls import (
    OutputRecorder,
    correct,
    delegate,
    measure_local,
    observe,
    record_float,
    record_quantized,
)
from lightning_cco.quantization.phases import Phase
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.rounded_calls import with_inputs, with_outputs
from lightning_cco.quantization.runtime_contexts import Blocks
from lightning_cco.quantization.sites import FunctionEntry, SiteQuantizers, fill_tables, unwatched_modules
from lightning_cco.quantization.small_tensors import has_small_gradient
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.tracing import runs_plainly
from lightning_cco.quantization.weight_quantizer import WeightQuantizer

_WATCHED = COMPUTES | OTHER_NAMES | {"multi_head_attention_forward"}

PlannedCall = Callable[..., Any]
"""What is done at a planned call: takes its frame, its quantizers, its function, arguments and keyword arguments; gives its result."""


class Runtime:
    """Hooks a model and quantizes it as planned.

    Args:
        model: The model; it is hooked, never changed.
        capture: Where its layers are.
        plan: What to do with them.
        activations: Quantizer of each planned tensor, by `TensorSpec.key`.
        weights: Quantizers of each layer's weights, by layer name, in the order of `CallSite.weights`.

    Attributes:
        phase: What is done at each planned call, outside of the blocks of `doing`.
        mismatches: Where the model differs from the captured one.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: Capture,
        plan: QuantizationPlan,
        activations: Mapping[TensorKey, ActivationQuantizer],
        weights: Mapping[str, list[WeightQuantizer]],
    ) -> None:
        self.capture = capture
        self.frames = Frames(model, capture.root, self._handle)
        self.frames.watched = _WATCHED
        self.frames.partly_apart = capture.partly_apart
        self.mismatches = CaptureMismatches(model, capture.root, capture.apart)
        self._blocks = Blocks()
        self.phase = Phase.QUANTIZE
        self.frames.carried = self._carried
        self.frames.confused = self.mismatches.confused
        self.frames.opens, self.frames.passes = self._opens, self._passes
        # Whether ranges follow forwards that record gradients, and the number of the calibration batch.
        self.following = True
        self.batch = 0
        self.load(plan, activations, weights, {})

    def load(
        self,
        plan: QuantizationPlan,
        activations: Mapping[TensorKey, ActivationQuantizer],
        weights: Mapping[str, list[WeightQuantizer]],
        corrections: Mapping[str, BiasCorrection],
    ) -> None:
        """Fill the tables of every call node from a plan. Code compiled for another plan must be dropped by the caller."""
        fill_tables(self.capture, plan, activations, weights, corrections)
        self._unwatched = unwatched_modules(self.capture, self.frames.model)
        self._follow()

    def forward_starts(self) -> None:
        """Before a forward: what is still followed of those before is not what somebody keeps for a log."""
        if self.frames.handle == self._following:  # something is followed, and no other handler sees every call
            self.mismatches.followed.forget_numbers()
            self._follow()

    def _following(self, frame: ModuleCall, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The handler in the place of `_handle` as long as something is followed."""
        if is_compiling():
            return self._handle(frame, name, func, args, kwargs)
        entry = frame.table.get(name)
        index = 0 if entry is None else _number(frame, entry)
        if entry is not None and index in entry.layers:
            self.mismatches.read_by_a_layer(args, kwargs)
        result = self._handle(frame, name, func, args, kwargs)
        self.mismatches.followed.passed_on(name, args, kwargs, result)
        return result

    def _handle(self, frame: ModuleCall, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = frame.table.get(name)
        if entry is None:
            return self._unseen(frame, name, func, args, kwargs) if name in COMPUTES else func(*args, **kwargs)
        counts, kind = frame.counts, entry.kind
        index = counts.get(kind, 0)
        if entry.onward is not None:
            number = _number(frame, entry)
            if number is None:
                return self._not_captured(frame, name, entry.sites.get(index), func, args, kwargs)
            index = number
        counts[kind] = index + 1
        site = entry.sites.get(index)
        if site is None:
            return self._unseen(frame, name, func, args, kwargs) if index not in entry.known else func(*args, **kwargs)
        return (self.run if self._blocks.open else self._run)(frame, site, func, args, kwargs)

    def _not_captured(
        self,
        frame: ModuleCall,
        name: str,
        instead_of: SiteQuantizers | None,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a call that is none of those that the capture saw; it is not counted."""
        entry = frame.table[name]
        if is_dynamo_compiling():
            of_no_layer = traced_line() in frame.node.idle_lines.get(entry.kind, ())
            return func(*args, **kwargs) if of_no_layer else self._unseen(frame, name, func, args, kwargs)
        place = calling_position()
        if instead_of is None or place in entry.known.values() or place in frame.node.idle.get(entry.kind, ()):
            return self._unseen(frame, name, func, args, kwargs)
        self.mismatches.moved(frame, name, instead_of)
        return func(*args, **kwargs)

    def _unseen(self, frame: ModuleCall, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self.mismatches.unseen(frame, name, args, kwargs)
        result = func(*args, **kwargs)
        if place:
            self.mismatches.followed.start(place, result)
            self._follow()
        return result

    def _follow(self) -> None:
        """See every call, in every module, as long as something is followed."""
        follows = bool(self.mismatches.followed)
        if self.frames.handle in (self._handle, self._following):
            self.frames.handle = self._following if follows else self._handle
        self.frames.watched = None if follows else _WATCHED
        self.frames.unwatched = frozenset() if follows else self._unwatched

    @property
    def phase(self) -> Phase:
        """What is done at each planned call."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase, self._run = phase, self._strategy(phase)

    @property
    def run(self) -> PlannedCall:
        """What this thread or task does at a planned call."""
        run: PlannedCall = self._blocks.innermost(self._run)
        return run

    def _strategy(self, phase: Phase, recorder: OutputRecorder | None = None, only: frozenset[int] | None = None) -> PlannedCall:
        if phase is Phase.QUANTIZE:
            return self._quantize
        if phase is Phase.PASS:
            return _call
        if phase is Phase.OBSERVE:
            return partial(observe, lambda: self.batch, only)
        assert recorder is not None
        recorded: dict[Phase, PlannedCall] = {
            Phase.MEASURE_LOCAL: partial(measure_local, recorder),
            Phase.RECORD_FLOAT: partial(record_float, recorder),
            Phase.RECORD_QUANTIZED: partial(record_quantized, recorder, self._quantize),
            Phase.CORRECT: partial(correct, recorder, self._quantize),
            Phase.DELEGATE: partial(delegate, recorder),
        }
        return recorded[phase]

    def _quantize(
        self, frame: ModuleCall, site: SiteQuantizers, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Activation checkpointing runs a part of the forward again inside the backward; the ranges have moved for this batch already.
        # An exported program would hold the ranges as constants that it writes to, which neither its decomposition nor an ONNX exporter takes.
        track = frame.records and self.following and (not is_exporting() if is_compiling() else graph_task() == -1)
        if site.renormalizes:
            args, kwargs = renormalized(args, kwargs)
        if site.weights or site.reads:
            func, args, kwargs = with_inputs(site, func, args, kwargs, track)
        if not site.outputs:
            return func(*args, **kwargs)
        if site.limits is not None:
            clamp = site.limits(args, kwargs)
            if clamp is not None:
                return site.outputs[0][1](args[0] if args else kwargs["input"], clamp=clamp, inplace=site.in_place, track=track)
        if site.in_place:
            # The caller may drop the result and go on with the argument: both must be the quantized tensor. The operation runs on a copy because
            # autograd may keep its result, which must then not change.
            target = args[0]
            changed = target.clone()
            func(changed, *args[1:], **kwargs)
            return target.copy_(site.outputs[0][1](changed, track=track))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            fresh = site.fresh or (site.fresh_without_gradients and not torch.is_grad_enabled())
            if not fresh or is_compiling() or has_small_gradient(result) or not runs_plainly():
                return site.outputs[0][1](result, track=track)
            # Nothing else refers to a fresh result, and new memory would cost more than the rounding. A linear layer's is a view of its rows.
            base = result._base if result._is_view() else result
            if base is None or base.numel() != result.numel():
                return site.outputs[0][1](result, track=track)
            rounded = site.outputs[0][1](base, inplace=True, track=track)
            return rounded if base is result else rounded.view(result.shape)
        return with_outputs(result, site.outputs, track)

    @contextmanager
    def doing(
        self, phase: Phase, recorder: OutputRecorder | None = None, only: Iterable[ActivationQuantizer] | None = None
    ) -> Iterator[None]:
        """Let this thread or asynchronous task do something else than the phase inside the block; others go on as before.

        Compiled code runs eagerly meanwhile, since what a graph does can't depend on the thread.

        Args:
            phase: What to do.
            recorder: For the phases that measure or record.
            only: Quantizers that observe; `None`: all.
        """
        run = self._strategy(phase, recorder, None if only is None else frozenset(map(id, only)))
        with self._in_block(run), self.frames.restored():
            yield

    @contextmanager
    def _in_block(self, block: PlannedCall) -> Iterator[None]:
        with eager(), self._blocks.within(block):
            yield

    def _passes(self) -> bool:
        return self.run is _call

    def _opens(self, frame: ModuleCall) -> bool:
        """Whether anything is done with what a call hides. If not, it computes as in the float model, where scores are scaled in another order."""
        if is_compiling():
            return True
        return not self._passes() and any(entry.sites for entry in frame.table.values())

    def _carried(self) -> Callable[[], AbstractContextManager[None]]:
        """A recomputation does what its forward did, whenever and in whatever thread it runs."""
        block = self._blocks.innermost(None) if self._blocks.open else None
        return nullcontext if block is None else partial(self._in_block, block)


def _call(_: ModuleCall, site: SiteQuantizers, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _number(frame: ModuleCall, entry: FunctionEntry) -> int | None:
    """Which of the captured calls of an operation the one that runs is; `None` if it is none of them."""
    index = frame.counts.get(entry.kind, 0)
    if entry.onward is None:
        return index
    if is_dynamo_compiling():
        line = traced_line() if entry.lines else ""
        return number_of(entry.lines, entry.onward_lines, index, line) if line else index
    if entry.known.get(index) == -1:
        return index
    return number_of(entry.known, entry.onward, index, calling_position())
