"""What the shortcuts cost in accuracy: training on real data with the library's kernels against a plain fake-quantizer made of PyTorch's operators.

Every seed trains a float network first; from there every variant goes on with the same batches in the same order and the same dropout. So what a seed
changes and what a variant changes can be told apart.

Run: ``python benchmarks/accuracy.py`` (a few minutes)
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import loss_of
from plain import Plain
from report import Table, parser, publish
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cco import quantize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))
from char_transformer import CharTransformer, Snippets, load_text
from digits import DigitsData, DigitsModule

Batches = list[tuple[Tensor, Tensor]]
Prepared = Callable[[Tensor], Tensor]
PLAIN = "plain, moving average"
CALIBRATION_BATCHES = 20


@dataclass(frozen=True)
class Task:
    """A network, its data, and what is reported of it.

    Attributes:
        name: Network and data.
        make: Builds the network.
        train: Batches to train on, in an order drawn from the global random state.
        test: Batches to judge by.
        judge: From logits and targets to the figures reported, means over the values of a batch.
        figures: What they are called.
        rate: Learning rate of the float training; a tenth of it afterwards.
        float_steps: Steps of the float training.
        steps: Steps of each variant after it.
    """

    name: str
    make: Callable[[], nn.Module]
    train: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    test: Batches
    judge: Callable[[Tensor, Tensor], tuple[float, ...]]
    figures: tuple[str, ...]
    rate: float
    float_steps: int
    steps: int


def digits() -> Task:
    data = DigitsData()
    data.setup()

    def judge(logits: Tensor, targets: Tensor) -> tuple[float, ...]:
        return 100 * float((logits.argmax(-1) == targets).float().mean()), float(loss_of(logits, targets))

    figures = ("test accuracy %", "test loss")
    return Task("digits CNN", DigitsModule, data.train_dataloader, list(data.test_dataloader()), judge, figures, 2e-3, 228, 114)


def characters() -> Task:
    text, length = load_text(), 64
    cut = int(0.95 * len(text))

    def pairs(loader: DataLoader) -> Iterable[tuple[Tensor, Tensor]]:
        return ((tokens[:, :-1], tokens[:, 1:]) for tokens in loader)

    def judge(logits: Tensor, targets: Tensor) -> tuple[float, ...]:
        return (float(F.cross_entropy(logits.flatten(0, -2), targets.flatten())),)

    train = DataLoader(Snippets(text[:cut], length), 64, shuffle=True, drop_last=True)
    test = list(pairs(DataLoader(Snippets(text[cut:], length), 64, drop_last=True)))[:24]
    return Task("character transformer", CharTransformer, lambda: pairs(train), test, judge, ("validation loss",), 2e-3, 400, 100)


def train(model: Prepared, parameters: Iterable[nn.Parameter], task: Task, rate: float, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    done = 0
    while done < steps:
        for inputs, targets in task.train():
            optimizer.zero_grad()
            loss_of(model(inputs), targets).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break


def judged(model: nn.Module, task: Task) -> tuple[float, ...]:
    model.eval()
    with torch.no_grad():
        found = [task.judge(model(inputs), targets) for inputs, targets in task.test]
    return tuple(statistics.fmean(values) for values in zip(*found, strict=True))


def variant(model: nn.Module, task: Task, seed: int, plain: bool = False, moving: bool = True, compiled: bool = False) -> None:
    """Train a copy of the float network on with quantization."""
    torch.manual_seed(seed)
    batches = [inputs for _, (inputs, _) in zip(range(CALIBRATION_BATCHES), task.train(), strict=False)]
    quantized = quantize(model, None, (batches[0],))
    quantized.calibrate([inputs] for inputs in batches)
    if plain:
        Plain(quantized, moving)
    elif not moving:
        quantized.freeze_ranges()
    run = torch.compile(model) if compiled else model
    model.train()
    train(run, model.parameters(), task, task.rate / 10, task.steps, seed)


def float_on(model: nn.Module, task: Task, seed: int) -> None:
    train(model, model.parameters(), task, task.rate / 10, task.steps, seed)


VARIANTS: dict[str, Callable[[nn.Module, Task, int], None]] = {
    "float": float_on,
    PLAIN: partial(variant, plain=True),
    "ours, moving average (default)": variant,
    "ours, moving average, compiled": partial(variant, compiled=True),
    "plain, frozen": partial(variant, plain=True, moving=False),
    "ours, frozen": partial(variant, moving=False),
}


def compare(task: Task, seeds: int) -> list[list[str]]:
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = task.make().train()
        train(start, start.parameters(), task, task.rate, task.float_steps, seed)
        for name, continue_training in VARIANTS.items():
            model = copy.deepcopy(start)
            continue_training(model, task, seed)
            found[name].append(judged(model, task))
    return [row for number, figure in enumerate(task.figures) for row in _rows(task, figure, number, found)]


def _rows(task: Task, figure: str, number: int, found: dict[str, list[tuple[float, ...]]]) -> list[list[str]]:
    rows = []
    for name, results in found.items():
        values = [result[number] for result in results]
        reference = [result[number] for result in found[PLAIN if "frozen" not in name else "plain, frozen"]]
        differences = [value - other for value, other in zip(values, reference, strict=True)]
        spread = f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}"
        against = (
            f"{statistics.fmean(differences):+.2g} ± {statistics.stdev(differences):.2g}" if name.startswith(("ours", "float")) else ""
        )
        rows.append([task.name, figure, name, spread, against])
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.set_defaults(threads=1)  # the networks are too small to share out
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for task in (digits(), characters()) for row in compare(task, options.seeds)]
    header = ["task", "figure", "training", "mean ± spread over seeds", "difference from plain, same seed"]
    notes = [
        "Spread: standard deviation over the seeds. A difference from the plain version is taken seed by seed, with the same ranges (moving or frozen); "
        "no loss beyond the seeds' spread means that it is smaller than what another seed changes."
    ]
    publish(Table("accuracy", "Do the shortcuts cost accuracy?", header, rows, notes), options)


if __name__ == "__main__":
    main()
