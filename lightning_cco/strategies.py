"""Which Trainers work: those of `lightning.pytorch`, with a strategy in which each process computes whole layers from whole weights."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_cco.errors import CCOError

_FULLY_SHARD = (
    "To keep parameters in parts, call torch.distributed.fsdp.fully_shard(layer, mesh=self.device_mesh['data_parallel']) on the layers in "
    "configure_model and train with Trainer(strategy=ModelParallelStrategy(tensor_parallel_size=1)); else train with strategy='ddp'."
)


def check_trainer(trainer: object) -> None:
    """Refuse a Trainer of the other package, `pytorch_lightning`, and a strategy that hides weights from the quantizers.

    Raises:
        CCOError: The message says why, and what to write instead.
    """
    if not isinstance(trainer, pl.Trainer):  # its classes are copies: nothing here would find its loops and hooks
        raise CCOError(
            f"CCOCallback: expected a Trainer of lightning.pytorch, got one of {type(trainer).__module__.partition('.')[0]}, whose classes are others. "
            "Write 'import lightning.pytorch as pl', for the module and the other callbacks too."
        )
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise CCOError(
            "CCOCallback: FSDPStrategy puts wrappers around the modules and flattens their weights outside of them, where no layer can be captured and "
            f"no weight quantized per channel. {_FULLY_SHARD}"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise CCOError(
            "CCOCallback: DeepSpeedStrategy runs the model in an engine of its own, which keeps parts of the weights out of reach between the layers. "
            f"{_FULLY_SHARD}"
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise CCOError(
            f"CCOCallback: tensor_parallel_size is {strategy.device_mesh['tensor_parallel'].size()}; expected 1. No process has the "
            f"whole output of a sharded layer, so none could find its range. {_FULLY_SHARD}"
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only parts of some parameters."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
