"""Run by tests, as ``python two_processes.py FOLDER CASE [EXPORT_DIR]``: fits on two gloo processes and saves what each rank ended with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning_modules import Classifier, Losses, batches, make_trainer, quick
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_cco import CCOCallback, CCOError


class Sharded(Classifier):
    """Every block's parameters are in halves, and whole only while it runs."""

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return  # Lightning asks again for each run
        for block in self.net.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Unused(Classifier):
    """A head that only every other batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(10, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        scores = self(batch[0])
        return F.cross_entropy(self.other(scores) if batch_idx % 2 else scores, batch[1])


class Split(Classifier):
    """Two linear layers, each in halves that compute together."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))

    def configure_model(self) -> None:
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"1": ColwiseParallel(), "3": RowwiseParallel()})


def ddp(**options: Any) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", **options)


def model_parallel(**sizes: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(**sizes, process_group_backend="gloo")


def partial() -> DataLoader:
    """29 samples: 15 on each rank, in batches of 4, 4, 4 and 3."""
    return DataLoader(torch.utils.data.Subset(batches().dataset, range(29)), 4)


CASES: dict[str, tuple[type[Classifier], Callable[[], Any], dict[str, Any]]] = {
    "ddp": (Classifier, ddp, {}),
    "fully_shard": (Sharded, lambda: model_parallel(data_parallel_size=2, tensor_parallel_size=1), {}),
    "tensor_parallel": (Split, lambda: model_parallel(data_parallel_size=1, tensor_parallel_size=2), {}),
    "ddp_unused": (Unused, lambda: ddp(find_unused_parameters=True), {}),
    "ddp_accumulate": (Classifier, ddp, {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0}),
    "ddp_distilled": (Classifier, ddp, {}),
    "ddp_distilled_unused": (Unused, lambda: ddp(find_unused_parameters=True), {}),
    "ddp_budget": (Classifier, ddp, {}),
    "ddp_speed": (Classifier, ddp, {}),
    "ddp_stages": (Classifier, ddp, {}),
    "ddp_learned": (Classifier, ddp, {"accumulate_grad_batches": 2}),
    "ddp_static_graph": (Classifier, lambda: ddp(static_graph=True, gradient_as_bucket_view=True), {}),
}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def spawned(folder: Path) -> None:
    """Fits in processes of their own and tests the checkpoint in this one."""
    cco, model, val = quick(), Classifier(), batches(seed=5)
    checkpoint = ModelCheckpoint(folder, monitor="val_loss")
    val.dataset.tensors = tuple(
        tensor[::2].repeat_interleave(2, 0) for tensor in val.dataset.tensors
    )  # every other is the same: each rank's share
    trainer = make_trainer(folder, cco, checkpoint, devices=2, strategy="ddp_spawn")
    trainer.fit(model, batches(), val)
    try:
        cco.export(folder / "model.onnx")
    except CCOError as error:
        message = str(error)

    def tested(*callbacks: CCOCallback) -> float:
        trainer = make_trainer(folder, *callbacks)
        return trainer.test(Classifier(), val, ckpt_path=checkpoint.best_model_path, verbose=False)[0]["test_loss"]

    kept = {"logged": float(trainer.callback_metrics["val_loss"]), "tested": tested(cco), "float": tested(), "export": message}
    torch.save(kept, folder / "result.pt")


def main(folder: Path, case: str, export_dir: str | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, strategy, options = CASES[case]
    settings: dict[str, Any] = {"distillation_settings": {"weight": 0.7}} if "distilled" in case else {}
    if "budget" in case:
        settings = {"budget_settings": {"average_bits": 4.6, "revise_every_n_epochs": 1}}
    if "speed" in case:
        settings = {"budget_settings": {"speed": 0.2, "size": 0.85}}
    if "stages" in case:
        stages = [{"at_step": 3, "weights_num_bits": 4, "activations_num_bits": 3}]
        settings = {"training_settings": {"stats_steps": 2, "start_at_step": 1, "stages": stages}}
    if "learned" in case:
        settings = {"training_settings": {"stats_steps": 2, "range_estimator": "learned", "weight_estimator": "learned"}}
    cco, losses, model = quick(deployment_settings={"export_dir": export_dir}, **settings), Losses(), make()
    keeper = ModelCheckpoint(folder, save_last=True)
    trainer = make_trainer(folder, cco, losses, keeper, max_epochs=2, devices=2, strategy=strategy(), num_sanity_val_steps=1, **options)
    trainer.fit(model, partial() if case == "ddp_accumulate" else batches(), batches())

    def tested(*callbacks: CCOCallback) -> float:
        tester = make_trainer(folder, *callbacks, devices=2, strategy=strategy())
        return tester.test(make(), batches(), ckpt_path=keeper.last_model_path, verbose=False)[0]["test_loss"]

    kept = {
        "logged": float(trainer.callback_metrics["val_loss"]),
        "tested": tested(quick(**{key: value for key, value in settings.items() if key != "distillation_settings"})),
        "float": tested(),
        "losses": losses.values,
        "weights": {name: whole(tensor) for name, tensor in model.state_dict().items()},
        "ranges": {key: torch.stack([q.min_val, q.max_val, q.scale, q.zero_point]) for key, q in cco.quantized.activations.items()},
        "scales": {name: q.scales for name, (q, *_) in cco.quantized.weights.items() if getattr(q, "scales", None) is not None},
        "qs": {name: entry.qs for name, entry in cco.report.local.items()},
        "batches": cco.report.num_batches,
        "drift": cco.quantized.drift,
        "quantized": sorted(cco.quantized.plan.quantized),
        "bits": {name: decision.weights_num_bits or 32 for name, decision in cco.quantized.plan.decisions.items()},
    }
    torch.save(kept, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    if sys.argv[2] == "ddp_spawn":
        spawned(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
