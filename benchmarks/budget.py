"""What a budget is worth: bits chosen for each layer against equal bits everywhere, at the same average, after the same training.

The networks, data and training are those of ``fashion.py``: one epoch from one float network. All layers are quantized, the first and the last too;
activations have 8 bits. Uniform: all weights have the bits of the column. Budget: ``budget_settings: {average_bits: ...}`` of the same number, chosen from
2, 3, 4, 8 bits and float by the loss sensitivity on ten batches of training images.

Run: ``python benchmarks/budget.py`` (an hour); ``--models resnet --bits 3 4 --seeds 1`` for a part
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion import CALIBRATION_BATCHES, OUTPUTS, accuracy, batches, float_network, train
from fashion_data import DEBIAN, NETWORKS, Images, load_images
from report import Table, parser, publish
from torch import nn

from lightning_cco import QuantizedModel, load_settings, quantize
from lightning_cco.budget.search import BudgetSearch

SENSITIVITY_BATCHES = 10
UNIFORM, BUDGET = "equal bits", "budget"
Results = dict[str, float]


def calibrated(model: nn.Module, data: Images, recipe: dict[str, Any], seed: int) -> tuple[QuantizedModel, list[Any]]:
    """A float network with quantization hooked on and calibrated; and the batches that did it."""
    quantized = quantize(model, recipe, (data.train[:64],))
    torch.manual_seed(1000 + seed)
    held = [batch for _, batch in zip(range(CALIBRATION_BATCHES), batches(data), strict=False)]
    quantized.calibrate([images] for images, _ in held)
    return quantized, held


def uniform(model: nn.Module, data: Images, bits: float, seed: int) -> QuantizedModel:
    """The network with equal bits everywhere."""
    whole = {"skip_tail_quantization": False, "weights_num_bits": int(bits)}
    return calibrated(model, data, {"global_quantization_settings": whole}, seed)[0]


def budgeted(model: nn.Module, data: Images, bits: float, seed: int) -> QuantizedModel:
    """The network with the plan of a budget."""
    settings = load_settings({"global_quantization_settings": {"skip_tail_quantization": False}, "budget_settings": {"average_bits": bits}})
    quantized, held = calibrated(model, data, settings.to_dict(), seed)

    def loss(net: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(net(batch[0]), batch[1])

    search = BudgetSearch(
        quantized,
        settings,
        lambda names: quantized.calibrate([[images] for images, _ in held], only=names),
        lambda: quantized.loss_sensitivity(held[:SENSITIVITY_BATCHES], lambda net, batch: net(batch[0]), loss),
        lambda net, batch: net(batch[0]),
    )
    plan = search.find(held[0])
    print(", ".join(f"{entry.layer}: {entry.weights}" for entry in plan.layers), f"average {plan.chosen.average_bits:.3f}", flush=True)
    return quantized


def measure(options: argparse.Namespace, data: Images) -> Results:
    """All accuracies asked for, each kept as soon as it is there: by network, plan, bits, seed, and before or after the training."""
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    path = OUTPUTS / "budget.json"
    results: Results = json.loads(path.read_text()) if options.resume and path.is_file() else {}
    for name in options.models:
        start = float_network(name, data, options.resume)
        results[f"{name}|float"] = accuracy(start, data)
        for seed in range(options.seeds):
            for bits in options.bits:
                for plan, make in ((UNIFORM, uniform), (BUDGET, budgeted)):
                    key = f"{name}|{plan}|{bits:g}|{seed}"
                    if f"{key}|after" in results or (plan == UNIFORM and bits != int(bits)):
                        continue
                    model = copy.deepcopy(start).eval()
                    quantized = make(model, data, bits, seed)
                    results[f"{key}|before"] = accuracy(model, data)
                    torch.manual_seed(seed)
                    train(model, data, 1, 0.01, 1)
                    results[f"{key}|after"] = accuracy(model, data)
                    quantized.remove()
                    print(f"{key}: {results[f'{key}|before']:.2f} after the calibration, {results[f'{key}|after']:.2f} trained", flush=True)
                    path.write_text(json.dumps(results, indent=1))
    return results


def rows_of(results: Results, options: argparse.Namespace) -> list[list[str]]:
    """A row for each network, plan and moment."""
    rows = []
    for name in options.models:
        for when, words in (("before", "after the calibration"), ("after", "after one epoch")):
            for plan in (UNIFORM, BUDGET):
                cells = []
                for bits in options.bits:
                    values = [
                        value for key, value in results.items() if key.startswith(f"{name}|{plan}|{bits:g}|") and key.endswith(f"|{when}")
                    ]
                    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.fmean(values):.2f}{spread} ({len(values)})" if values else "")
                rows.append([f"{NETWORKS[name][0]} (float {results[f'{name}|float']:.2f})", words, plan, *cells])
    return rows


def main() -> None:
    """Measure, print, and write if asked to."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, default=DEBIAN, help="folder of the four .gz files of Fashion-MNIST")
    arguments.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    arguments.add_argument("--bits", nargs="+", type=float, default=[3, 3.5, 4, 5, 6], help="average bits of the weights")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--resume", action="store_true", help="keep what an earlier run measured, and its float networks")
    arguments.set_defaults(threads=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(options, load_images(options.data))
    header = ["network", "accuracy", "plan", *(f"{bits:g} bits" for bits in options.bits)]
    notes = [
        "Per cent of the 10,000 test images, activations of 8 bits: mean ± standard deviation over seeds, in brackets how many. Of bits that are no whole "
        "number there is no plan of equal bits; compare with its neighbours. Of one seed, a tenth or two after the training say nothing."
    ]
    publish(Table("budget", "What is a budget worth against equal bits?", header, rows_of(results, options), notes), options)


if __name__ == "__main__":
    main()
