"""Cost of a training step in other tools for quantization-aware training, against the same step in float.

Each tool is set to what is nearest to 8-bit weights per channel and 8-bit activations per tensor for all layers; what it leaves out is said beside it.
Each runs in processes of its own: one for time, two for memory. What is not installed, or fails, says so in the table.

Run: ``make benchmark-peers`` (it makes the environment of ``requirements-peers.txt`` first; about a quarter of an hour on two cores).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from unittest.mock import MagicMock

import torch
from cases import CASES, Case, chosen, training_step
from measure import interleaved, load_kernels, peak_of, resident, run_fresh
from report import Table, parser, publish, version
from torch import Tensor, nn

KEPT = Path("outputs/peers.json")
Prepare = Callable[[nn.Module, Tensor], nn.Module]


def modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda network: network(x))


def fx(model: nn.Module, x: Tensor) -> nn.Module:
    from torch.ao.quantization import default_embedding_qat_qconfig, get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    mapping = get_default_qat_qconfig_mapping("fbgemm").set_object_type(nn.Embedding, default_embedding_qat_qconfig)
    prepared = prepare_qat_fx(model.train(), mapping, (x,))
    prepared(x)
    return prepared


def fx_frozen(model: nn.Module, x: Tensor) -> nn.Module:
    from torch.ao.quantization import disable_observer

    return fx(model, x).apply(disable_observer)


def pt2e(model: nn.Module, x: Tensor) -> nn.Module:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    program = torch.export.export(model.train(), (x,)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = move_exported_model_to_train(prepare_qat_pt2e(program, quantizer))
    prepared(x)
    return prepared


def nncf(model: nn.Module, x: Tensor) -> nn.Module:
    # It builds its kernels at the first use, which takes longer than it is ready to wait by itself.
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    import nncf

    kind = nncf.ModelType.TRANSFORMER if any(isinstance(module, nn.LayerNorm) for module in model.modules()) else None
    data = nncf.Dataset([x])
    return nncf.quantize(model, data, preset=nncf.QuantizationPreset.MIXED, subset_size=1, model_type=kind)


def aimet(model: nn.Module, x: Tensor) -> nn.Module:
    # torchvision does not load beside torch's CPU build; aimet imports it for data sets and detection layers that no case here has.
    for part in ("torchvision", "torchvision.datasets", "torchvision.ops", "torchvision.transforms"):
        sys.modules[part] = MagicMock()
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    settings = resources.files("aimet_torch.common.quantsim_config") / "default_config_per_channel.json"
    simulation = QuantizationSimModel(prepare_model(model.eval()), x, config_file=str(settings))
    simulation.compute_encodings(lambda network: network(x))
    return simulation.model


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import COMPUTE_LAYER_MAP, preprocess_for_quantize, quantize

    prepared = preprocess_for_quantize(model.eval(), relu6_to_relu=False)
    quantized = quantize(prepared, compute_layer_map=_per_channel(COMPUTE_LAYER_MAP))
    with torch.no_grad(), calibration_mode(quantized):
        quantized(x)
    return quantized


def brevitas_layerwise(model: nn.Module, x: Tensor) -> nn.Module:
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import LAYERWISE_COMPUTE_LAYER_MAP, layerwise_quantize

    quantized = layerwise_quantize(model.eval(), compute_layer_map=_per_channel(LAYERWISE_COMPUTE_LAYER_MAP))
    with torch.no_grad(), calibration_mode(quantized):
        quantized(x)
    return quantized


def _per_channel(layers: dict) -> dict:
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat

    changed = copy.copy(layers)
    for layer, entry in layers.items():
        if entry is not None and entry[1].get("weight_quant") is Int8WeightPerTensorFloat:
            changed[layer] = (entry[0], {**entry[1], "weight_quant": Int8WeightPerChannelFloat})
    return changed


@dataclass(frozen=True)
class Tool:
    """Another tool.

    Attributes:
        name: What the table calls it.
        package: Its distribution, for the version.
        prepare: Makes a network ready for quantization-aware training, calibrated on the given inputs.
        ranges: How the ranges of its activations come about in training.
        leaves_out: What it does not quantize in this setting, or does otherwise.
    """

    name: str
    package: str
    prepare: Prepare
    ranges: str
    leaves_out: str


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "ModelOpt",
            "nvidia-modelopt",
            modelopt,
            "fixed",
            "all but weights and inputs of weighted modules: additions, attention's products",
        ),
        Tool(
            "torch.ao FX",
            "torch",
            fx,
            "moving average",
            "attention's products, GELU and layer norm run between quantized tensors; 7-bit activations",
        ),
        Tool("torch.ao FX, observers off", "torch", fx_frozen, "fixed", "as above"),
        Tool("torchao PT2E", "torchao", pt2e, "moving average", "what its X86InductorQuantizer does not list"),
        Tool("NNCF", "nncf", nncf, "learned", "nothing that its OpenVINO target runs in INT8"),
        Tool("AIMET", "aimet-torch", aimet, "learned", "nothing: outputs of all modules"),
        Tool("Brevitas", "brevitas", brevitas, "learned after 300 steps", "batch norms are merged into convolutions first"),
        Tool(
            "Brevitas, layerwise",
            "brevitas",
            brevitas_layerwise,
            "learned after 300 steps",
            "all but weights and inputs of weighted modules",
        ),
    )
}


def measured(tool: Tool, case: Case, rounds: int) -> dict[str, float]:
    """Set-up time and step ratio of a tool, in this process."""
    inputs, targets = case.batch()
    float_model, model = case.model(), case.model()
    start = time.perf_counter()
    prepared = tool.prepare(model, inputs)
    set_up = time.perf_counter() - start
    _train(prepared)
    steps = {
        "float": training_step(float_model, list(float_model.parameters()), (inputs, targets)),
        "quantized": training_step(prepared, [p for p in prepared.parameters() if p.requires_grad], (inputs, targets)),
    }
    found = interleaved(steps, rounds)["quantized"]
    return {"set_up": set_up, "ratio": found.ratio, "low": found.low, "high": found.high}


def peak(tool: Tool | None, case: Case) -> dict[str, float]:
    """Peak memory of a step in this process in MiB; in float without a tool."""
    load_kernels()
    before = resident("VmRSS")
    model, (inputs, targets) = case.model(), case.batch()
    if tool is not None:
        model = tool.prepare(model, inputs)
        _train(model)
    return {"peak": peak_of(training_step(model, [p for p in model.parameters() if p.requires_grad], (inputs, targets)), before)}


def _train(model: nn.Module) -> None:
    if not isinstance(model, torch.fx.GraphModule) or not hasattr(model, "_exported_training"):
        model.train()


def run(*arguments: str) -> dict[str, float] | str:
    """One measurement in a fresh process: figures, or why there are none."""
    try:
        return dict(json.loads(run_fresh(__file__, *arguments, for_memory=arguments[0] == "--peak")))
    except subprocess.CalledProcessError as failure:
        lines = [line.strip() for line in failure.stderr.splitlines() if line.strip()]
        reasons = [line for line in lines if _ERROR.match(line)]
        reason = (reasons or lines or [f"exit {failure.returncode}"])[-1]
        if reason.startswith("ModuleNotFoundError"):
            return "not installed"
        return f"fails: {reason if len(reason) < 120 else reason[:117] + '…'}"


_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


def row(tool: Tool, case: Case, float_peak: float, options: argparse.Namespace) -> list[str]:
    common = (tool.name, case.name, "--threads", str(options.threads))
    times = run("--one", *common, "--rounds", str(options.rounds))
    if isinstance(times, str):
        return [case.name, tool.name, times, "", "", tool.ranges]
    memory = run("--peak", *common)
    ratio = f"{times['ratio']:.2f} ({times['low']:.2f}–{times['high']:.2f})"
    return [
        case.name,
        tool.name,
        ratio,
        memory if isinstance(memory, str) else f"{memory['peak'] / float_peak:.2f}",
        f"{times['set_up']:.1f}",
        tool.ranges,
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="*", default=[], help="parts of the names of the cases")
    arguments.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS))
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--resume", action="store_true", help=f"keep what earlier runs have measured ({KEPT})")
    arguments.add_argument("--one", nargs=2, metavar=("TOOL", "CASE"), help=argparse.SUPPRESS)
    arguments.add_argument("--peak", nargs=2, metavar=("TOOL", "CASE"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measured(TOOLS[options.one[0]], CASES[options.one[1]], options.rounds)))
    elif options.peak:
        print(json.dumps(peak(TOOLS.get(options.peak[0]), CASES[options.peak[1]])))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    kept: dict[str, list[str]] = json.loads(KEPT.read_text()) if options.resume and KEPT.exists() else {}
    KEPT.parent.mkdir(exist_ok=True)
    cases, tools = chosen(options.models), [TOOLS[name] for name in options.tools]
    for case in cases:
        missing = [tool for tool in tools if f"{tool.name} / {case.name}" not in kept]
        if not missing:
            continue
        base = run("--peak", "float", case.name, "--threads", str(options.threads))
        assert isinstance(base, dict), base
        for tool in missing:
            found = kept[f"{tool.name} / {case.name}"] = row(tool, case, base["peak"], options)
            KEPT.write_text(json.dumps(kept, ensure_ascii=False, indent=1))
            print(" | ".join(found), flush=True)
    table = [kept[f"{tool.name} / {case.name}"] for case in cases for tool in tools]
    notes = [f"- {tool.name} ({version(tool.package)}) leaves out: {tool.leaves_out}." for tool in tools]
    header = ["model", "tool", "step ÷ float", "memory ÷ float", "set-up s", "ranges"]
    publish(Table("peers", "What does a training step cost in other tools?", header, table, ["\n".join(notes)]), options)


if __name__ == "__main__":
    main()
