"""What the documentation says of the targets is what their tables say."""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco._values import FP16_FRAMEWORKS
from lightning_cco.export.engines import ENGINES
from lightning_cco.quantization.targets import TARGETS, Target


@pytest.mark.parametrize(
    ("target", "more", "fewer"),
    [
        ("openvino", {"sub"}, {"sigmoid", "leaky_relu"}),
        ("tensorrt", {"sub", "div", "conv_transpose", "embedding_bag"}, {"sigmoid", "leaky_relu"}),
        ("litert", {"sub"}, None),
        ("qnn", {"sub", "div", "conv_transpose", "hardsigmoid", "hardswish", "tanh"}, {"addmm", "baddbmm", "einsum", "embedding"}),
    ],
)
def test_the_pages_say_what_an_engine_computes_in_int8_beside_onnx_runtime(target: str, more: set[str], fewer: set[str] | None) -> None:
    """If this fails, change the row in docs/export.md and the page of the engine, too."""
    assert TARGETS[target].int8_kinds - TARGETS["ort"].int8_kinds == more
    if fewer is not None:
        assert TARGETS["ort"].int8_kinds - TARGETS[target].int8_kinds == fewer


def test_settings_take_fp16_for_the_engines_that_do() -> None:
    assert [name for name in TARGETS if ENGINES[name].takes_fp16] == list(FP16_FRAMEWORKS)


def test_coreml_plans_as_executorch() -> None:
    assert TARGETS["coreml"].int8_kinds == TARGETS["executorch"].int8_kinds


class SeluBetweenNorms(nn.Module):
    """An activation between float layers, after an INT8 layer and before one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norms, self.last = nn.Linear(8, 8), nn.ModuleList(nn.LayerNorm(8) for _ in range(2)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norms[1](F.selu(self.norms[0](self.first(x)))))


def test_a_kind_that_is_added_to_an_engine_runs_in_int8_only_beside_int8_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing that is to be done is to name the kind; between float layers its conversions would cost more than they save."""
    ort = TARGETS["ort"]
    more = dataclasses.replace(ort, int8_kinds=ort.int8_kinds | {"selu"})
    monkeypatch.setitem(cast("dict[str, Target]", TARGETS), "ort", more)
    whole = {"global_quantization_settings": {"skip_tail_quantization": False}}
    plan = quantize(SeluBetweenNorms(), whole, (torch.randn(2, 8),)).plan
    assert plan.skipped["selu"] == "the layers before and after it run in float"
    beside = quantize(nn.Sequential(nn.Linear(8, 8), nn.SELU(), nn.Linear(8, 8)), whole, (torch.randn(2, 8),)).plan
    assert "selu" in beside.quantized


@pytest.mark.parametrize("name", ["ort", "qnn"])
def test_every_kind_in_int8_has_a_result_that_is_in_float_or_is_rounded(name: str) -> None:
    """A kind of `int8_kinds` that is in neither set would be computed in float where its result is not rounded, and be planned in INT8."""
    target = TARGETS[name]
    clamps = {"relu", "relu6", "hardtanh", "clamp"}
    assert target.int8_kinds <= target.float_outputs | target.integer_outputs | clamps
