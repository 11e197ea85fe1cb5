"""Traces a model into a program with quantized operators (PT2E)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.dialects import Pt2eDialect
from lightning_cco.export.dynamic_axes import Axes
from lightning_cco.export.engines import ENGINES, PROGRAMS, Engine, FileFeature
from lightning_cco.export.errors import ExportError
from lightning_cco.export.failures import failed
from lightning_cco.export.ort_session import QuantizeNode
from lightning_cco.export.pt2e_floats import compute_in_float32
from lightning_cco.export.pt2e_passes import Passes
from lightning_cco.export.qdq_emitter import Emitter
from lightning_cco.export.stored_tensors import StoredWeights
from lightning_cco.export.trace_attempts import first_emitted
from lightning_cco.export.tracing import traced_program
from lightning_cco.quantization.model import HookedModel

Trace = Callable[[Axes], torch.export.ExportedProgram]


@dataclass
class WrittenProgram:
    """A program, and what wrote it.

    Attributes:
        program: What the file holds.
        emitter: What wrote its operators.
        axes: Its inputs, and which axes of them vary.
        widened: Types that the model computes in, and the program in float32.
    """

    program: torch.export.ExportedProgram
    emitter: Emitter
    axes: Axes
    widened: list[str]

    def inspected(self) -> tuple[torch.export.ExportedProgram, dict[str, list[QuantizeNode]]]:
        """The same with the rounded tensors as further outputs, as floats; and these by quantizer, each called after the number of its output."""
        dialect = self.emitter.dialect
        assert isinstance(dialect, Pt2eDialect)
        with self.emitter.emitting():
            program = traced(_Inspected(self.emitter.model, dialect, self._is_compared), self.axes)
        rounded: dict[str, list[QuantizeNode]] = {}
        for number, (name, scale) in enumerate(pair for pair in dialect.pairs if self._is_compared(pair[0])):
            rounded.setdefault(name, []).append(QuantizeNode(str(number), scale, 0))
        return _rewritten(program, self.emitter)[0], rounded

    def _is_compared(self, name: str) -> bool:
        """Not what a parameter is rounded to before it is concatenated: converters round it once, as the result is, which is compared."""
        layer, _, operand = name.rpartition(".")
        return operand != "operand" or self.emitter.quantized.graph[layer].kind != "concat"


class _Inspected(nn.Module):
    """A forward that gives the tensors that it rounds, too."""

    def __init__(self, model: nn.Module, dialect: Pt2eDialect, wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self.model, self._dialect, self._wanted = model, dialect, wanted
        self.training = model.training

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (*self.model(*tensors), *self._dialect.rounded(self._wanted))


def traced(model: nn.Module, axes: Axes) -> torch.export.ExportedProgram:
    """A forward of tensors alone as a program."""
    return traced_program(model, axes.tensors, None, (tuple(axes.specifications),))


def write_program(
    quantized: HookedModel, deployed: Deployed, ways: Iterable[Axes], trace: Trace | None = None, engine: Engine | None = None
) -> WrittenProgram:
    """The program of the first way of tracing that works.

    Args:
        quantized: The model, evaluating, in float32.
        deployed: Its forward, tensors in and out.
        ways: ExportAttempts of tracing, the best first.
        trace: Traces what the program is to hold, if not that forward.
        engine: What reads it, if not the engine that it was planned for.

    Raises:
        CCOError: The model can't be traced.
    """
    engine = engine or ENGINES[quantized.settings.deployment_settings.target_framework]
    stored = StoredWeights(quantized, engine=engine if engine.name in PROGRAMS else ENGINES[PROGRAMS[0]])
    emitter = Emitter(quantized, stored, Pt2eDialect(stored.engine.requires(FileFeature.SIGNED)))
    emitter.model = deployed

    def made(axes: Axes) -> tuple[torch.export.ExportedProgram, list[str]]:
        with emitter.emitting():
            program = trace(axes) if trace is not None else traced(deployed, axes)
        return _rewritten(program, emitter)

    (program, widened), axes = first_emitted(deployed, emitter, ways, made)
    emitter.warn_of_missing()
    return WrittenProgram(program, emitter, axes, widened)


def _rewritten(program: torch.export.ExportedProgram, emitter: Emitter) -> tuple[torch.export.ExportedProgram, list[str]]:
    try:
        program, widened = compute_in_float32(program.run_decompositions({}))  # without operators in place
        Passes(program, emitter.stored.engine.requires(FileFeature.JOINED)).run()
    except Exception as error:
        raise ExportError(failed("rewriting the traced program", error)) from error
    return program, widened
