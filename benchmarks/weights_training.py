"""What weights of few bits cost a language model before and after a training: the character transformer of ``recipes``.

Symmetric weights, weights with zero points, and activations that are rounded when the model runs.

The float model is trained; then it, and it with rounded weights, go on for as many epochs at a tenth of the rate.

Run: ``python benchmarks/weights_training.py [--bits 4 3 2] [--group 32] [--epochs 2] [--seeds 1] [--write]`` (a quarter of an hour on two cores)
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from report import Table, parser, publish
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from char_transformer import CharTransformer, Snippets, load_text
from digits_cnn import quiet

import lightning_cco as cc

_COMMON: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "default_root_dir": "outputs/weights_training",
}


class Text:
    """The loaders, in the same order for every model."""

    def __init__(self, length: int) -> None:
        text = load_text()
        cut = int(0.95 * len(text))
        self._train, self._val = Snippets(text[:cut], length), Snippets(text[cut:], length)

    def train(self, seed: int) -> DataLoader[Any]:
        return DataLoader(self._train, 64, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))

    def val(self) -> DataLoader[Any]:
        return DataLoader(self._val, 64)


def trained_float(text: Text, epochs: int, seed: int) -> CharTransformer:
    """The float model."""
    pl.seed_everything(seed)
    model = CharTransformer()
    pl.Trainer(**_COMMON, max_epochs=epochs).fit(model, text.train(seed))
    model.hparams["lr"] /= 10
    return model


@torch.no_grad()
def loss_of(model: nn.Module, text: Text) -> float:
    """Mean loss over the validation text, nats per character."""
    model.eval()
    losses = [(float(model.loss(tokens)), len(tokens)) for tokens in text.val()]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


@torch.no_grad()
def relative_error(quantized: cc.QuantizedModel) -> float:
    """Squared error of the rounded weights beside their squares, of all that are rounded."""
    error = square = 0.0
    for layer, (quantizer,) in quantized.weights.items():
        weight = quantized.model.get_parameter(quantized.graph[layer].parameters[0])
        error += float((quantizer(weight) - weight).square().sum())
        square += float(weight.square().sum())
    return error / square


def measure(text: Text, model: CharTransformer, recipe: dict[str, Any] | str, epochs: int, seed: int) -> tuple[float, float, float]:
    """Error of the weights, loss with rounded weights before any training, and after it."""
    twin = copy.deepcopy(model)
    tokens = next(iter(text.val()))[:, :-1]
    quantized = cc.quantize(twin, recipe, (tokens,))
    quantized.calibrate([tokens])
    before, error = loss_of(twin, text), relative_error(quantized)
    quantized.remove()
    pl.seed_everything(seed)
    callback = cc.CCOCallback(recipe)
    pl.Trainer(**_COMMON, max_epochs=epochs, callbacks=[callback]).fit(twin, text.train(seed + 1))
    return error, before, loss_of(twin, text)


def recipes(bits: list[int], group: int) -> dict[str, dict[str, Any] | str]:
    """What is compared."""
    found: dict[str, dict[str, Any] | str] = {}
    for count in bits:
        for symmetric in (True, False):
            overall = {"weights_num_bits": count, "weights_group_size": group, "weight_only": True, "skip_tail_quantization": False}
            name = f"{count} bits, {'symmetric' if symmetric else 'with zero points'}"
            found[name] = {
                "global_quantization_settings": overall | {"weights_symmetric": symmetric},
                "monitoring_settings": {"output_dir": None},
            }
    return found | {"`w4a8_dynamic`": "w4a8_dynamic", "`w8a8_dynamic`": "w8a8_dynamic"}


def main() -> None:
    """Train, measure, print."""
    arguments = parser(__doc__)
    arguments.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments.add_argument("--group", type=int, default=32)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--float-epochs", type=int, default=6)
    arguments.add_argument("--seeds", type=int, default=1)
    options = arguments.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    text = Text(64)
    seen: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(1, options.seeds + 1):
        model = trained_float(text, options.float_epochs, seed)
        again = copy.deepcopy(model)
        pl.seed_everything(seed)
        pl.Trainer(**_COMMON, max_epochs=options.epochs).fit(again, text.train(seed + 1))
        seen.setdefault("float", []).append((0.0, loss_of(model, text), loss_of(again, text)))
        print("float", seen["float"][-1], flush=True)
        for name, recipe in recipes(options.bits, options.group).items():
            seen.setdefault(name, []).append(measure(text, model, recipe, options.epochs, seed))
            print(name, seen[name][-1], flush=True)
    publish(_table(seen, options), options)


def _table(seen: dict[str, list[tuple[float, ...]]], options: argparse.Namespace) -> Table:
    means = {name: [sum(values) / len(values) for values in zip(*entries, strict=True)] for name, entries in seen.items()}
    _, plain, trained = means["float"]
    rows = [["float", "", f"{plain:.4f}", "", f"{trained:.4f}", ""]]
    for name, (error, before, after) in means.items():
        if name != "float":
            rows.append([name, f"{error:.5f}", f"{before:.4f}", f"{before - plain:+.4f}", f"{after:.4f}", f"{after - trained:+.4f}"])
    header = ["weights", "relative error", "loss, rounded", "above float", "loss, trained", "above float"]
    note = (
        f"Character transformer of 3 blocks, {options.float_epochs} epochs in float, {options.epochs} more at a tenth of the rate, each from the same float "
        f"model on the same batches; groups of {options.group}, scales that lose least; validation loss in nats per character, mean of {options.seeds} seed"
        f"{'s' if options.seeds > 1 else ''}. Relative error: squared, of all rounded weights before the training."
    )
    return Table(
        "weights-training", "What do weights of few bits cost a language model, before and after a training?", header, rows, [note]
    )


if __name__ == "__main__":
    main()
