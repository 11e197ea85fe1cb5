"""The export at the end of a training: whether it will be possible, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from lightning_cco.checkpoints import local_folder
from lightning_cco.errors import CCOError
from lightning_cco.export.engines import ENGINES, PROGRAMS
from lightning_cco.export.failures import need_engine, need_packages
from lightning_cco.graph.saved_values import restore
from lightning_cco.graph.snapshot import Snapshot
from lightning_cco.quantized_model import QuantizedModel


def check_export_dir(folder: str | None, target: str) -> None:
    """Say before the training what would keep its result from being exported.

    Args:
        folder: Where to; `None`: it is not.
        target: The engine that it is for.

    Raises:
        CCOError: The folder is elsewhere, or a package is missing.
    """
    if folder is None:
        return
    local_folder(folder, "deployment_settings.export_dir")
    try:
        if target not in PROGRAMS:
            need_packages()
        if target in PROGRAMS or ENGINES[target].strict:
            need_engine(ENGINES[target])
    except CCOError as error:
        raise CCOError(
            f"deployment_settings.export_dir is set, but after the training there could be no {error} Or leave export_dir out."
        ) from error


@contextmanager
def as_before(quantized: QuantizedModel) -> Iterator[None]:
    """After the block, weights, plan and ranges are those of before, and whatever else the model holds.

    Its ``state_dict`` may leave something out, or hold what is no tensor; its ``on_load_checkpoint`` may set attributes.
    """
    model, suggestions, settings = quantized.model, quantized.plan.suggestions, quantized.settings
    ranges = quantized.state_dict()
    values = [
        (tensor, tensor.detach().clone()) for tensor in chain(model.parameters(), model.buffers())
    ]  # a snapshot leaves out very large buffers
    kept = Snapshot(model)
    try:
        yield
    finally:
        kept.restore()
        for tensor, value in values:
            restore(tensor, value)
        if quantized.plan.suggestions != suggestions or quantized.settings != settings:
            quantized.replan(settings, suggestions)
        quantized.load_state_dict(ranges)
