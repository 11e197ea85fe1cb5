"""The demo: train a small CNN on real scans, then compress it to INT8 with one callback.

Run: ``python recipes/digits_cnn.py`` (about a minute on two cores).
"""

from __future__ import annotations

import argparse
import copy
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import onnxruntime as ort
import torch
from digits import DigitsData, DigitsModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_cco import CCOCallback
from lightning_cco.monitoring.tables import float_layers, sensitivity_table, suggestion_lines, text_table

FLOAT_RATE = 2e-3
"""Learning rate of the float training; it ends at a tenth of this, and the compression goes on from there."""


def main(argv: Sequence[str] | None = None) -> CCOCallback:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="w8a8", help="a shipped recipe or the path of a YAML file")
    parser.add_argument("--output", type=Path, default=Path("outputs/digits_cnn"), help="folder for everything written")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of float training; half as many compress")
    parser.add_argument("--fast", action="store_true", help="a few steps only")
    options = parser.parse_args(argv)
    quiet()
    shutil.rmtree(options.output, ignore_errors=True)
    pl.seed_everything(1)
    data = DigitsData()
    limits = {"limit_train_batches": 3, "max_epochs": 1} if options.fast else {}

    print("\n1. Float training")
    model = DigitsModule(lr=FLOAT_RATE)
    trainer = pl.Trainer(**arguments(options.output / "float", options.epochs) | limits)
    trainer.fit(model, data)
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = FLOAT_RATE / 10
    before = trainer.test(model, data, verbose=False)[0]["test_acc"]
    print(f"Float accuracy on the 400 test scans: {100 * before:.2f} %")

    print("\n2. Compression")
    float_model = copy.deepcopy(model).eval()
    model.save_hyperparameters({"lr": FLOAT_RATE / 10})  # what the logger shows, too
    cco = CCOCallback(options.recipe)
    checkpoint = ModelCheckpoint(options.output / "checkpoints", monitor="val_loss")
    logger = TensorBoardLogger(options.output, name="tensorboard", version="digits")
    trainer = pl.Trainer(
        **arguments(options.output, max(1, options.epochs // 2)) | {"callbacks": [cco, checkpoint], "logger": logger} | limits,
    )
    trainer.fit(model, data)
    after = trainer.test(model, data, ckpt_path="best", verbose=False)[0]["test_acc"]
    logger.log_metrics({"hp_metric": after}, trainer.global_step)  # beside the hyperparameters on TensorBoard's page of them

    report(cco, before, after, options.output)

    print("4. Export")
    hand_over(cco, float_model, data, options.output)
    return cco


def arguments(folder: Path, epochs: int) -> dict[str, object]:
    return {
        "max_epochs": epochs,
        "default_root_dir": folder,
        "accelerator": "auto",
        "devices": 1,
        "log_every_n_steps": 10,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": True,
        "logger": False,
        "callbacks": [ModelCheckpoint(folder / "checkpoints")],
    }


def report(cco: CCOCallback, before: float, after: float, output: Path) -> None:
    assert cco.quantized is not None
    assert cco.report is not None
    plan = cco.quantized.plan
    files = sorted(
        path for path in (output / "tensorboard" / "digits" / "cco").iterdir() if path.suffix in (".html", ".png", ".svg", ".yaml", ".csv")
    )
    print("\n3. Result")
    rows = [
        ["float", f"{100 * before:.2f} %"],
        ["INT8 (fake-quantized)", f"{100 * after:.2f} %"],
        ["difference", f"{100 * (after - before):+.2f}"],
    ]
    print(text_table(["model", "test accuracy"], rows, right=[1]))
    print(f"\n{plan.summary}. Left in float:")
    print(float_layers(plan))
    print(f"\n{sensitivity_table(cco.report, plan, most=8)}")
    print("\n".join(suggestion_lines(cco.suggestions, cco.settings)))
    print("\nPictures and files:")
    print("\n".join(f"  {path}" for path in files))
    print(f"\nTensorBoard:  tensorboard --logdir {output / 'tensorboard'}\n")


def hand_over(cco: CCOCallback, float_model: DigitsModule, data: DigitsData, output: Path) -> None:
    """Write the INT8 file, and run it and the model of the float training in ONNX Runtime on the test scans."""
    written = cco.export(output / "digits_int8.onnx")
    images, labels = (torch.stack(part) if torch.is_tensor(part[0]) else torch.tensor(part) for part in zip(*data.test, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        float_path = output / "digits_float.onnx"
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(float_model, (images[:2],), float_path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    sessions = {"float": session(float_path), "INT8": session(Path(written.path))}
    accuracies = {name: float((answer(one, images).argmax(-1) == labels.numpy()).mean()) for name, one in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(200):
        for name, one in sessions.items():
            start = time.perf_counter()
            answer(one, images[:100])
            times[name].append(time.perf_counter() - start)
    speed = statistics.median(f / q for f, q in zip(*times.values(), strict=True))
    rows = [[name, f"{100 * accuracy:.2f} %", f"{1e6 * statistics.median(times[name]):.0f} µs"] for name, accuracy in accuracies.items()]
    print(text_table(["as run by ONNX Runtime", "test accuracy", "time for 100 scans"], rows, right=[1, 2]))
    size = written.size_bytes / float_path.stat().st_size
    print(f"The INT8 file runs {speed:.2f} times as fast as the float file and has {size:.2f} of its size: {written.path}\n")


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answer(one: ort.InferenceSession, images: torch.Tensor) -> np.ndarray:
    return one.run(None, {one.get_inputs()[0].name: images.numpy()})[0]


def quiet() -> None:
    """Leave out what Lightning says of loaders and hardware."""
    warnings.filterwarnings(
        "ignore", message=".*(does not have many workers|LeafSpec|number of training batches|exists and is not empty).*"
    )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).addFilter(lambda record: "available:" not in record.getMessage() and "Tip:" not in record.getMessage())


if __name__ == "__main__":
    main()
