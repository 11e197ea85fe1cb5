"""Errors of an export begin with ``export: ``, once, whichever error they quote."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOError, quantize
from lightning_cco.export.errors import BatchDoesNotVary, ExportError, FileDiffers, quoted


class Branching(nn.Module):
    """A forward that depends on values, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h if h.sum() > 0 else -h)


@pytest.mark.parametrize("name", ["a.pt2", "a.onnx"])
def test_a_model_that_cannot_be_traced(name: str, tmp_path: Path) -> None:
    x = torch.ones(4, 4)
    quantized = quantize(Branching().eval(), None, (x,))
    quantized.calibrate([x])
    with pytest.raises(CCOError) as found:
        quantized.export(tmp_path / name, example_args=(x,))
    assert str(found.value).startswith("export: Branching can't be traced")
    assert str(found.value).count("export: ") == 1


class SelectsRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        print("rows", file=sys.stderr)
        h = self.first(x)
        chosen = h[h.sum(1) > -100]
        return self.last(h) if chosen.numel() == 0 else self.last(chosen)


@pytest.mark.parametrize("name", ["a.pt2", "a.onnx"])
def test_the_graph_of_a_trace_that_failed_is_not_printed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.ones(4, 4)
    quantized = quantize(SelectsRows().eval(), None, (x,))
    quantized.calibrate([x])
    with pytest.raises(CCOError) as found:
        quantized.export(tmp_path / name, example_args=(x,))
    assert ("after layer 'slice' (the model itself)" in str(found.value)) == name.endswith(".onnx")
    assert set(capsys.readouterr().err.splitlines()) == {"rows"}


def test_an_error_that_is_quoted_says_it_once() -> None:
    for error in (ExportError("a"), BatchDoesNotVary("a"), FileDiffers("a"), FileDiffers("a", "an engine")):
        assert str(ExportError(f"with another batch {quoted(error)}")).count("export: ") == 1
