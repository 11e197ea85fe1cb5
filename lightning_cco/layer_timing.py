"""Measures what the layers of a model take: writes it as planned in several ways, and runs the files in their engine."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lightning_cco.budget.layer_times import LayerTimes
from lightning_cco.budget.search import BudgetSearch
from lightning_cco.budget.units import Times
from lightning_cco.errors import CCOError
from lightning_cco.export.engine_patterns import adds_products_exactly, has_matrix_units
from lightning_cco.export.engines import ENGINES
from lightning_cco.export.failures import need_packages
from lightning_cco.export.node_times import Written, time_files
from lightning_cco.export.step_network import StepNetwork
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.quantization.forward_call import Forward, call_with
from lightning_cco.quantization.plan import packs_weights
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.settings import Settings, load_settings


def engine_name() -> str:
    """ONNX Runtime with its version."""
    for package in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"):
        try:
            return f"ONNX Runtime {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "ONNX Runtime"


def check_timing(settings: Settings) -> None:
    """Say before a training what would keep times from being measured here.

    Raises:
        CCOError: The files are for another engine or another processor, or a package is missing.
    """
    deployment = settings.deployment_settings
    if settings.budget_settings.layer_times is not None:
        if not Path(settings.budget_settings.layer_times).is_file():
            raise CCOError(
                f"budget_settings.layer_times: there is no file '{settings.budget_settings.layer_times}'. Give what a run has written."
            )
        return
    instead = (
        "Give times that were measured there: budget_settings.layer_times: layer_times.json (docs/layer-times.md has its fields; "
        "lightning_cco.measure_layer_times writes it, where ONNX Runtime runs)."
    )
    if deployment.target_framework != "ort":
        title = ENGINES[deployment.target_framework].title
        raise CCOError(f"budget_settings.speed: times of layers are measured in ONNX Runtime, and the model is for {title}. {instead}")
    here = {"vnni": adds_products_exactly(), "amx": has_matrix_units()}
    for name, has in here.items():
        wanted = getattr(deployment, name)
        if wanted is not None and wanted != has:
            raise CCOError(
                f"budget_settings.speed: deployment_settings.{name}: {str(wanted).lower()} writes files for other processors than this one, on which times "
                f"would be measured. {instead} Or leave {name} out."
            )
    need_packages()


class FileTimer:
    """A `lightning_cco.budget.search.LayerTimer` for ONNX Runtime.

    Args:
        quantized: The model.
        args: Positional arguments of the call that a file holds.
        kwargs: Keyword arguments of it.
        network: The part of the step that a file holds; `None`: the model's ``forward``.
        int4: Whether weights of at most 4 bits are stored in 4 bits.
        threads: Threads of the engine.
        batch_size: Samples that it is run on.
        enabled: Whether this process measures; the others only plan.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        network: StepNetwork | None = None,
        int4: bool = False,
        threads: int = 1,
        batch_size: int = 1,
        enabled: bool = True,
    ) -> None:
        self.quantized, self.call, self.network, self.int4 = quantized, (args, kwargs), network, int4
        self.threads, self.batch_size, self.enabled = threads, batch_size, enabled
        self.engine, self.inputs = engine_name(), list[list[int]]()
        self._folder = TemporaryDirectory()
        self._files: dict[str, Written] = {}

    def export(self, name: str) -> None:
        """Write the model as it is planned now."""
        if not self.enabled:
            return
        written = Written(Path(self._folder.name) / f"{len(self._files)}.onnx")
        args, kwargs = self.call
        options: dict[str, Any] = {"network": self.network} if self.network is not None else {}
        self.quantized.export_onnx(written.path, args, kwargs, check=False, int4=self.int4, fp16=False, written=written, **options)
        self._files[name] = written

    def times(self) -> dict[str, Times]:
        """Measure what was written, by name; nothing in a process that does not measure."""
        if not self._files:
            return {}
        example = next(iter(self._files.values())).example
        self.inputs = [list(np.shape(array)) for array in example]
        try:
            return dict(time_files(self._files, self.threads, self.batch_size))
        except Exception as error:
            raise CCOError(f"ONNX Runtime can't run them: {type(error).__name__}: {error}") from error
        finally:
            self._folder.cleanup()


def measure_layer_times(
    quantized: QuantizedModel, batch: Any, forward: Forward | None = None, threads: int = 1, batch_size: int = 1, int4: bool = False
) -> LayerTimes:
    """Measure what the layers of a model take in ONNX Runtime on this machine, for ``budget_settings.layer_times`` on another one.

    Takes half a dozen exports. The model stays as it was planned.

    Args:
        quantized: A calibrated model, as `quantize` returns it.
        batch: A batch, as in `QuantizedModel.calibrate`.
        forward: How a batch goes through the model.
        threads: Threads of ONNX Runtime.
        batch_size: Samples that the files are run on.
        int4: Measure weights that are stored in 4 bits, too.

    Returns:
        The table; ``table.save("layer_times.json")`` writes its file.

    Raises:
        CCOError: The model was never calibrated, or it can't be exported.

    Example:
        >>> import torch
        >>> from lightning_cco import measure_layer_times, quantize
        >>> quantized = quantize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), "w8a8", torch.zeros(2, 4))
        >>> batches_seen = quantized.calibrate([torch.randn(2, 4)])
        >>> table = measure_layer_times(quantized, torch.randn(2, 4))  # doctest: +SKIP
        >>> table.save("layer_times.json")  # doctest: +SKIP
    """
    if not quantized.calibrated:
        raise CCOError("measure_layer_times: the model was never calibrated. Call calibrate(batches) first.")
    before, suggestions = quantized.settings, quantized.plan.suggestions
    settings = load_settings(before)
    settings.deployment_settings.int4 = int4
    settings.budget_settings.speed = settings.budget_settings.speed or 1.0
    check_timing(settings)
    args, kwargs = quantized.example
    timer = FileTimer(quantized, args, kwargs, quantized.network, packs_weights(settings), threads, batch_size)
    search = BudgetSearch(
        quantized,
        settings,
        lambda names: quantized.calibrate([batch], forward, only=names),
        lambda weights, _: LossSensitivityReport({layer.name: dict.fromkeys(weights, 0.0) for layer in quantized.graph}, {}, "loss", 0, {}),
        forward or call_with,
        timer=timer,
    )
    try:
        return search.measure(batch)
    finally:
        quantized.replan(before, suggestions)
