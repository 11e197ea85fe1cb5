"""Writes a model as a `torch.export` program (``.pt2``): fake-quantized, or with quantized operators (PT2E)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.export.batch_check import check_program_batch, program_agrees, shapes_in
from lightning_cco.export.check_limits import judge
from lightning_cco.export.deployed_forward import Deployed, deployed_forward
from lightning_cco.export.destination import export_target
from lightning_cco.export.dynamic_axes import Axes, ways_to_vary
from lightning_cco.export.dynamic_sizes import batch_fixed_since
from lightning_cco.export.engines import PROGRAMS, FileFeature
from lightning_cco.export.errors import BatchDoesNotVary, ExportError, SizesDoNotVary
from lightning_cco.export.failures import need_packages, need_writable_names, untraceable
from lightning_cco.export.feeds import call_of
from lightning_cco.export.named_axes import bounds_of, check_named_axes
from lightning_cco.export.outputs import arrays_of
from lightning_cco.export.precision import in_float32
from lightning_cco.export.pt2e_check import Comparison, RecordedProgram, format_faults
from lightning_cco.export.pt2e_writer import WrittenProgram, write_program
from lightning_cco.export.report import ExportReport
from lightning_cco.export.step_network import StepNetwork
from lightning_cco.export.trace_attempts import first_traced
from lightning_cco.export.tracing import traced_program
from lightning_cco.files import temporary_folder
from lightning_cco.graph.compiled import eager
from lightning_cco.graph.containers import tensors_in
from lightning_cco.quantization.model import HookedModel


def export_program(
    quantized: HookedModel,
    path: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool | None = None,
    dynamic_shapes: Any = None,
    network: StepNetwork | None = None,
    pt2e: bool | None = None,
    batches: Iterable[Any] = (),
    check: bool = True,
    **options: Any,
) -> torch.export.ExportedProgram:
    """Write a ``.pt2`` file; ``torch.export.load(path).module()`` runs it anywhere.

    It computes what the fake-quantized model computes, in one of two forms. With fake-quantization, floats alone. Or with quantized operators
    (PT2E: integer weights, ``quantized_decomposed.quantize_per_tensor`` and ``dequantize_per_tensor`` where the plan has them), which compilers and engines
    make INT8 operators of; then ``import torch.ao.quantization.fx._decomposed`` comes before loading it.

    Args:
        quantized: The calibrated model.
        path: Where to write.
        example_args: Positional arguments of one forward.
        example_kwargs: Keyword arguments of it.
        dynamic_batch: Make the first axis of every input dynamic. `None`: if the model allows it; else a warning says so.
        dynamic_shapes: The dynamic axes instead of these: axis → ``Dim`` or name, by argument, as in `torch.export`.
        network: The part of a training step to export instead of the model's ``forward``; the example is then for it (`network_of_the_step`).
        pt2e: Whether it has quantized operators. `None`: if ``target_framework`` is an engine that reads such programs.
        batches: Batches to check a program with quantized operators on; by default the example.
        check: Run it, at another size of the batch as well, and, with quantized operators, compare it layer by layer with the fake-quantized model.
        **options: There are no others; what only an ONNX file has is refused by name.

    Raises:
        CCOError: An option is not one of these, the model was never calibrated, can't be traced, the path can't be written, or the check fails.
    """
    need_packages(("torch",))
    if options:
        raise ExportError(
            "a .pt2 file takes the options dynamic_batch, dynamic_shapes, pt2e, batches and check; "
            f"got {sorted(options)}. Leave them out, or export an .onnx file."
        )
    args, kwargs = example_of(quantized, example_args, example_kwargs)
    need_writable_names(name for layer in quantized.graph for name in (layer.path, *layer.parameters))
    target = export_target(path, ".pt2")
    if pt2e is None:
        pt2e = quantized.settings.deployment_settings.target_framework in PROGRAMS

    def made(dynamic_batch: bool) -> torch.export.ExportedProgram:
        if pt2e:
            return _with_operators(quantized, (args, kwargs), dynamic_batch, dynamic_shapes, network, batches, check, str(path))
        return _fake_quantized(quantized, args, kwargs, dynamic_batch, dynamic_shapes, network, check)

    try:
        program = made(dynamic_batch is not False)
    except BatchDoesNotVary as error:
        if dynamic_batch is not None or dynamic_shapes is not None:
            raise
        try:
            program = made(False)
        except CCOError:
            raise error from error.__cause__
        tensors = [tensor for _, tensor in tensors_in([args, kwargs])]
        warnings.warn(f"export: {batch_fixed_since(tensors, error)}.", CCOWarning, stacklevel=3)
    _give_storage(program)
    with written(target) as temporary:
        torch.export.save(program, temporary)
    return program


def _give_parameters(program: torch.export.ExportedProgram) -> None:
    """Let it have floats of its own: the model's are of another type after the export, and its integers stay when the model trains on."""
    own: dict[int, Tensor] = {}
    for name, tensor in program.state_dict.items():
        if id(tensor) not in own:
            copied = tensor.detach().clone()
            own[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
        program.state_dict[name] = own[id(tensor)]


def _give_storage(program: torch.export.ExportedProgram) -> None:
    """Let each constant that is a part of a larger memory have its own: PyTorch would write all of that memory, or warn that no tensor covers it."""
    for name, tensor in program.constants.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            continue
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            program.constants[name] = tensor.detach().clone(memory_format=torch.contiguous_format)


def example_of(quantized: HookedModel, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one forward, for a model that can be exported.

    Raises:
        CCOError: It was never calibrated, or there are none.
    """
    if not quantized.calibrated:
        raise ExportError("the model was never calibrated, so its activations have no ranges. Run fit, or call calibrate(batches) first.")
    if not len(args) and not kwargs:
        raise ExportError("an example is needed to trace the forward. Pass example_args=(tensor, ...) or example_kwargs={...}.")
    return tuple(args), dict(kwargs or {})


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """Where to write a file that takes its place whole.

    Raises:
        CCOError: It can't be written.
    """
    try:
        with temporary_folder(target.parent) as folder:
            yield folder / target.name
            os.replace(folder / target.name, target)
    except (OSError, RuntimeError) as error:
        raise ExportError(f"'{target}' can't be written: {error}. Give a path in a folder that can be.") from error


def _fake_quantized(
    quantized: HookedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_batch: bool,
    dynamic_shapes: Any,
    network: StepNetwork | None,
    check: bool,
) -> torch.export.ExportedProgram:
    with quantized.evaluating(), eager():
        deployed = deployed_forward(quantized, args, kwargs, [], network)  # of the types that the model has

        def trace(axes: Axes) -> torch.export.ExportedProgram:
            try:
                return _traced(deployed, network, axes)
            except Exception:
                quantized.runtime.frames.reset()
                raise

        attempts = ways_to_vary(deployed, dynamic_batch, {"dynamic_shapes": dynamic_shapes}, [])
        program, _ = first_traced(attempts, trace, lambda failure: untraceable(quantized.model, "", failure, quantized.graph))
        if check:
            _check_sizes(quantized, program, deployed, network, dynamic_shapes)
    return program


def _traced(deployed: Deployed, network: StepNetwork | None, axes: Axes) -> torch.export.ExportedProgram:
    """The model's own forward, with its own arguments, where the program is of that."""
    shapes: Any
    if network is None:
        args, kwargs = deployed.call(axes.tensors)
        shapes = deployed.nested(axes.specifications)
        return traced_program(deployed.model, args, kwargs, shapes)
    shapes = (tuple(axes.specifications),)
    return traced_program(deployed, axes.tensors, None, shapes)


def _check_sizes(
    quantized: HookedModel, program: torch.export.ExportedProgram, deployed: Deployed, network: StepNetwork | None, dynamic_shapes: Any
) -> None:
    """Run a program on other batches, and along the axes that were named at other sizes."""
    called = _called(deployed, network)
    check_program_batch(program, deployed, *called)
    if dynamic_shapes is not None:
        compare = partial(program_agrees, program, deployed, *called, kind=SizesDoNotVary)
        check_named_axes(quantized, deployed, deployed.example, deployed.names, shapes_in(program), bounds_of(program), compare)


def _called(deployed: Deployed, network: StepNetwork | None) -> tuple[Callable[[tuple[torch.Tensor, ...]], Any], bool]:
    """How a program is called with tensors, and whether it gives all that the model does."""
    return (deployed.call, True) if network is None else (lambda tensors: (tensors, {}), False)


def _with_operators(
    quantized: HookedModel,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic_batch: bool,
    dynamic_shapes: Any,
    network: StepNetwork | None,
    batches: Iterable[Any],
    check: bool,
    path: str,
) -> torch.export.ExportedProgram:
    with in_float32(quantized.model) as types, quantized.evaluating(), eager():
        deployed = deployed_forward(quantized, *call, types, network)
        ways = ways_to_vary(deployed, dynamic_batch, {"dynamic_shapes": dynamic_shapes}, [])
        found = write_program(quantized, deployed, ways, lambda axes: _traced(deployed, network, axes))
        _give_parameters(found.program)
        if check:
            calls = [tensors for batch in batches if (tensors := deployed.tensors(*call_of(batch))) is not None]
            report = ExportReport(path)
            report.widened = found.widened
            _compare(quantized, deployed, found, network, calls or [deployed.example], report)
            judge(report)
            _check_sizes(quantized, found.program, deployed, network, dynamic_shapes)
    return found.program


def _compare(
    quantized: HookedModel,
    deployed: Deployed,
    found: WrittenProgram,
    network: StepNetwork | None,
    calls: Sequence[tuple[torch.Tensor, ...]],
    report: ExportReport,
) -> None:
    program = RecordedProgram(found.program)
    comparison = Comparison(quantized, found.emitter, program.rounded, deployed.outputs)
    arguments, whole = _called(deployed, network)
    for tensors in calls:
        args, kwargs = arguments(tensors)
        given = program.run(args, kwargs)
        results = arrays_of(deployed.kept(given) if whole else given)
        comparison.add(tensors, results, results, program.levels)
    comparison.tell(report)
    report.faults = format_faults(quantized, program.rounded, found.emitter.stored.engine.requires(FileFeature.SIGNED))
