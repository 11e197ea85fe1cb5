"""Kinds of models and ways of training them, in any combination: ``python combination.py FOLDER MODEL FEATURE ...`` trains one on two processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import transformers as hf
from export_models import LSTMClassifier, ViT
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning_modules import Losses, RangesMoved, make_trainer, quick
from models import ResidualCNN
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from weight_averages import averaging

FEATURES = ("compile", "bf16", "ddp", "checkpointing", "ema", "resume", "test", "partial_batch", "configure_model")
EPOCHS, SAMPLES, BATCH = 2, 32, 8


def bert() -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=30, **size, **dropout, max_position_embeddings=16, num_labels=5, use_cache=False)
    )


def numbered(x: Tensor, y: Tensor) -> list[Any]:
    return list(zip(x, y, strict=True))


def images(channels: int) -> Callable[[], list[Any]]:
    return lambda: numbered(torch.randn(SAMPLES, channels, 8, 8), torch.randint(0, 5, (SAMPLES,)))


def sentences() -> list[Any]:
    return numbered(torch.randint(0, 30, (SAMPLES, 7)), torch.randint(0, 5, (SAMPLES,)))


def named_sentences() -> list[Any]:
    return [{"input_ids": words, "labels": label, "attention_mask": torch.ones_like(words)} for words, label in sentences()]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "CNN": (partial(ResidualCNN, classes=5), images(1)),
    "ViT": (partial(ViT, width=16, depth=2, heads=2, image=8, patch=4, classes=5), images(3)),
    "Hugging Face": (bert, named_sentences),
    "LSTM": (LSTMClassifier, sentences),
}


def checkpointed(net: nn.Module) -> None:
    """Recompute the inner parts in the backward."""
    if isinstance(net, hf.PreTrainedModel):
        net.gradient_checkpointing_enable({"use_reentrant": False})
        return
    for part in getattr(net, "blocks", None) or [net.lstm, net.hidden]:
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)


class Combined(pl.LightningModule):
    def __init__(self, model: str, features: frozenset[str]) -> None:
        super().__init__()
        self.model, self.features, self.net = model, features, None
        if "configure_model" not in features:
            self.build()

    def build(self) -> None:
        torch.manual_seed(2)
        self.net = MODELS[self.model][0]()
        if "checkpointing" in self.features:
            checkpointed(self.net)
        if "compile" in self.features:
            torch._dynamo.config.allow_rnn = True  # else the compiler leaves the whole forward of an LSTM to Python
            self.net.compile(backend="aot_eager", fullgraph=True, dynamic=False)

    def loss(self, batch: Any) -> Tensor:
        return self.net(**batch).loss if isinstance(batch, dict) else F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(batch), sync_dist=True, batch_size=BATCH)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Late(Combined):
    def configure_model(self) -> None:
        if self.net is None:
            self.build()


def loader(model: str, features: frozenset[str], seed: int) -> DataLoader:
    torch.manual_seed(seed)
    data = MODELS[model][1]()
    size = BATCH // 2 if "ddp" in features else BATCH
    return DataLoader(data[:-3] if "partial_batch" in features else data, size)


def train(model: str, features: Iterable[str], folder: Path, quantized: bool = True) -> dict[str, Any]:
    """Fit and hand back what came of it, as plain data."""
    features = frozenset(features)
    losses, cco = Losses(), quick() if quantized else None
    make = Late if "configure_model" in features else Combined
    options: dict[str, Any] = {"precision": "bf16-mixed"} if "bf16" in features else {}

    def trainer(folder: Path, *more: pl.Callback, epochs: int = EPOCHS) -> pl.Trainer:
        spread = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")} if "ddp" in features else {}
        return make_trainer(folder, *more, max_epochs=epochs, num_sanity_val_steps=0, **options, **spread)

    def run(folder: Path, epochs: int, ckpt: str | None, cco: pl.Callback | None, *more: pl.Callback) -> tuple[Combined, pl.Trainer, str]:
        torch._dynamo.reset()  # the compiler takes only so many models of one class
        module, keeper = make(model, features), ModelCheckpoint(folder, save_last=True)
        average = [averaging("EMAWeightAveraging", decay=0.5)] if "ema" in features else []
        fitted = trainer(folder, *([cco] if cco else []), losses, *more, *average, keeper, epochs=epochs)
        fitted.fit(module, loader(model, features, 3), loader(model, features, 4), ckpt_path=ckpt)
        return module, fitted, keeper.last_model_path

    start = None
    if "resume" in features:
        _, _, start = run(folder / "half", 1, None, quick() if quantized else None)
    moved = [RangesMoved(cco)] if cco is not None else []
    module, fitted, last = run(folder / "whole", EPOCHS, start, cco, *moved)
    found: dict[str, Any] = {"losses": losses.values, "logged": float(fitted.callback_metrics["loss"]), "last": last}
    if features & {"test", "ema"}:
        fresh = [quick()] if quantized else []
        tester = trainer(folder, *fresh)
        found["tested"] = tester.test(make(model, features), loader(model, features, 4), ckpt_path=last, verbose=False)[0]["loss"]
    if cco is not None:
        found |= {
            "quantized": sorted(cco.quantized.plan.quantized),
            "drift": cco.quantized.drift,
            "still": moved[0].still,
            "ranges": {key: torch.stack([q.min_val, q.max_val]) for key, q in cco.quantized.activations.items()},
            "qs": {name: entry.qs for name, entry in cco.report.local.items()},
            "dtypes": sorted({str(p.dtype) for p in module.parameters()}),
        }
    torch._dynamo.reset()
    return found


def main(folder: Path, model: str, features: list[str]) -> None:
    torch.set_num_threads(1)
    kept = [train(model, features, folder / name, quantized) for name, quantized in (("quantized", True), ("float", False))]
    torch.save(kept, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
