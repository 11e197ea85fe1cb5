"""Errors of an export begin with ``export: ``, once, whichever error they quote."""

from __future__ import annotations

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


def test_an_error_that_is_quoted_says_it_once() -> None:
    for error in (ExportError("a"), BatchDoesNotVary("a"), FileDiffers("a"), FileDiffers("a", "an engine")):
        assert str(ExportError(f"with another batch {quoted(error)}")).count("export: ") == 1
