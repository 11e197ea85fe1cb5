"""What `quantize` says of arguments that it can't take, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cco import CCOError, quantize

X = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((X, "w8a8"), "the second argument .* got tensors"),
        (((X,), "w8a8"), "the second argument .* got tensors"),
        ((None, "w8a8"), r"as example_args, such as \(x,\), got str"),
        ((None, 3), "example_args.* got int"),
        ((None, {"x": X}), r"mapping with the keys \['x'\].* example_kwargs=batch"),
        ((None, (), X), "example_kwargs, got Tensor"),
        (("w88",), "w88"),
    ],
)
def test_arguments_of_another_kind_are_named_and_nothing_is_hooked(arguments: tuple[Any, ...], expected: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CCOError, match=expected):
        quantize(model, *arguments)
    assert not model[0]._forward_hooks


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(CCOError, match=r"expected a torch.nn.Module as model, got str"):
        quantize("resnet18")  # type: ignore[arg-type]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(5, 2)})

    def forward(self, x: torch.Tensor, which: str = "a") -> torch.Tensor:
        return self.heads[which](self.stem(x))


def test_a_forward_that_fails_on_an_example_is_blamed_on_its_module(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"failed in module 'heads.b' \(Linear\) on the example.*mat1 and mat2"):
        quantize(Branches(), None, (X, "b"))
    quantized = quantize(Branches(), None, (X,))
    quantized.calibrate([X])
    with pytest.raises(
        CCOError, match=r"on the example \(x \[2, 3\]\) in module 'stem' \(Linear\): RuntimeError: mat1 and mat2.*example_args"
    ):
        quantized.export(tmp_path / "model.onnx", (torch.randn(2, 3),))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "instead"), [("m.onnx.gz", "m.onnx"), ("m.engine", "m.onnx"), ("m", "m.onnx"), ("", "model.onnx"), ("v1.2", "v1.onnx")]
)
def test_a_path_of_another_ending_says_what_to_write(tmp_path: Path, given: str, instead: str) -> None:
    quantized = quantize(Branches(), None, (X,))
    quantized.calibrate([X])
    with pytest.raises(CCOError, match=f"Write '{re.escape(str(tmp_path / instead))}'"):
        quantized.export(tmp_path / given)
