"""Writes a network of `transformers` with integer weights in the layout of compressed-tensors, which `transformers` and vLLM load.

A folder as ``save_pretrained`` writes it: ``model.safetensors`` and ``config.json``, whose ``quantization_config`` says which layers are compressed. Of each
linear layer there are ``weight_packed`` (int32: integers of n bits, offset by half of their range, one after the other from the lowest bit on),
``weight_scale`` (outputs, groups), ``weight_shape``, and of weights with zero points ``weight_zero_point`` (int32, packed in the same way along the
outputs). Source of the layout: the format ``pack-quantized`` of compressed-tensors 0.20.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cco.export.destination import export_target
from lightning_cco.export.errors import ExportError
from lightning_cco.export.precision import float_bytes
from lightning_cco.files import temporary_folder, write_file
from lightning_cco.names import list_names
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.weight_quantizer import WeightQuantizer

NAME = "model.safetensors"
_TRANSPOSED = "Conv1D"
"""The linear layer of GPT-2, for which the layout has no integers."""


@dataclass
class WeightsReport:
    """What was written.

    Attributes:
        path: The file of the weights.
        size_bytes: Its size.
        float_size_bytes: That of the model's parameters and buffers in float32.
        packed: The linear layers whose weights are integers in it, by their path in the network.
        rounded: Parameters that are rounded, and stored as floats.
        in_float: Linear layers that are not quantized.
        zero_points: How many of those packed have zero points.
    """

    path: str
    size_bytes: int = 0
    float_size_bytes: int = 0
    packed: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    in_float: tuple[str, ...] = ()
    zero_points: int = 0

    def __str__(self) -> str:
        ratio = self.size_bytes / self.float_size_bytes if self.float_size_bytes else float("nan")
        lines = [
            f"Weights for transformers and vLLM: {self.path}",
            f"  size                {self.size_bytes:,} bytes, {ratio:.3f} of the float parameters",
            f"  integer weights     {len(self.packed)} linear layers, read back and equal",
        ]
        if self.rounded:
            lines.append(f"  rounded, as floats  {list_names(list(self.rounded))}: the layout has integers for linear layers alone")
        if self.in_float:
            lines.append(f"  in float            {list_names(list(self.in_float))}")
        if self.zero_points:
            lines.append(
                f"  zero points         in {self.zero_points} layers: transformers 5.23 loads them by from_pretrained(folder, quantization_config="
                "CompressedTensorsConfig(dequantize=True)); without it they expect zero points that are not packed"
            )
        return "\n".join(lines)


Scheme = tuple[int, int | None, bool]
"""Bits, size of the groups, and whether there are no zero points."""


@dataclass
class _Contents:
    """What goes into the file: tensors by name, the scheme of each packed layer, and what else is said."""

    tensors: dict[str, Tensor]
    schemes: dict[str, Scheme] = field(default_factory=dict)
    rounded: dict[str, None] = field(default_factory=dict)


def export_safetensors(quantized: HookedModel, path: str | Path, **options: Any) -> WeightsReport:
    """Write ``model.safetensors`` and ``config.json`` into a folder; ``AutoModel….from_pretrained(folder)`` loads it if compressed-tensors is installed.

    Args:
        quantized: A model that is, or that holds, one network of `transformers`, with weights alone in integers (``weight_only: true``).
        path: Where to write: ``FOLDER/model.safetensors``.
        **options: There are none; what other files have is refused by name.

    Raises:
        CCOError: The model holds no such network, or several; activations are rounded, which the layout does not hold; a quantized layer is no module that
            `transformers` would make again; a package is missing; or the path can't be written.
    """
    if options:
        raise ExportError(f"a .safetensors file takes no options, got {sorted(options)}. Leave them out, or export an .onnx file.")
    if importlib.util.find_spec("safetensors") is None:
        raise ExportError("safetensors is not installed. Write: pip install safetensors.")
    target = export_target(path, ".safetensors")
    if target.name != NAME:
        raise ExportError(
            f"expected the path of a file named {NAME}, as transformers look for it, got '{path}'. Write '{target.with_name(NAME)}'."
        )
    if quantized.activations:
        names = list_names(list(map(str, quantized.activations)))
        raise ExportError(
            f"{NAME} holds integer weights alone, but the plan rounds activations: {names}. Write global_quantization_settings: {{weight_only: true}}, "
            "or export an .onnx file."
        )
    if quantized.plan.dynamic:
        raise ExportError(
            f"{NAME} holds integer weights alone, but {list_names(sorted(quantized.plan.dynamic))} round what they read when they run "
            "(activations_dynamic). Leave activations_dynamic out, or export an .onnx file."
        )
    prefix, network = _network(quantized.model)
    _need_plain(network)
    contents = _contents(quantized, prefix, network)
    linear = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    not_packed = [name for name in linear if name not in contents.schemes]
    in_float = tuple(
        name for name in not_packed if f"{name}.weight" not in contents.rounded
    )  # a head that is tied to an embedding is rounded
    try:
        with temporary_folder(target.parent) as folder:
            network.save_pretrained(folder, state_dict=contents.tensors, max_shard_size="1000GB")
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config["quantization_config"] = _configuration(contents.schemes, not_packed)
            write_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
            _read_back(folder / NAME, contents)
            size = (folder / NAME).stat().st_size
            for part in sorted(folder.iterdir()):
                os.replace(part, target.parent / part.name)
    except OSError as error:
        raise ExportError(f"'{path}' can't be written: {error}. Give a path in a folder that can be.") from error
    zero_points = sum(not symmetric for _, _, symmetric in contents.schemes.values())
    return WeightsReport(str(path), size, float_bytes(network), tuple(contents.schemes), tuple(contents.rounded), in_float, zero_points)


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers of n bits, one after the other from the lowest bit on.

    Args:
        integers: (rows, columns), each from -2^(n-1) to 2^(n-1) - 1.
        bits: n, 1 to 8.

    Returns:
        int32, (rows, columns · n / 32, rounded up).

    Example:
        >>> pack(torch.tensor([[-8, -7, 7]]), 4).item() == 0x0F10
        True
    """
    unsigned = (integers.cpu().to(torch.int16) + (1 << (bits - 1))).numpy().astype(np.uint8)
    spread = (unsigned[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    rows = spread.reshape(len(unsigned), -1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 32)))
    return torch.from_numpy(np.packbits(rows, axis=1, bitorder="little").view("<i4").astype(np.int32))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The integers that `pack` has packed, as int8."""
    spread = np.unpackbits(packed.numpy().astype("<i4").view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    values = spread.reshape(len(spread), columns, bits).astype(np.int16) << np.arange(bits)
    return torch.from_numpy((values.sum(-1) - (1 << (bits - 1))).astype(np.int8))


def _network(model: nn.Module) -> tuple[str, Any]:
    """The one network of `transformers` that a model is or holds, and where."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "save_pretrained") and hasattr(module, "config")}
    outermost = [name for name in found if not any(name.startswith(f"{other}." if other else "") for other in found if other != name)]
    if len(outermost) != 1:
        what = f"{len(outermost)} of them ({list_names(outermost)})" if outermost else "none"
        raise ExportError(
            f"{NAME} is for a network of transformers, which is made again of its config.json: expected one in {type(model).__name__}, got {what}. "
            "Export an .onnx file."
        )
    return (f"{outermost[0]}." if outermost[0] else ""), found[outermost[0]]


def _need_plain(network: Any) -> None:
    """Refuse a network that its configuration does not give again, such as one with adapters."""
    with torch.device("meta"):
        again = type(network)(copy.deepcopy(network.config))
    unlike = sorted(set(network.state_dict()) ^ set(again.state_dict()))
    if unlike:
        raise ExportError(
            f"{NAME} is loaded into the network that config.json describes, but {type(network).__name__} has other parameters than that: "
            f"{list_names(unlike)}. Merge adapters first (merge_and_unload), or export an .onnx file."
        )


def _contents(quantized: HookedModel, prefix: str, network: nn.Module) -> _Contents:
    contents = _Contents(dict(network.state_dict()))
    parameters = dict(network.named_parameters(remove_duplicate=False))
    owners: dict[str, WeightQuantizer] = {}
    for layer, quantizers in quantized.weights.items():
        name = _weight_name(quantized, layer, prefix, network)
        known = owners.setdefault(name, quantizers[0])
        if known.kind != quantizers[0].kind or known.axis != quantizers[0].axis:
            raise ExportError(
                f"'{prefix}{name}' is read by layers with other bits or groups than '{layer}'. Give them the same, or skip one."
            )
    shared = Counter(id(parameters[name]) for name in parameters)
    for name, quantizer in owners.items():
        weight, module = parameters[name].detach(), network.get_submodule(name.rpartition(".")[0])
        tied = shared[id(parameters[name])] > 1
        if type(module) is not nn.Linear or tied:
            rounded = quantizer(weight).to(weight.dtype)
            for other in [other for other in parameters if parameters[other] is parameters[name]]:
                contents.tensors[other] = rounded
                contents.rounded[other] = None
            continue
        integers, scale = quantizer.quantize(weight)
        base = name.removesuffix(".weight")
        del contents.tensors[name]
        contents.tensors[f"{base}.weight_packed"] = pack(integers, quantizer.num_bits)
        contents.tensors[f"{base}.weight_scale"] = scale.reshape(len(integers), -1).to(weight.dtype)
        contents.tensors[f"{base}.weight_shape"] = torch.tensor(integers.shape)
        zeros = quantizer.zero_points(weight)
        if zeros is not None:
            contents.tensors[f"{base}.weight_zero_point"] = pack(zeros.reshape(len(integers), -1).t(), quantizer.num_bits).t().contiguous()
        contents.schemes[base] = quantizer.num_bits, quantizer.group, quantizer.symmetric
    return contents


def _weight_name(quantized: HookedModel, layer: str, prefix: str, network: nn.Module) -> str:
    """The parameter of a layer's weight in the network: that of a module of its own, read as it is."""
    for parameter in quantized.graph[layer].parameters:
        path, _, own = parameter.removeprefix(prefix).rpartition(".")
        if not parameter.startswith(prefix) or own != "weight":
            continue
        module = network.get_submodule(path)
        if type(module) in (nn.Linear, nn.Embedding) or type(module).__name__ == _TRANSPOSED:
            return f"{path}.weight"
    raise ExportError(
        f"the weight of '{layer}' is not that of a linear layer or an embedding of the network, as {NAME} has them. Skip it (layer_settings: "
        f"{{match: {layer}, skip_quantization: true}}), or export an .onnx file."
    )


def _configuration(schemes: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """What config.json says of the weights: for each number of bits and size of groups the layers that have them."""
    kinds = sorted(set(schemes.values()), key=str)
    groups = {}
    for number, (bits, group, symmetric) in enumerate(kinds):
        grouping = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
        targets = ["Linear"] if len(kinds) == 1 else [name for name, kind in schemes.items() if kind == (bits, group, symmetric)]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **grouping},
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }


def _read_back(path: Path, contents: _Contents) -> None:
    """Compare the file with what was to be written.

    Raises:
        CCOError: A weight is missing, or another.
    """
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        names = set(file.keys())
        wrong = [name for name in contents.schemes if f"{name}.weight_packed" not in names]
        for name, tensor in contents.tensors.items():
            if name in names and not torch.equal(file.get_tensor(name), tensor.cpu()):
                wrong.append(name)
    if wrong:
        raise ExportError(f"{path.name} does not hold what was to be written: {list_names(wrong)}. Export an .onnx file.")
