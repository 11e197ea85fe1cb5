"""The accuracy at few bits with other tools: the trainings of ``fashion.py`` from the same float networks, into the same results.

Runs in the environment of ``requirements-peers.txt``; a tool that is not installed there, fails or has no such bits says so in the table, which
``fashion.py --table`` then writes with its own rows.

Run: ``make benchmark-accuracy`` (hours); ``--tools ModelOpt --models resnet --bits w4a4 --seeds 1`` for a part, ``--steps 3`` to try the tools out
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from fashion_data import DEBIAN, NETWORKS, Images, load_images
from fashion_tools import TOOLS, Refused, Tool
from fashion_training import BITS, accuracy, calibration_batches, float_network, train
from torch import nn

OUTPUTS = Path("outputs/fashion")
LONGEST_REASON = 60


def one(tool: Tool, start: nn.Module, data: Images, bits: str, seed: int, most_steps: int | None) -> float | str:
    """Accuracy after one training; in words why there is none."""
    try:
        model = tool.prepare(copy.deepcopy(start).eval(), calibration_batches(data, seed), *BITS[bits])
        torch.manual_seed(seed)
        train(model, data, 1, 0.01, 1, most_steps=most_steps)
        return accuracy(model.eval(), data)
    except Refused as reason:
        return f"refuses: {reason}"
    except ModuleNotFoundError as error:
        return f"not installed ({error.name})"
    except Exception as error:  # whatever a tool may raise is what the table says of it
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return f"fails: {message if len(message) <= LONGEST_REASON else message[:LONGEST_REASON] + '…'}"


def measure(options: argparse.Namespace, data: Images) -> None:
    """Everything asked for that an earlier run has not measured; each is kept as soon as it is there."""
    path = OUTPUTS / "results.json"
    for name in options.models:
        start = float_network(NETWORKS[name][1], OUTPUTS / f"{name}.pt", data, keep=True)
        for seed in range(options.seeds):
            for bits in options.bits:
                for tool in options.tools:
                    key = "|".join([name, tool, bits, str(seed)])
                    results = json.loads(path.read_text()) if path.is_file() else {}
                    if options.resume and isinstance(results.get(key), float):
                        continue
                    found = one(TOOLS[tool], start, data, bits, seed, options.steps)
                    print(f"{key}: {found if isinstance(found, str) else round(found, 2)}", flush=True)
                    if options.steps is None:
                        results = json.loads(path.read_text()) if path.is_file() else {}  # another run may have added some
                        path.write_text(json.dumps(results | {key: found}, indent=1))


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--data", type=Path, default=DEBIAN, help="folder of the four .gz files of Fashion-MNIST")
    arguments.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    arguments.add_argument("--bits", nargs="+", choices=list(BITS), default=list(BITS))
    arguments.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, help="train for so many steps alone, and keep nothing: to see whether the tools run")
    arguments.add_argument("--resume", action="store_true", help="keep what an earlier run measured")
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    data = load_images(options.data)
    if options.steps is not None:
        data = Images(data.train, data.train_classes, data.test[:500], data.test_classes[:500])
    measure(options, data)


if __name__ == "__main__":
    main()
