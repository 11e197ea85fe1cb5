"""Batch norms that keep their statistics from a step of the training on, as the deployed model has them."""

from __future__ import annotations

from torch import nn

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class BatchNorms:
    """Puts the batch norms of a model into evaluation mode, and back."""

    def __init__(self) -> None:
        self._frozen: list[nn.Module] = []

    def freeze(self, model: nn.Module) -> int:
        """Let the batch norms that are in training mode normalize by their running statistics, which stay as they are. Weights and biases are still trained.

        Called before each step, since user code may put the model into training mode again.

        Returns:
            How many were not frozen before.
        """
        if self._frozen:
            for module in self._frozen:
                module.training = False
            return 0
        self._frozen = [m for m in model.modules() if isinstance(m, _KINDS) and m.training and m.track_running_stats]
        for module in self._frozen:
            module.training = False
        return len(self._frozen)

    def release(self) -> None:
        """Put them into training mode again."""
        for module in self._frozen:
            module.training = True
        self._frozen = []
