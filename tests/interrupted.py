"""Run by a test, as ``python interrupted.py FOLDER HOW STEP``: trains, and at that step something ends the process in the middle of a forward."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import Tensor
from torch.utils.data import DataLoader

SIGNALS = {"ctrl_c": signal.SIGINT, "sigterm": signal.SIGTERM, "kill": signal.SIGKILL}


class Resumable:
    """A loader that goes on in the middle of an epoch: what Lightning asks of one to do so."""

    def __init__(self) -> None:
        self.batches, self.next = list(batches(seed=3)) + list(batches(seed=4)), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.next = self.next % len(self.batches), 0
        for number in range(start, len(self.batches)):
            self.next = number + 1
            yield self.batches[number]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Fragile(Classifier):
    def __init__(self, how: str, at: int) -> None:
        super().__init__()
        self.how, self.at = how, at

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.how != "none" and self.trainer.global_step == self.at:
            handle = self.net.blocks[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), SIGNALS[self.how]))
            loss = self._loss(batch)
            handle.remove()
            return loss
        return self._loss(batch)


class Written(pl.Callback):
    """Writes each loss down at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([trainer.global_step, float(outputs["loss"])]) + "\n")


def main(folder: Path, how: str, at: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    saved = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    cco = quick()
    callbacks = [cco, Written(folder / "losses.txt"), ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)]
    if how == "sigterm":  # after Ctrl-C Lightning counts the batch in the middle of which it came as done
        callbacks.append(OnExceptionCheckpoint(folder, "interrupted"))
    trainer = make_trainer(folder, *callbacks, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(Fragile(how, at), Resumable(), DataLoader(batches().dataset, 8), ckpt_path=saved[-1] if saved else None)
    print("drift:", cco.quantized.drift)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
