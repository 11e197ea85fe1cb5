"""The accuracy at few bits: three small networks on Fashion-MNIST, trained on for one epoch from one float network.

By default the first convolution and the input have 8 bits, and the last layer stays in float; everything else has the bits of its column, but for what
no layer multiplies as integers. Every training is one epoch of
SGD (momentum 0.9, learning rate 0.01 down to 0 by a cosine) over 20,000 images from the same float network, and its test one of 10,000 images. A seed
changes the order of the batches.

Run: ``python benchmarks/fashion.py`` (hours); ``--models resnet --bits w2a2 --seeds 1`` for a part (minutes)
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fashion_data import DEBIAN, NETWORKS, Images, load_images
from fashion_tools import TOOLS
from fashion_training import BATCH, BITS, Loss, accuracy, calibration_batches, train
from fashion_training import float_network as trained_or_kept
from report import Table, parser, publish
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.distillation.terms import class_divergence

OUTPUTS = Path("outputs/fashion")
TEMPERATURE, WEIGHT = 2.0, 0.7
SCALE_RATE = 0.001  # learning rate of learned scales
FLOAT, REESTIMATED = "float, continued", "ranges estimated again every 50 steps"
LEARNED = "learned scales (LSQ+)"
DISTILLED = "defaults and distillation (temperature 2, weight 0.7)"
FIRST = "input and first convolution"
PLAIN = {"residual_stream": "quantized"}  # what estimators are compared with: all activations of the same bits
TRAININGS: dict[str, dict[str, str]] = {
    FLOAT: {},
    "defaults (`auto`)": {},
    "`moving_average` ranges, `minmax` weights": {"range_estimator": "moving_average", "weight_estimator": "minmax", **PLAIN},
    "`auto` ranges, `minmax` weights": {"weight_estimator": "minmax", **PLAIN},
    "`mse` ranges that move, `auto` weights": {"range_estimator": "mse", **PLAIN},
    REESTIMATED: PLAIN,
    DISTILLED: {},
    LEARNED: {"range_estimator": "learned", "weight_estimator": "learned"},
    "learned weight scales, `auto` ranges": {"weight_estimator": "learned"},
    "learned ranges, `auto` weights": {"range_estimator": "learned"},
    "input and first convolution of few bits, too": {FIRST: "few"},
    "`residual_stream: quantized`": {"residual_stream": "quantized"},
    "`residual_stream: int8`": {"residual_stream": "int8"},
    "`residual_stream: float`": {"residual_stream": "float"},
}
"""The settings of each row beside the bits."""

Results = dict[str, float | str]
"""Accuracy by network, training, bits and seed; or, of other tools, why there is none."""


def float_network(name: str, data: Images, keep: bool) -> nn.Module:
    """The one float network of a kind, trained, or as an earlier run left it."""
    return trained_or_kept(NETWORKS[name][1], OUTPUTS / f"{name}.pt", data, keep)


def quantized_network(model: nn.Module, data: Images, bits: str, settings: dict[str, str], seed: int) -> QuantizedModel:
    """A float network with quantization hooked on and calibrated."""
    weights, activations = BITS[bits]
    everywhere = {key: value for key, value in settings.items() if key == "residual_stream"}
    few = [{"match": "conv", "weights_num_bits": weights}, {"match": "input_0", "activations_num_bits": activations}]
    recipe = {
        "global_quantization_settings": {"weights_num_bits": weights, "activations_num_bits": activations, **everywhere},
        "training_settings": {key: value for key, value in settings.items() if key not in (FIRST, *everywhere)},
        "layer_settings": few if FIRST in settings else [],
    }
    quantized = quantize(model, recipe, (data.train[:BATCH],))
    quantized.calibrate([images] for images in calibration_batches(data, seed))
    return quantized


def one(start: nn.Module, data: Images, training: str, bits: str, seed: int) -> float:
    """Accuracy after one training."""
    model = copy.deepcopy(start)
    each_step: Callable[[int], None] = lambda step: None  # noqa: E731
    after_step: Callable[[float], None] = lambda share: None  # noqa: E731
    if training != FLOAT:
        quantized = quantized_network(model, data, bits, TRAININGS[training], seed)
        if training == REESTIMATED:
            held = [[images] for images in calibration_batches(data, seed)]
            each_step = lambda step: None if step == 0 or step % 50 else (quantized.calibrate(held), None)[1]  # noqa: E731
        after_step = lambda share: setattr(quantized.scales, "rate", SCALE_RATE * share)  # noqa: E731
    torch.manual_seed(seed)
    loss_of = _distilled(copy.deepcopy(start).eval()) if training == DISTILLED else _plain
    train(model.train(), data, 1, 0.01, 1, each_step, after_step, loss_of)
    return accuracy(model.eval(), data)


def _plain(scores: Tensor, classes: Tensor, images: Tensor) -> Tensor:
    return F.cross_entropy(scores, classes)


def _distilled(teacher: nn.Module) -> Loss:
    """The loss that `lightning_cco.distillation` makes with a teacher."""

    def loss(scores: Tensor, classes: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teacher(images)
        return (1 - WEIGHT) * F.cross_entropy(scores, classes) + WEIGHT * class_divergence(scores, taught, 1, TEMPERATURE)

    return loss


def measure(options: argparse.Namespace, data: Images) -> Results:
    """All results asked for, by network, training, bits and seed; each is kept as soon as it is there."""
    path = OUTPUTS / "results.json"
    results: Results = json.loads(path.read_text()) if (options.resume or options.table) and path.is_file() else {}
    if options.table:
        options.models = [name for name in options.models if f"{name}|float" in results]
        return results
    for name in options.models:
        start = float_network(name, data, options.resume)
        results[f"{name}|float"] = accuracy(start.eval(), data)
        for seed in range(options.seeds):
            for bits in options.bits:
                for training in options.trainings:
                    key = "|".join([name, training, "" if training == FLOAT else bits, str(seed)])
                    if key not in results:
                        results[key] = one(start, data, training, bits, seed)
                        print(f"{key}: {results[key]:.2f}", flush=True)
                        others = (
                            json.loads(path.read_text()) if options.resume and path.is_file() else {}
                        )  # another run may have added some
                        path.write_text(json.dumps(others | results, indent=1))
    return results


def rows_of(results: Results, options: argparse.Namespace) -> list[list[str]]:
    rows = []
    for name in options.models:
        shown = f"{NETWORKS[name][0]} (float {results[f'{name}|float']:.2f})"
        for training in [*options.trainings, *options.tools]:
            cells = []
            for bits in options.bits:
                prefix = "|".join([name, training, "" if training == FLOAT else bits, ""])
                found = [value for key, value in results.items() if key.startswith(prefix)]
                values = [value for value in found if not isinstance(value, str)]
                if found and not values:
                    cells.append(str(found[0]))
                    continue
                spread = f" ± {statistics.stdev(values):.2f} ({len(values)})" if len(values) > 1 else f" ({len(values)})"
                cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "")
            rows.append([shown, training, *cells])
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, default=DEBIAN, help="folder of the four .gz files of Fashion-MNIST")
    arguments.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    arguments.add_argument("--bits", nargs="+", choices=list(BITS), default=list(BITS))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--trainings", nargs="+", type=int, help="rows to measure, by number from 0 on; default: all")
    arguments.add_argument(
        "--tools", nargs="*", choices=list(TOOLS), default=list(TOOLS), help="rows that benchmarks/fashion_peers.py measured"
    )
    arguments.add_argument("--resume", action="store_true", help="keep what an earlier run measured, and its float networks")
    arguments.add_argument("--table", action="store_true", help="measure nothing, show what earlier runs did")
    arguments.set_defaults(threads=1)
    options = arguments.parse_args()
    options.trainings = [list(TRAININGS)[number] for number in options.trainings or range(len(TRAININGS))]
    torch.set_num_threads(options.threads)
    results = measure(options, load_images(options.data))
    rows = [row for row in rows_of(results, options) if any(row[2:])]
    header = ["network", "training", *(bits.upper() for bits in options.bits)]
    notes = [
        "Accuracy in per cent of the 10,000 test images after one more epoch: mean ± standard deviation over seeds, in brackets how many. "
        "`auto` ranges are frozen from 4 bits down; the first convolution and the input have 8 bits, the last layer is in float, and what "
        "no layer multiplies as integers has 8 bits. A cell without "
        "a figure was not measured. Rows that compare other estimators than learned ones are with `residual_stream: quantized`. Other tools train for the "
        "same epoch from the same float network (`benchmarks/fashion_tools.py` says how each is set up); Brevitas and ModelOpt round what "
        "weighted layers read, so additions read floats: `residual_stream: float` is their like."
    ]
    publish(Table("fashion", "How accurate is a network at few bits?", header, rows, notes), options)


if __name__ == "__main__":
    main()
