"""Whether the weights that are trained are those that were calibrated: code that loads others in a hook after the callback's is told where to."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from lightning_cco.errors import CCOWarning
from lightning_cco.names import list_names
from lightning_cco.strategies import is_sharded


class WeightsAtStart:
    """Remembers the norms of a model's parameters from before its first batch on."""

    def __init__(self) -> None:
        self._norms: dict[str, float] = {}

    def note(self, model: nn.Module) -> None:
        """The weights are those that ranges, metrics and a teacher are of."""
        self._norms = {} if is_sharded(model) else _norms(model)

    def check(self, model: nn.Module) -> None:
        """Before the first batch: say if they are others now. Only once after each `note`."""
        noted, self._norms = self._norms, {}
        if not noted:
            return
        changed = [name for name, norm in _norms(model).items() if norm != noted.get(name, norm)]
        if changed:
            warnings.warn(
                f"CCOCallback: {list_names(changed)} were changed between the callback's on_train_start and the first batch, such as by a checkpoint that is "
                "loaded in an on_train_start or on_train_epoch_start. The ranges, the metrics before training and the teacher of a distillation are those of "
                "the weights before. Load weights in setup, configure_model or on_fit_start.",
                CCOWarning,
                stacklevel=2,
            )


def _norms(model: nn.Module) -> dict[str, float]:
    """The norm of each parameter that has values; a NaN is as good as none."""
    held = {
        name: parameter.detach() for name, parameter in model.named_parameters() if parameter.device.type != "meta" and parameter.numel()
    }
    if not held:
        return {}
    norms = torch.stack([torch.linalg.vector_norm(values, dtype=_wide(values)).double().cpu() for values in held.values()])
    return {name: norm for name, norm in zip(held, norms.tolist(), strict=True) if norm == norm}


def _wide(values: torch.Tensor) -> torch.dtype:
    return values.dtype if values.dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
