"""Every place that asks for the compiled kernels is told that there are none."""

from __future__ import annotations

import pytest

from lightning_cco.quantization import (
    affine_weights,
    dynamic_activations,
    fake_quantize,
    qparams,
    range_kernel,
    weight_fake_quantize,
    weight_recompute,
)


def turn_kernels_off(patch: pytest.MonkeyPatch) -> None:
    for user in (affine_weights, dynamic_activations, fake_quantize, qparams):
        patch.setattr(user, "kernels_for", lambda tensor: None)
    for user in (fake_quantize, weight_fake_quantize, weight_recompute):
        patch.setattr(user, "fitting_kernels", lambda tensor: None)
    patch.setattr(range_kernel, "load", lambda: None)
