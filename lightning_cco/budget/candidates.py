"""The numbers of bits that a budget chooses from: by its goal, since of two that it counts alike the one with fewer bits only loses more."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_cco.budget.options import UNIFORM
from lightning_cco.quantization.plan import packs_weights
from lightning_cco.settings import Settings

_COUNTED = (2, 3, 4, 5, 6, 7, 8)
_ACTIVATIONS = (4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Candidates:
    """Numbers of bits.

    Attributes:
        weights: To choose from for weights.
        activations: To choose from for activations.
    """

    weights: tuple[int, ...]
    activations: tuple[int, ...]

    @property
    def measured(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of weights and of activations that a rise of the loss must be known of: with those of the plans of equal bits."""
        weights, activations = zip(*UNIFORM.values(), strict=True)
        return tuple(sorted({*self.weights, *weights})), tuple(sorted({*self.activations, *activations}))


def candidates(settings: Settings, goal: str) -> Candidates:
    """The numbers of bits to choose from.

    A file holds weights of 8 bits, or of 4; those of 5 take 8 in it, and run as fast. So a size and a speed choose from what differs in the file. Bits and bit
    operations differ with each number. What only bit operations count is the bits of activations: under other goals these stay as the recipe has them.

    Args:
        settings: The recipe.
        goal: What is counted: ``size``, ``average_bits``, ``bops`` or ``speed``.
    """
    in_files = (4, 8) if packs_weights(settings) else (8,)
    weights = in_files if goal in ("size", "speed") else _COUNTED
    return Candidates(weights, _ACTIVATIONS if goal == "bops" else (settings.global_quantization_settings.activations_num_bits,))
