"""The quantized model that users hold: the hooked one, with its measurement and its exports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError
from lightning_cco.export.destination import holds_weights_alone, is_engine_file, is_program
from lightning_cco.export.engine_file import export_engine_file
from lightning_cco.export.onnx_file import export_onnx
from lightning_cco.export.program import export_program
from lightning_cco.export.report import ExportReport
from lightning_cco.export.safetensors_file import WeightsReport, export_safetensors
from lightning_cco.export.step_network import StepNetwork
from lightning_cco.graph.capture import capture
from lightning_cco.graph.hooks import refuse_hooked
from lightning_cco.loss_measurement import measure_loss
from lightning_cco.loss_sensitivity import ACTIVATIONS_BITS, WEIGHTS_BITS, LossSensitivityReport
from lightning_cco.measurement import measure
from lightning_cco.quantization.forward_call import Forward, call_with
from lightning_cco.quantization.model import HookedModel
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings, load_settings


def quantize(
    model: nn.Module,
    settings: Settings | Mapping[str, Any] | str | None = None,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
) -> QuantizedModel:
    """Capture a model's layers, plan which are quantized, and add fake quantization to it by hooks; no Trainer needed.

    The model stays the same object with the same parameters. Until `QuantizedModel.calibrate` has run, it computes in float.

    Args:
        model: Any module whose ``forward`` takes the example.
        settings: What `CCOCallback` takes: settings, mapping, YAML path or recipe name.
        example_args: Positional arguments of one example forward.
        example_kwargs: Keyword arguments of it.

    Raises:
        CCOError: An argument is of another kind than expected, the forward fails on the example, a setting matches nothing, or nothing can be quantized.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> quantized = quantize(model, "w8a8", (x,))
        >>> quantized.calibrate([x])
        1
        >>> quantized
        QuantizedModel(Sequential, 2 of 3 layers with weights run in INT8 in ort (86 % of the multiplications); calibrated)
        >>> model(x).shape  # fake-quantized from now on
        torch.Size([16, 2])
    """
    _check_kinds(model, settings, example_args, example_kwargs)
    refuse_hooked(model)
    recipe = load_settings(settings)
    example_args = (example_args,) if isinstance(example_args, Tensor) else tuple(example_args)
    captured = capture(model, lambda: model(*example_args, **(example_kwargs or {})))
    quantized = QuantizedModel(model, captured, recipe)
    quantized.example = (example_args, example_kwargs)
    return quantized


def _check_kinds(model: Any, settings: Any, example_args: Any, example_kwargs: Any) -> None:
    """Refuse arguments in another order, and examples that would be taken apart: a string into letters, a mapping into its keys."""
    if not isinstance(model, nn.Module):
        raise CCOError(f"quantize: expected a torch.nn.Module as model, got {type(model).__name__}.")
    if isinstance(settings, Tensor) or (isinstance(settings, (tuple, list)) and any(isinstance(entry, Tensor) for entry in settings)):
        raise CCOError(
            "quantize: expected a recipe as the second argument (settings, a mapping, a path or a name, or None), got tensors. "
            "The order is quantize(model, settings, example_args)."
        )
    if isinstance(example_args, (str, bytes, Settings)) or not isinstance(example_args, (Tensor, Iterable)):
        raise CCOError(
            f"quantize: expected the positional arguments of one forward as example_args, such as (x,), got {type(example_args).__name__}. "
            "The order is quantize(model, settings, example_args)."
        )
    if isinstance(example_args, Mapping):
        raise CCOError(
            f"quantize: expected positional arguments as example_args, got a mapping with the keys {list(example_args)[:8]}. If forward takes "
            "them by name, write example_kwargs=batch; if it takes the mapping as its one argument, example_args=(batch,)."
        )
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise CCOError(f"quantize: expected a mapping of keyword arguments as example_kwargs, got {type(example_kwargs).__name__}.")


class QuantizedModel(HookedModel):
    """A model, its layer graph, its plan and its quantizers. They are added to the model by hooks; `remove` removes these.

    Args:
        model: The model.
        captured: Its captured layers.
        settings: The recipe.
        suggestions: Layers to skip because of their sensitivity.

    Attributes:
        model: The model, the same object.
        graph: Its layer graph.
        plan: Which layers and tensors are quantized, and why others are not.
        settings: The recipe.
        weights: Quantizers of each layer's weights.
        calibrated: Whether the ranges are known. Before that the model computes in float.
        frozen: Whether the ranges are frozen.
        example: Positional and keyword arguments of one forward, for exports.
        network: The part of a training step that is exported, if the example is not for the model's ``forward``.
        uncalibrated: Quantizers that have no range after a state was loaded or the plan changed.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
        >>> quantized = quantize(model, None, (x,))
        >>> quantized.calibrate([x])
        1
        >>> with quantized.disabled():
        ...     in_float = model(x)
        >>> quantized.remove()
        >>> torch.equal(model(x), in_float)
        True
    """

    network: StepNetwork | None = None

    def hold_ranges(self, hold: bool) -> None:
        """Hold the ranges (True) in an optimizer step that runs the model several times (LBFGS), until it is over (False). The callback does this.

        Example:
            >>> x = torch.randn(16, 8)
            >>> quantized = quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), None, (x,))
            >>> optimizer = torch.optim.LBFGS(quantized.model.parameters())
            >>> hooks = [optimizer.register_step_pre_hook(lambda *_: quantized.hold_ranges(True))]
            >>> hooks += [optimizer.register_step_post_hook(lambda *_: quantized.hold_ranges(False))]
        """
        if hold:
            self._ranges.move_if_due()
        self._ranges.held = hold

    def sensitivity(
        self, batches: Iterable[Any], forward: Forward | None = None, modes: Sequence[str] = ("local", "accumulated")
    ) -> SensitivityReport:
        """Measure the Quantization Sensitivity of each layer.

        Args:
            batches: The batches to measure on, on the model's device.
            forward: How to call the model on a batch, as in `calibrate`.
            modes: ``local``: float and quantized layer on the same float input. ``accumulated``: quantized model against float model.

        Raises:
            CCOError: The model was never calibrated.

        Example:
            >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
            >>> quantized = quantize(model, None, (x,))
            >>> quantized.calibrate([x])
            1
            >>> report = quantized.sensitivity([x])
            >>> sorted(report.main)
            ['input_0', 'linear', 'linear_1', 'relu', 'relu_1']
        """
        if not self.calibrated:
            raise CCOError("sensitivity: the model was never calibrated, so nothing is quantized. Call calibrate(batches) first.")
        return measure(self, batches, forward or call_with, modes)

    def loss_sensitivity(
        self,
        batches: Iterable[Any],
        forward: Forward | None = None,
        loss: Forward | None = None,
        weights_bits: Sequence[int] = WEIGHTS_BITS,
        activations_bits: Sequence[int] = ACTIVATIONS_BITS,
    ) -> LossSensitivityReport:
        """Measure how much the loss is expected to rise if only one weight or activation is quantized, for several numbers of bits.

        Args:
            batches: The batches to measure on, on the model's device.
            forward: How to call the model on a batch, as in `calibrate`.
            loss: ``(model, batch) -> Tensor``: the mean loss of a batch. `None`: the divergence of the outputs from those of the float model; see
                `lightning_cco.loss_measurement.divergence`.
            weights_bits: Numbers of bits to try for weights, beside the plan's: 2 to 8. Each takes one more run of the layers with weights.
            activations_bits: Likewise for activations.

        Raises:
            CCOError: The model was never calibrated, or the loss does not depend on its layers.

        Example:
            >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
            >>> quantized = quantize(model, None, (x,))
            >>> quantized.calibrate([x])
            1
            >>> losses = quantized.loss_sensitivity([x], loss=lambda model, batch: model(batch).square().mean())
            >>> sorted(losses.rises(quantized.plan))
            ['input_0', 'linear', 'linear_1', 'relu', 'relu_1']
        """
        if not self.calibrated:
            raise CCOError("loss_sensitivity: the model was never calibrated, so it has no ranges. Call calibrate(batches) first.")
        return measure_loss(self, batches, forward or call_with, loss, weights_bits, activations_bits)

    def export(
        self, path: str | Path, example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> ExportReport | WeightsReport | torch.export.ExportedProgram:
        """Write an INT8 file and check it in its engine, or a `torch.export` program.

        ``.onnx``; ``.pte`` for ExecuTorch, ``.tflite`` for LiteRT, ``.mlpackage`` for Core ML; ``.pt2`` for the program; ``model.safetensors`` for
        the integer weights of a network of `transformers`.

        Args:
            path: Where to write; the ending chooses the format.
            example_args: Positional arguments of one forward; by default those of `quantize`.
            example_kwargs: Keyword arguments of it.
            **options: Those of `export_onnx`, `export_program` or `export_engine_file`.

        Returns:
            The `ExportReport`; the program for a ``.pt2`` file; a `WeightsReport` for a ``.safetensors`` file, which needs no example.

        Example:
            >>> import torch
            >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
            >>> quantized = quantize(model, None, (x,))
            >>> quantized.calibrate([x])
            1
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report = quantized.export(f"{folder}/model.onnx")
            >>> report.sqnr_db > 30
            True
        """
        if is_program(path):
            return self.export_program(path, example_args, example_kwargs, **options)
        if holds_weights_alone(path):
            return export_safetensors(self, path, **options)
        if is_engine_file(path):
            return export_engine_file(self, path, *self._example_or(example_args, example_kwargs, options), **options)
        return self.export_onnx(path, example_args, example_kwargs, **options)

    def export_onnx(
        self, path: str | Path, example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> ExportReport:
        """Write an INT8 ONNX file and check it in ONNX Runtime.

        Args:
            path: Where to write.
            example_args: Positional arguments of one forward; by default those of `quantize`.
            example_kwargs: Keyword arguments of it.
            **options: See `lightning_cco.export.export_onnx`.

        Example:
            >>> import tempfile
            >>> import torch
            >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
            >>> quantized = quantize(model, None, (x,))
            >>> quantized.calibrate([x])
            1
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report = quantized.export_onnx(f"{folder}/model.onnx", dynamic_batch=False)
            >>> sum(report.integer_nodes.values())  # two linear layers in INT8
            2
        """
        args, kwargs = self._example_or(example_args, example_kwargs, options)
        return export_onnx(self, path, args, kwargs, **options)

    def export_program(
        self, path: str | Path, example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> torch.export.ExportedProgram:
        """Write a `torch.export` program (``.pt2``).

        Args:
            path: Where to write.
            example_args: Positional arguments of one forward; by default those of `quantize`.
            example_kwargs: Keyword arguments of it.
            **options: See `lightning_cco.export.export_program`.

        Example:
            >>> import tempfile
            >>> import torch
            >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
            >>> quantized = quantize(model, None, (x,))
            >>> quantized.calibrate([x])
            1
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     program = quantized.export_program(f"{folder}/model.pt2")
            >>> program.module()(x).shape
            torch.Size([16, 2])
        """
        args, kwargs = self._example_or(example_args, example_kwargs, options)
        return export_program(self, path, args, kwargs, **options)

    def _example_or(
        self, args: Sequence[Any], kwargs: Mapping[str, Any] | None, options: dict[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any] | None]:
        if len(args) or kwargs:
            return args, kwargs
        if self.network is not None:
            options.setdefault("network", self.network)
        return self.example
