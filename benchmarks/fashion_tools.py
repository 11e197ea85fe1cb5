"""Other tools in the benchmark of accuracy at few bits: how each makes a network ready for training at some bits, as its documentation says.

The first convolution and the input have 8 bits, the last layer stays in float. A tool that has no such bits says so by `Refused`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn


class Refused(Exception):
    """The tool has nothing for such bits; the message says what it lacks."""


Prepare = Callable[[nn.Module, Sequence[Tensor], int, int], nn.Module]
"""From a float network, calibration batches, and the bits of weights and activations to what is trained."""


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by path, in the order of the network."""
    return {path: module for path, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


@torch.no_grad()
def readers_of_positive(model: nn.Module, batches: Sequence[Tensor]) -> set[str]:
    """Paths of the layers that read nothing below 0: their levels need no sign, which tools ask for by hand."""
    smallest: dict[str, float] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, path=path: smallest.__setitem__(path, min(smallest.get(path, 0.0), float(inputs[0].min())))
        )
        for path, module in weighted(model).items()
    ]
    for batch in batches[:2]:
        model.eval()(batch)
    for handle in handles:
        handle.remove()
    return {path for path, value in smallest.items() if value >= 0}


def _run_all(batches: Sequence[Tensor]) -> Callable[[nn.Module], None]:
    def run(model: nn.Module, *_: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    return run


def modelopt(model: nn.Module, batches: Sequence[Tensor], weights: int, activations: int) -> nn.Module:
    """Weights and inputs of weighted layers; scales from the calibration by the largest magnitude, at few bits by the squared error, fixed."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    positive, layers = readers_of_positive(model, batches), list(weighted(model))
    few = min(weights, activations) <= 4
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for path in layers[:-1]:
        first = path == layers[0]
        weight = {"num_bits": 8 if first else weights, "axis": 0}
        value = {"num_bits": 8 if first else activations, "axis": None, "unsigned": path in positive}
        rules += [
            {"quantizer_name": f"{path}.weight_quantizer", "cfg": weight, "enable": True},
            {"quantizer_name": f"{path}.input_quantizer", "cfg": value, "enable": True},
        ]
    prepared = mtq.quantize(model.eval(), {"quant_cfg": rules, "algorithm": "mse" if few else "max"}, _run_all(batches))
    used = sum(module.is_enabled for module in prepared.modules() if isinstance(module, TensorQuantizer))
    assert used == 2 * len(layers) - 2, used
    return prepared.train()


def brevitas(model: nn.Module, batches: Sequence[Tensor], weights: int, activations: int) -> nn.Module:
    """Its layers in the place of PyTorch's; scales that begin at the least squared error and are learned, of weights and of activations."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloatMSE, Int8WeightPerChannelFloatMSE, Uint8ActPerTensorFloatMSE

    class LearnedWeight(Int8WeightPerChannelFloatMSE):
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS

    positive, layers = readers_of_positive(model, batches), weighted(model)
    for number, (path, layer) in enumerate(list(layers.items())[:-1]):
        bits = (8, 8) if number == 0 else (weights, activations)
        options = {
            "bias": layer.bias is not None,
            "weight_quant": LearnedWeight,
            "weight_bit_width": bits[0],
            "input_quant": Uint8ActPerTensorFloatMSE if path in positive else Int8ActPerTensorFloatMSE,
            "input_bit_width": bits[1],
        }
        if isinstance(layer, nn.Conv2d):
            shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            new = qnn.QuantConv2d(*shape, groups=layer.groups, **options)
        else:
            new = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        new.load_state_dict(layer.state_dict(), strict=False)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    model.eval()
    with calibration_mode(model):
        _run_all(batches)(model)
    return model.train()


def fx(model: nn.Module, batches: Sequence[Tensor], weights: int, activations: int) -> nn.Module:
    """Observers that follow the training, of the extremes; a `FakeQuantize` with fewer levels for fewer bits."""
    from torch.ao.quantization import FakeQuantize, QConfig, QConfigMapping
    from torch.ao.quantization.observer import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    def config(weight_bits: int, value_bits: int) -> Any:
        return QConfig(
            activation=FakeQuantize.with_args(
                observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=2**value_bits - 1, dtype=torch.quint8, reduce_range=False
            ),
            weight=FakeQuantize.with_args(
                observer=MovingAveragePerChannelMinMaxObserver,
                quant_min=1 - 2 ** (weight_bits - 1),
                quant_max=2 ** (weight_bits - 1) - 1,
                dtype=torch.qint8,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            ),
        )

    layers = list(weighted(model))
    mapping = QConfigMapping().set_global(config(weights, activations))
    mapping.set_module_name(layers[0], config(8, activations)).set_module_name(layers[-1], None)
    prepared = prepare_qat_fx(model.train(), mapping, (batches[0],))
    inputs = [module for name, module in prepared.named_modules() if name == "activation_post_process_0"]
    for module in inputs:  # that of the network's input
        module.quant_max, module.activation_post_process.quant_max = 255, 255
    _run_all(batches)(prepared.eval())
    return prepared.train()


def pt2e(model: nn.Module, batches: Sequence[Tensor], weights: int, activations: int) -> nn.Module:
    """The quantizer that torchao has for CPUs, and its export of the network in training mode."""
    if (weights, activations) != (8, 8):
        raise Refused("8 bits only")
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model.train(), (batches[0],), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    quantizer.set_module_name_qconfig(list(weighted(model))[-1], None)
    prepared = allow_exported_model_train_eval(prepare_qat_pt2e(program, quantizer))
    _run_all(batches)(prepared.eval())
    return prepared.train()


class Network(nn.Module):
    """A root around a network that is none."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def nncf(model: nn.Module, batches: Sequence[Tensor], weights: int, activations: int) -> nn.Module:
    """`nncf.quantize`, whose scales are then trained with the weights."""
    if (weights, activations) != (8, 8):
        raise Refused("8 bits only (4-bit weights without activations alone)")
    import os

    # It builds its kernels at the first use, which takes longer than it is ready to wait by itself.
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    import nncf as tool

    data = tool.Dataset(list(batches))
    ignored = tool.IgnoredScope(types=["linear"])
    network = Network(model.eval())  # it puts a module of its own into the root, which an nn.Sequential would call
    return tool.quantize(network, data, preset=tool.QuantizationPreset.MIXED, subset_size=len(batches), ignored_scope=ignored).train()


def aimet(model: nn.Module, batches: Sequence[Tensor], weights: int, activations: int) -> nn.Module:
    """Its simulation with learned ranges that begin at the least squared error, and scales of weights for each channel."""
    if min(weights, activations) < 4:
        raise Refused("4 to 32 bits only")
    # torchvision does not load beside torch's CPU build; aimet imports it for data sets and detection layers that no network here has.
    for part in ("torchvision", "torchvision.datasets", "torchvision.ops", "torchvision.transforms"):
        sys.modules.setdefault(part, MagicMock())
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel
    from aimet_torch.v2.quantization.affine import QuantizeDequantize

    settings = resources.files("aimet_torch.common.quantsim_config") / "default_config_per_channel.json"
    simulation = QuantizationSimModel(
        prepare_model(model.eval()),
        batches[0],
        quant_scheme=QuantScheme.training_range_learning_with_tf_enhanced_init,
        default_param_bw=weights,
        default_output_bw=activations,
        config_file=str(settings),
    )
    layers = [
        module for module in simulation.model.modules() if hasattr(module, "param_quantizers") and "weight" in module.param_quantizers
    ]
    for quantizer in (layers[0].param_quantizers["weight"], *layers[0].input_quantizers):
        if isinstance(quantizer, QuantizeDequantize):
            quantizer.bitwidth = 8
    layers[-1].param_quantizers["weight"], layers[-1].output_quantizers[0] = None, None
    simulation.compute_encodings(_run_all(batches))
    return simulation.model.train()


@dataclass(frozen=True)
class Tool:
    """Another tool.

    Attributes:
        name: What the table calls it.
        package: Its distribution.
        prepare: Makes a network ready for training.
        means: How it is set up, for the notes.
    """

    name: str
    package: str
    prepare: Prepare
    means: str


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "Brevitas, learned scales",
            "brevitas",
            brevitas,
            "weights and inputs of its layers; scales from the least squared error on, learned",
        ),
        Tool(
            "ModelOpt",
            "nvidia-modelopt",
            modelopt,
            "weights and inputs of weighted layers; fixed scales of activations, by squared error up to 4 bits",
        ),
        Tool("AIMET", "aimet-torch", aimet, "outputs of all layers; ranges learned"),
        Tool("NNCF", "nncf", nncf, "what its OpenVINO target runs in INT8; scales learned"),
        Tool("torchao PT2E", "torchao", pt2e, "what its X86InductorQuantizer lists; moving averages"),
        Tool("torch.ao FX", "torch", fx, "moving averages of the extremes"),
    )
}
