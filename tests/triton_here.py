"""Triton's kernels wherever the tests run: compiled on a GPU; without one in Triton's interpreter, on tensors of the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache, partial

import pytest
import torch

from lightning_cco.quantization import activation_quantizer, fake_quantize, triton_calls, weight_fake_quantize, weight_recompute
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@cache
def _interpreted() -> None:
    """Import the kernels so that the interpreter runs them.

    Triton asks ``TRITON_INTERPRET`` when it is imported, which Lightning has done before any test can ask for it: so it is imported once more, for the kernels
    alone.
    """
    ours = "lightning_cco.quantization.triton_kernels"
    compiled = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "triton" and "._C" not in name}
    for name in compiled:
        del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module(ours)  # from here on this is the module that everybody gets
    sys.modules.update(compiled)


@cache
def triton_kernels() -> triton_calls.TritonKernels:
    if DEVICE == "cpu":
        _interpreted()
    found = triton_calls.device_kernels_for(torch.ones(1, device=DEVICE), DEVICE)
    assert found is not None
    return found


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Quantizers never look at their numbers: those of a GPU's tensors are in its memory."""
    patch.setattr(ActivationQuantizer, "_read", lambda self, scale, zero_point: None)
    patch.setattr(activation_quantizer, "has_small_gradient", lambda x: False)


def use_triton(patch: pytest.MonkeyPatch) -> None:
    """Every place that asks for kernels gets those of Triton."""
    as_on_a_gpu(patch)
    triton_kernels()
    find = partial(triton_calls.device_kernels_for, device=DEVICE)
    patch.setattr(fake_quantize, "device_kernels_for", find)
    for user in (fake_quantize, weight_fake_quantize, weight_recompute):
        patch.setattr(user, "fitting_kernels", find)
