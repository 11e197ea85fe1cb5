"""Compares a file whose batch varies with its model at another size of the batch, at which both may compute something else."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_cco.errors import CCOError
from lightning_cco.export.check_limits import judge
from lightning_cco.export.comparison import Comparison
from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.dynamic_sizes import lengthened, short_reason
from lightning_cco.export.errors import BatchDoesNotVary, ExportError, quoted
from lightning_cco.export.failures import first_paragraph
from lightning_cco.export.feeds import ForwardArguments, feeds_of
from lightning_cco.export.report import ExportReport
from lightning_cco.names import list_names
from lightning_cco.quantization.model import HookedModel

_INSTEAD = "Pass dynamic_batch=False, which fixes the batch to the example's."
Shapes = Sequence[Sequence[Any]]
"""Of each input, a number for an axis that is fixed, and a name for one that varies."""


def check_other_batch(
    quantized: HookedModel, session: Any, compared: Comparison, call: ForwardArguments, plain: Any, report: ExportReport
) -> None:
    """Run a file and its model on a batch of another size, and on one sample.

    The model at that size is the reference, so that what samples of a batch make together (its statistics, similarities) may differ from the first one's.

    Args:
        quantized: The model.
        session: The file.
        compared: A comparison of both.
        call: A batch that both take.
        plain: The session that gives the results; `None`: the one that `compared` inspects.
        report: Gets what is to be said of batches that the file is not for.

    Raises:
        BatchDoesNotVary: The file gives other outputs than the model there, or does not run, or the model takes no other batch.
    """
    shapes = [entry.shape for entry in session.get_inputs()]
    others = list(other_batches(call[0], shapes))
    if not others:
        return
    count = others[0].instead_of
    taken = next((other for other in others if agree(quantized, session, compared, other.tensors, other.where, plain)), None)
    if taken is None:
        sizes = ", ".join(str(other.size) for other in others)
        raise BatchDoesNotVary(f"the model took no other batch than one of {count} ({sizes} were tried). No file was written. {_INSTEAD}")
    if taken.size < count and not report.batch_limits:
        report.notes.append(f"the model took no larger batch that was tried, so the file was not run on more than {count} samples")
    try:
        for alone in other_batches(call[0], shapes, (1,) if count > 1 else ()):
            agree(quantized, session, compared, alone.tensors, alone.where, plain)
    except BatchDoesNotVary as error:  # one sample is a case of its own to many models, and to who traces them
        report.batch_limits.append(f"2 samples at least, since {short_reason(error)}")


def check_program_batch(
    program: torch.export.ExportedProgram, deployed: Deployed, arguments: Callable[[tuple[Tensor, ...]], Any], whole: bool
) -> None:
    """Run a program and its model on a batch of another size, and compare the numbers and the shapes of what they give.

    Args:
        program: The program.
        deployed: The forward.
        arguments: What the program is called with: from tensors to positional and keyword arguments.
        whole: Whether the program gives all that the model does, not only the tensors that are outputs.

    Raises:
        BatchDoesNotVary: They differ, or the program does not run.
    """
    shapes = shapes_in(program)
    if len(shapes) != len(deployed.example):
        return
    for other in other_batches(deployed.example, shapes):
        if program_agrees(program, deployed, arguments, whole, other.tensors, other.where):
            return


def shapes_in(program: torch.export.ExportedProgram) -> Shapes:
    """Of each input of a program, its sizes."""
    inputs = {*program.graph_signature.user_inputs}
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return [[size if isinstance(size, int) else str(size) for size in value.shape] for value in values if isinstance(value, Tensor)]


def program_agrees(
    program: torch.export.ExportedProgram,
    deployed: Deployed,
    arguments: Callable[[tuple[Tensor, ...]], Any],
    whole: bool,
    tensors: tuple[Tensor, ...],
    where: str,
    instead: str = _INSTEAD,
    kind: type[ExportError] = BatchDoesNotVary,
) -> bool:
    """Whether the model takes a batch; then the program gives outputs of the same shapes. Arguments as of `check_program_batch` and `agree`."""
    try:
        expected = [tuple(tensor.shape) for tensor in deployed(*tensors)]
    except BatchDoesNotVary as error:
        raise kind(f"{where} {quoted(error)}") from error
    except Exception:  # the model does not take it
        return False
    args, kwargs = arguments(tensors)
    try:
        given = program.module()(*args, **kwargs)
    except Exception as error:
        raise kind(f"{where} the program does not run: {first_paragraph(error)}. {instead}") from error
    found = [tuple(tensor.shape) for tensor in (deployed.kept(given) if whole else given)]
    if found != expected:
        raise kind(
            f"{where} the program's outputs {list_names(deployed.outputs)} have the shapes {found}, the model's {expected}. {instead}"
        )
    return True


class OtherBatch(NamedTuple):
    """The same samples, some of them repeated or left out: in all so many, in the place of so many."""

    tensors: tuple[Tensor, ...]
    size: int
    instead_of: int

    @property
    def where(self) -> str:
        """In words."""
        return f"with a batch of {self.size} instead of {self.instead_of},"


def other_batches(tensors: Sequence[Tensor], shapes: Shapes, sizes: Sequence[int] | None = None) -> Iterator[OtherBatch]:
    """Batches of other sizes, if the batch varies; by default one sample more, twice as many, one less, and half of them, without a batch of one.

    Args:
        tensors: A batch.
        shapes: Of each of them.
        sizes: How many samples.
    """
    name = _batch_of(shapes)
    if name is None:
        return
    count = next(tensor.shape[list(shape).index(name)] for tensor, shape in zip(tensors, shapes, strict=True) if name in shape)
    usual = [3, 2] if count == 1 else [count + 1, 2 * count, count - 1, count // 2]
    for size in dict.fromkeys(usual) if sizes is None else sizes:
        changed = _with_batch(tensors, shapes, name, count, size) if size > 1 or sizes else None
        if changed is not None:
            yield OtherBatch(changed, size, count)


def agree(
    quantized: HookedModel,
    session: Any,
    compared: Comparison,
    tensors: tuple[Tensor, ...],
    where: str,
    plain: Any,
    instead: str = _INSTEAD,
    kind: type[ExportError] = BatchDoesNotVary,
) -> bool:
    """Whether the model takes a batch; then the file gives the same.

    Args:
        quantized: The model.
        session: The file.
        compared: A comparison of both.
        tensors: The batch.
        where: In which way it is another one, for errors.
        plain: The session that gives the results; `None`: the one that `compared` inspects.
        instead: What to do where they differ.
        kind: The error that is raised then.
    """
    compared = compared.anew()
    with quantized.runtime.mismatches.trial() as differences:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of calls that the capture did not see, below
                ran = compared.run((tensors, {}), feeds_of(session, tensors, {}), plain)
            if any(array.dtype.kind == "f" and np.isnan(array).any() for array in ran.expected):
                return False  # as a standard deviation over one sample
            unseen = differences()
            if unseen:
                raise ExportError(f"the model calls other operations than with the example's batch, such as '{unseen[0]}'.")
            compared.add(ran)
            found = ExportReport("")
            compared.tell(found)
            judge(found)
        except CCOError as error:
            raise kind(f"{where} {quoted(error)} {instead}") from error
        except Exception as error:
            if type(error).__module__.startswith("onnxruntime"):
                raise kind(f"{where} the file does not run: {first_paragraph(error)}. {instead}") from error
            return False  # the model does not take it
    return True


def _batch_of(shapes: Shapes) -> str | None:
    """What the batch is called that varies: the first axis of the first input that has one, or any of that name; `None`: it does not vary."""
    firsts = [shape[0] for shape in shapes if shape and isinstance(shape[0], str)]
    return firsts[0] if firsts else next((size for shape in shapes for size in shape if size == "batch"), None)


def _with_batch(tensors: Sequence[Tensor], shapes: Shapes, name: str, count: int, size: int) -> tuple[Tensor, ...] | None:
    """The samples repeated, or left out, along each axis whose size is that of the batch, or a part or a multiple of it; `None`: not a whole number."""
    changed = []
    for tensor, shape in zip(tensors, shapes, strict=True):
        for axis, length in enumerate(shape):
            if isinstance(length, str) and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", length):
                if tensor.shape[axis] * size % count:
                    return None
                tensor = lengthened(tensor, axis, tensor.shape[axis] * size // count)
        changed.append(tensor)
    return tuple(changed)
