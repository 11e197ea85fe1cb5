"""Writes the fake-quantized model as a `torch.export` program (``.pt2``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_cco.errors import CCOError
from lightning_cco.export.axes import ways_to_vary
from lightning_cco.export.destination import export_target
from lightning_cco.export.failures import need_packages, need_writable_names, untraceable
from lightning_cco.export.network import Network
from lightning_cco.export.signature import Deployed
from lightning_cco.files import temporary_folder
from lightning_cco.graph.compiled import eager
from lightning_cco.quantization.model import HookedModel


def export_program(
    quantized: HookedModel,
    path: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    network: Network | None = None,
    **options: Any,
) -> torch.export.ExportedProgram:
    """Write a ``.pt2`` file that computes what the fake-quantized model computes; ``torch.export.load(path).module()`` runs it anywhere.

    Args:
        quantized: The calibrated model.
        path: Where to write.
        example_args: Positional arguments of one forward.
        example_kwargs: Keyword arguments of it.
        dynamic_batch: Let the first axis of every input vary.
        dynamic_shapes: What varies instead: axis → ``Dim`` or name, by argument.
        network: What the file holds in the place of the model's ``forward``, whose arguments the example then is: `network_of_the_step`.
        **options: There are no others; what only an ONNX file has is refused by name.

    Raises:
        CCOError: An option is not one of these, the model was never calibrated, can't be traced, or the path can't be written.
    """
    need_packages(("torch",))
    if options:
        raise CCOError(
            f"export: a .pt2 file takes the options dynamic_batch and dynamic_shapes; got {sorted(options)}. Leave them out, or export an .onnx file."
        )
    if not quantized.calibrated:
        raise CCOError(
            "export: the model was never calibrated, so its activations have no ranges. Run fit, or call calibrate(batches) first."
        )
    args, kwargs = tuple(example_args), dict(example_kwargs or {})
    if not args and not kwargs:
        raise CCOError("export: an example is needed to trace the forward. Pass example_args=(tensor, ...) or example_kwargs={...}.")
    need_writable_names(name for layer in quantized.graph for name in (layer.path, *layer.parameters))
    target = export_target(path, ".pt2")
    with quantized.evaluating(), eager():
        deployed = Deployed(quantized.model, args, kwargs, network=network)
        failure: Exception | None = None
        shapes: Any
        for axes in ways_to_vary(deployed, dynamic_batch, {"dynamic_shapes": dynamic_shapes}, []):
            try:
                if network is None:
                    args, kwargs = deployed.call(axes.tensors)
                    shapes = deployed.nested(axes.specifications)
                    program = torch.export.export(quantized.model, args, kwargs, dynamic_shapes=shapes, strict=False)
                else:
                    shapes = (tuple(axes.specifications),)
                    program = torch.export.export(deployed, axes.tensors, dynamic_shapes=shapes, strict=False)
                break
            except Exception as error:
                quantized.runtime.frames.reset()
                failure = failure or error
        else:
            assert failure is not None
            raise CCOError(untraceable(quantized.model, "", failure)) from failure
    try:
        with temporary_folder(target.parent) as folder:
            torch.export.save(program, folder / target.name)
            os.replace(folder / target.name, target)
    except (OSError, RuntimeError) as error:
        raise CCOError(f"export: '{path}' can't be written: {error}. Give a path in a folder that can be.") from error
    return program
