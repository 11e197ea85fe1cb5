"""One step compared: the teacher sees what the student saw, and what it gives is compared with what the student gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection  # type: ignore[attr-defined]
from torch import Tensor, nn

from lightning_cco.distillation.autograd_graph import LossGraph, Use, ends_among
from lightning_cco.distillation.recorder import CallOfStudent, StudentRecorder, Way, differentiable, versions_of
from lightning_cco.distillation.terms import binary_divergence, class_divergence, relative_error, squared_error
from lightning_cco.errors import CCOError
from lightning_cco.graph.containers import tensors_held
from lightning_cco.names import printable
from lightning_cco.sections import DistillationSettings

Key = tuple[int, Way]
"""Number of a call in a step, and where in its result."""


class StepComparison:
    """What a teacher says of the student's calls in one step. Random numbers are drawn from here on by whoever calls: run it where they are put back.

    Args:
        teacher: The float model.
        recorder: Who saw the calls; it looks out for the teacher meanwhile.
        calls: The student's calls.
        layers: Whether what layers give is kept.
        needs_gradients: Whether the model differentiates inside of its forward.
        twins: The teacher's parameters and buffers by the identity of the student's.
    """

    def __init__(
        self,
        teacher: nn.Module,
        recorder: StudentRecorder,
        calls: Sequence[CallOfStudent],
        layers: bool,
        needs_gradients: bool,
        twins: Mapping[int, Tensor],
    ) -> None:
        self.calls = calls
        self.outputs: list[Any] = []
        self.layers: list[list[tuple[str, Tensor]]] = []
        self._keep_layers = layers
        known = dict(twins)
        recorder.teaching = True
        try:
            with torch.set_grad_enabled(needs_gradients):
                for call in calls:
                    self._run(teacher, recorder, call, known)
        finally:
            recorder.teaching = False

    def _run(self, teacher: nn.Module, recorder: StudentRecorder, call: CallOfStudent, known: dict[int, Tensor]) -> None:
        what = call.path or "the model"
        if call.versions and call.versions != versions_of((call.args, call.kwargs)):
            raise CCOError(
                f"distillation_settings: '{what}' writes to its own input, so the teacher can't be shown the same. Use an operation that is not in place first."
            )

        def same(tensor: Tensor) -> Tensor:
            if id(tensor) in known:
                return known[id(tensor)]
            if tensor.grad_fn is not None:
                raise CCOError(
                    f"distillation_settings: '{what}' reads a tensor of shape {tuple(tensor.shape)} that the step itself computes from what it trains, outside "
                    "of any module, so the teacher can't follow. Write a forward that calls all of the network, and call that in the step."
                )
            return tensor.detach().requires_grad_(tensor.requires_grad and torch.is_grad_enabled())

        args, kwargs = apply_to_collection((call.args, call.kwargs), Tensor, same)
        module = teacher.get_submodule(call.path)
        recorder.plain.give_teacher(call.plain)
        if call.random is not None:
            call.random.restore()
        with self._kept(teacher, call) as layers:
            output = module(*args, **kwargs)
        self.outputs.append(output)
        self.layers.append(layers)
        theirs = dict(tensors_held(output))
        for way, tensor in tensors_held(call.output):
            if way in theirs and theirs[way].shape == tensor.shape:
                known[id(tensor)] = theirs[way].detach()

    @contextmanager
    def _kept(self, teacher: nn.Module, call: CallOfStudent) -> Iterator[list[tuple[str, Tensor]]]:
        kept: list[tuple[str, Tensor]] = []
        if not self._keep_layers:
            yield kept
            return
        handles = []
        for path in dict.fromkeys(path for path, _ in call.layers):

            def keep(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                kept.append((path, output))

            handles.append(teacher.get_submodule(path).register_forward_hook(keep))
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tells steps of one kind from others: which modules were called, and what they gave."""
        return tuple((call.path, tuple(differentiable(call.output))) for call in self.calls)

    def candidates(self) -> dict[Key, Tensor]:
        """The outputs of the student that can be compared.

        Raises:
            CCOError: There are none, or the teacher has none of their names and shapes, or the step writes to one.
        """
        found = {(number, way): tensor for number, call in enumerate(self.calls) for way, tensor in differentiable(call.output).items()}
        if not found:
            raise CCOError(
                "distillation_settings: no output to compare with the teacher's: expected tensors of floats that depend on parameters, got of "
                f"{self.names} "
                f"{', '.join(printable(type(call.output).__name__) for call in self.calls)} without any. Return the logits, or write on: layers."
            )
        for call in self.calls:
            if call.output_versions and call.output_versions != versions_of(call.output):
                raise CCOError(
                    f"distillation_settings: the step writes to what '{call.path or 'the model'}' gave, so it can't be compared with the teacher's. "
                    "Use an operation that is not in place."
                )
        if not any(self._has(key) for key in found):
            self.pair(next(iter(found)))
        return found

    def _has(self, key: Key) -> bool:
        mine, theirs = self._both(key)
        return mine is not None and theirs is not None and mine.shape == theirs.shape

    def _both(self, key: Key) -> tuple[Tensor | None, Tensor | None]:
        number, way = key
        mine, theirs = (dict(tensors_held(output)).get(way) for output in (self.calls[number].output, self.outputs[number]))
        return mine, theirs

    def pair(self, key: Key) -> tuple[Tensor, Tensor]:
        """An output of the student, and the teacher's.

        Raises:
            CCOError: The teacher's is missing or has another shape.
        """
        mine, theirs = self._both(key)
        if mine is None or theirs is None or theirs.shape != mine.shape:
            came = "no such output" if theirs is None else f"the shape {tuple(theirs.shape)}"
            raise CCOError(
                f"distillation_settings: {self.name_of(key)} has {'no tensor' if mine is None else f'the shape {tuple(mine.shape)}'} in training, and of the "
                f"teacher, which runs in evaluation mode, {came}: expected the same outputs in both modes. Return "
                "them from both, or write on: layers."
            )
        return mine, theirs.detach()

    def layer_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What the layers of student and teacher gave, by their modules' paths and which call it is.

        Raises:
            CCOError: There are none, or those of the teacher are others.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for number, (call, theirs) in enumerate(zip(self.calls, self.layers, strict=True)):
            if [path for path, _ in call.layers] != [path for path, _ in theirs]:
                raise CCOError(
                    f"distillation_settings.on: layers: in training the layers {[path for path, _ in call.layers]} ran, but of the teacher, which runs in "
                    f"evaluation mode, {[path for path, _ in theirs]}. Write on: outputs."
                )
            for position, ((path, mine), (_, wanted)) in enumerate(zip(call.layers, theirs, strict=True)):
                if mine.requires_grad and mine.shape == wanted.shape:
                    found[f"{path}#{number}.{position}"] = mine, wanted.detach()
        if not found:
            raise CCOError(
                "distillation_settings.on: layers: no layer with integer weights gives a tensor that gradients go through (torch.utils.checkpoint with "
                "use_reentrant=True hides them). Write on: outputs."
            )
        return found

    @property
    def names(self) -> str:
        """The modules that were called."""
        return ", ".join(f"'{call.path}'" if call.path else "the model" for call in self.calls)

    def name_of(self, key: Key) -> str:
        """An output in words."""
        number, way = key
        where = "".join(f"[{part!r}]" for part in way)
        return printable(f"output{where} of {self.calls[number].path or 'the model'}", 160)


def uses_of(loss: Tensor, comparison: StepComparison, settings: DistillationSettings) -> dict[Key, Use]:
    """How each output is compared.

    Raises:
        CCOError: ``auto`` can't tell, since all is compiled; or the step writes to an output.
    """
    outputs, graph = comparison.candidates(), LossGraph(loss)
    found: dict[Key, Use] = {}
    for key in graph.read_by_loss(outputs) or ends_among(outputs):
        student, _ = comparison.pair(key)
        if settings.loss == "auto" and graph.is_compiled(student):
            raise CCOError(
                f"distillation_settings.loss: auto can't tell how the compiled step's loss takes {comparison.name_of(key)}. Write loss: kl for logits, mse for "
                "anything else."
            )
        use = Use("values") if settings.loss == "mse" else graph.use_of(student)
        if settings.loss == "kl" and use.kind == "values":
            dim = 1 if student.dim() > 3 else student.dim() - 1
            use = Use("questions") if student.dim() == 1 or student.shape[dim] == 1 else Use("classes", dim)
        found[key] = use
    return found


def outputs_term(comparison: StepComparison, uses: Mapping[Key, Use], temperature: float) -> Tensor:
    """Mean over the outputs of how far the student is from the teacher."""
    terms = []
    for key, use in uses.items():
        student, teacher = comparison.pair(key)
        if use.kind == "classes":
            terms.append(class_divergence(student, teacher, use.dim, temperature))
        elif use.kind == "questions":
            terms.append(binary_divergence(student, teacher, temperature))
        else:
            terms.append(squared_error(student, teacher))
    return torch.stack(terms).mean()


def layers_term(comparison: StepComparison) -> Tensor:
    """Mean over the layers of their relative error."""
    return torch.stack([relative_error(student, teacher) for student, teacher in comparison.layer_pairs().values()]).mean()
