"""Writes the fake-quantized model as a `torch.export` program (``.pt2``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_cco.errors import CCOError
from lightning_cco.export.onnx_file import batch_shapes, export_target, two_samples
from lightning_cco.files import temporary_folder
from lightning_cco.quantization.model import QuantizedModel


def export_program(
    quantized: QuantizedModel,
    path: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
) -> torch.export.ExportedProgram:
    """Write a ``.pt2`` file that computes what the fake-quantized model computes; ``torch.export.load(path).module()`` runs it anywhere.

    Args:
        quantized: The calibrated model.
        path: Where to write.
        example_args: Positional arguments of one forward.
        example_kwargs: Keyword arguments of it.
        dynamic_batch: Let the first axis of every input vary.

    Raises:
        CCOError: The model was never calibrated, can't be traced, or the path can't be written.
    """
    if not quantized.calibrated:
        raise CCOError(
            "export: the model was never calibrated, so its activations have no ranges. Run fit, or call calibrate(batches) first."
        )
    args, kwargs = tuple(example_args), dict(example_kwargs or {})
    if not args and not kwargs:
        raise CCOError("export: an example is needed to trace the forward. Pass example_args=(tensor, ...) or example_kwargs={...}.")
    target = export_target(path, ".pt2")
    shapes = None
    if dynamic_batch:
        args, kwargs = two_samples(args), two_samples(kwargs)
        shapes = batch_shapes(quantized.model, args, kwargs)
    with quantized.evaluating(), torch.compiler.set_stance("force_eager"):
        try:
            program = torch.export.export(quantized.model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            quantized.runtime.frames.reset()
            raise CCOError(f"export: {type(quantized.model).__name__} can't be traced by torch.export: {error}") from error
    try:
        with temporary_folder(target.parent) as folder:
            torch.export.save(program, folder / target.name)
            os.replace(folder / target.name, target)
    except (OSError, RuntimeError) as error:
        raise CCOError(f"export: '{path}' can't be written: {error}. Give a path in a folder that can be.") from error
    return program
