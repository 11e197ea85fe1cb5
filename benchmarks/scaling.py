"""How the cost of fake-quantization grows with depth, width and batch.

Run: ``python benchmarks/scaling.py`` (two minutes or so)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from cases import Case, decoder, images, text, training_step
from export_models import ResNet18
from measure import interleaved
from qat_step import KINDS, prepared
from report import Table, parser, publish


def networks() -> Iterator[tuple[str, Case]]:
    """What varies, and the network with it."""
    for depth in (2, 6, 12):
        yield f"depth {depth}", Case("transformer, width 128, 16×128", partial(decoder, 128, depth), text(16, 128))
    for width in (64, 256, 512):
        yield f"width {width}", Case("transformer, depth 2, 16×128", partial(decoder, width, 2), text(16, 128))
    for batch in (1, 4, 64):
        yield f"batch {batch}", Case("transformer, depth 2, width 128, length 128", partial(decoder, 128, 2), text(batch, 128))
    for width in (16, 32, 64):
        yield f"width {width}", Case("ResNet-18, 8×3×64×64", partial(ResNet18, width), images(64, 8))
    for batch in (1, 8, 32):
        yield f"batch {batch}", Case("ResNet-18, width 32, 64×64", partial(ResNet18, 32), images(64, batch))


def measured(varied: str, case: Case, rounds: int) -> list[str]:
    models = {kind: prepared(case, kind) for kind in KINDS}
    found = interleaved({kind: training_step(model, list(model.parameters()), case.batch()) for kind, (model, _) in models.items()}, rounds)
    quantized = models["frozen"][1]
    assert quantized is not None
    count = len(quantized.activations) + sum(map(len, quantized.weights.values()))
    extra = found["frozen"].seconds - found["float"].seconds
    return [
        case.name,
        varied,
        f"{1e3 * found['float'].seconds:.1f}",
        str(found["frozen"]),
        str(found["moving average"]),
        str(count),
        f"{1e6 * extra / count:.0f}",
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=9)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measured(varied, case, options.rounds) for varied, case in networks()]
    header = ["network", "varied", "float ms", "frozen ranges", "moving average", "quantizers", "extra µs a quantizer"]
    publish(Table("scaling", "How does the cost grow with depth, width and batch?", header, rows), options)


if __name__ == "__main__":
    main()
