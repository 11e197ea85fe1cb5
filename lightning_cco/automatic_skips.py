"""Layers that a run stops quantizing automatically, because their sensitivity is too high (`automatic_skip_quantization`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_cco.quantized_model import QuantizedModel


class AutomaticSkips:
    """The skips of a run: what was measured at the end of an epoch holds from the start of the next on.

    Attributes:
        applied: Names of the layers that are skipped.
        pending: Names of those that will be at the start of the next epoch.
    """

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.pending: list[str] = []

    def propose(self, names: Sequence[str]) -> None:
        """These layers are skipped from the next epoch on."""
        self.pending = list(names)

    def apply(self, quantized: QuantizedModel | None) -> bool:
        """Plan the model with the pending skips.

        Returns:
            Whether the plan has changed. ``quantized.uncalibrated`` then names the quantizers without ranges.
        """
        if not self.pending or quantized is None:
            return False
        self.applied += [name for name in self.pending if name not in self.applied]
        rank_zero_info(f"Automatic Quantization: skipping quantization from now on for: {', '.join(self.pending)}.")
        self.pending = []
        quantized.uncalibrated = quantized.replan(suggestions=self.applied)
        return True

    def state_dict(self) -> dict[str, list[str]]:
        """As plain data, for a checkpoint."""
        return {"skips": list(self.applied), "pending_skips": list(self.pending)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        self.applied, self.pending = list(state["skips"]), list(state["pending_skips"])
