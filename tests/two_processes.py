"""Run by a test: fits on two gloo processes and saves what each rank ended with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_modules import Classifier, batches, make_trainer

from lightning_cco import CCOCallback


def main(folder: Path, export_dir: str | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {"training_settings": {"stats_steps": 2}, "monitoring_settings": {"draw_graph": False}}
    cco = CCOCallback({**settings, "deployment_settings": {"export_dir": export_dir}})
    trainer = make_trainer(folder, cco, max_epochs=2, devices=2, strategy=DDPStrategy(process_group_backend="gloo"), num_sanity_val_steps=1)
    trainer.fit(Classifier(), batches(), batches())
    ranges = {key: torch.stack([q.min_val, q.max_val, q.scale, q.zero_point]) for key, q in cco.quantized.activations.items()}
    qs = {name: entry.qs for name, entry in cco.report.local.items()}
    kept = {
        "ranges": ranges,
        "qs": qs,
        "batches": cco.report.num_batches,
        "drift": cco.quantized.drift,
        "quantized": len(cco.quantized.plan.quantized),
    }
    torch.save(kept, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
