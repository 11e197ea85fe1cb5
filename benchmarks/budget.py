"""What a budget is worth: bits chosen for each layer against equal bits everywhere, at the same average, after the same training.

The networks, data and training are those of ``fashion.py``: one epoch from one float network. All layers are quantized, the first and the last too;
activations have 8 bits. Uniform: all weights have the bits of the column. Budget: ``budget_settings: {average_bits: ...}`` of the same number, chosen from
2 to 8 bits and float by the loss sensitivity on ten batches of training images.

Run: ``python benchmarks/budget.py`` (an hour); ``--models resnet --bits 3 4 --seeds 1`` for a part. ``--speed`` (ten minutes): the predicted speed of
plans against the measured one instead, of the same networks with the weights that they begin with, on which times do not depend
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion import OUTPUTS, float_network
from fashion_data import DEBIAN, NETWORKS, Images, load_images
from fashion_training import CALIBRATION_BATCHES, accuracy, batches, train
from report import Table, parser, publish
from torch import nn

from lightning_cco import QuantizedModel, load_settings, measure_layer_times, quantize
from lightning_cco.budget import solver
from lightning_cco.budget.choosing import trade_off
from lightning_cco.budget.integer_program import Choice
from lightning_cco.budget.search import BudgetSearch
from lightning_cco.budget.units import seconds_of_plan, speed_model, timed
from lightning_cco.layer_timing import FileTimer

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
        lambda *bits: quantized.loss_sensitivity(held[:SENSITIVITY_BATCHES], lambda net, batch: net(batch[0]), loss, *bits),
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
        results[f"{name}|float"] = accuracy(start.eval(), data)
        for seed in range(options.seeds):
            for bits in options.bits:
                for plan, make in ((UNIFORM, uniform), (BUDGET, budgeted)):
                    key = f"{name}|{plan}|{bits:g}|{seed}"
                    if f"{key}|after" in results or (plan == UNIFORM and bits != int(bits)):
                        continue
                    model = copy.deepcopy(start).eval()
                    quantized = make(model, data, bits, seed)
                    results[f"{key}|before"] = accuracy(model.eval(), data)
                    torch.manual_seed(seed)
                    train(model.train(), data, 1, 0.01, 1)
                    results[f"{key}|after"] = accuracy(model.eval(), data)
                    quantized.remove()
                    print(f"{key}: {results[f'{key}|before']:.2f} after the calibration, {results[f'{key}|after']:.2f} trained", flush=True)
                    path.write_text(json.dumps(results, indent=1))
    return results


def speeds(name: str, options: argparse.Namespace) -> list[list[str]]:
    """A row for each plan of one network: predicted and measured speed, by turns with the file in float."""
    torch.manual_seed(0)
    model, images = NETWORKS[name][1]().eval(), torch.randn(32, 1, 28, 28)
    settings = load_settings({"budget_settings": {"speed": 1.0}})
    quantized = quantize(model, settings, (images,))
    quantized.calibrate([[images]])
    table = measure_layer_times(quantized, (images,), threads=options.threads, batch_size=options.batch)
    search = BudgetSearch(
        quantized,
        settings,
        lambda names: quantized.calibrate([[images]], only=names),
        lambda *bits: quantized.loss_sensitivity([[images]], None, None, *bits),
        lambda net, batch: net(*batch),
        times=table,
    )
    made, base, _ = search._choices([images])
    made.speed = model_of_times = speed_model(made, base, table)
    made = timed(made)
    plans = {
        "float": search.model.recipe_of(made, base, None),
        "INT8 but for the tail": search.model.recipe_of(made, base, solver.uniform(made, "W8A8", 8)),
    }
    for part, (choice, _) in zip(("fastest", "between", "least loss"), _ends(trade_off(made, "speed", 0.0)), strict=False):
        plans[f"budget, {part}"] = search.model.recipe_of(made, base, choice)
    draw = random.Random(0)
    for number in range(options.random):
        chosen = tuple(draw.choice(group.options) for group in made.groups)
        plans[f"random {number + 1}"] = search.model.recipe_of(made, base, Choice(chosen, {}))
    timer = FileTimer(quantized, *quantized.example, threads=options.threads, batch_size=options.batch)
    predicted, counts = {}, {}
    for plan, recipe in plans.items():
        search.model.replan(recipe)
        timer.export(plan)
        predicted[plan] = seconds_of_plan(model_of_times, quantized.plan)
        counts[plan] = sum(layer.name in quantized.plan.quantized for layer in quantized.graph if layer.weighted)
    measured = {plan: times.total for plan, times in timer.times().items()}
    rows = []
    for plan in plans:
        expected, found = predicted["float"] / predicted[plan], measured["float"] / measured[plan]
        cells = [
            f"{1e6 * predicted[plan]:.0f}",
            f"{1e6 * measured[plan]:.0f}",
            f"{expected:.3f}",
            f"{found:.3f}",
            f"{100 * (expected / found - 1):+.1f} %",
        ]
        rows.append([NETWORKS[name][0], plan, str(counts[plan]), *cells])
        print(rows[-1], flush=True)
    return rows


def _ends(points: list[Any]) -> list[Any]:
    """The first, one in the middle, and the last."""
    return [points[0], points[len(points) // 2], points[-1]]


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
    arguments.add_argument("--speed", action="store_true", help="predicted against measured speed")
    arguments.add_argument("--batch", type=int, default=1, help="samples of a run, with --speed")
    arguments.add_argument("--random", type=int, default=3, help="plans drawn at random, with --speed")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.speed:
        rows = [row for name in options.models for row in speeds(name, options)]
        header = ["network", "plan", "layers in INT8", "predicted µs", "measured µs", "predicted speed", "measured speed", "difference"]
        notes = [
            f"ONNX Runtime, {options.threads} thread, batch {options.batch}; speeds are multiples of the float file's. Predicted: from layer times that were "
            "measured before in other files. Measured: the exported file by turns with the float one, medians. `--speed` again measures another table."
        ]
        publish(Table("budget_speed", "Is the file as fast as a budget predicts?", header, rows, notes), options)
        return
    results = measure(options, load_images(options.data))
    header = ["network", "accuracy", "plan", *(f"{bits:g} bits" for bits in options.bits)]
    notes = [
        "Per cent of the 10,000 test images, activations of 8 bits: mean ± standard deviation over seeds, in brackets how many. Of bits that are no whole "
        "number there is no plan of equal bits; compare with its neighbours. Of one seed, a tenth or two after the training say nothing."
    ]
    publish(Table("budget", "What is a budget worth against equal bits?", header, rows_of(results, options), notes), options)


if __name__ == "__main__":
    main()
