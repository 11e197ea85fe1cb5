"""What QNN requires of a file, in its simulator: each test fails once a feature is no longer needed. Skipped without onnxruntime-qnn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_files import File

from lightning_cco.export.engines.qnn import Compiled

pytest.importorskip("onnxruntime_qnn")
SHAPE = (1, 3, 8, 8)


def precisions(file: File, output: str, folder: Path) -> dict[str, set[str]]:
    """The types that each kind of operator computes in; empty where the file can't be compiled."""
    try:
        compiled = Compiled(file.save(folder / "a.onnx", SHAPE, output))
    except RuntimeError:
        return {}
    found: dict[str, set[str]] = {}
    for node in compiled.computed():
        found.setdefault(node.operator, set()).add(node.precision)
    return found


def convolution(file: File, x: str, bias: Any) -> str:
    return file.node("Conv", x, file.weight(8, 3, 3, 3), bias, pads=[1, 1, 1, 1])


def integer_bias(file: File) -> str:
    return file.node(
        "DequantizeLinear", file.constant(np.arange(8, dtype=np.int32)), file.constant(np.full(8, 0.02 * 0.01, np.float32)), axis=0
    )


@pytest.mark.parametrize("integers", [True, False])
def test_qnn_integer_bias(integers: bool, tmp_path: Path) -> None:
    """ONNX Runtime 1.32, which this version comes for, makes integers of a bias in float; an older or newer one may not."""
    file = File()
    x = file.rounded("x")
    bias = integer_bias(file) if integers else file.constant(np.linspace(-0.1, 0.1, 8, dtype=np.float32))
    found = precisions(file, file.rounded(convolution(file, x, bias), 0.05), tmp_path)
    assert found["Conv2d"] == {"u8"}


@pytest.mark.parametrize("integers", [True, False])
def test_qnn_integer_clips(integers: bool, tmp_path: Path) -> None:
    """A clamp at a number that is no end of the rounding's range."""
    file = File()
    made = convolution(file, file.rounded("x"), integer_bias(file))
    ends = [file.constant(np.float32(end)) for end in (0.0, 1.0)]
    clipped = file.node("Clip", file.rounded(made, 0.05) if integers else made, *ends)
    assert (precisions(file, file.rounded(clipped, 0.05), tmp_path).get("Conv2d") == {"u8"}) is integers


@pytest.mark.parametrize("pairs", [True, False])
def test_qnn_units(pairs: bool, tmp_path: Path) -> None:
    """A convolution that reads parts of a rounded tensor."""
    file = File()
    parts = file.node("Gather", file.rounded("x"), file.constant(np.arange(3)), axis=1)
    made = convolution(file, file.rounded(parts) if pairs else parts, integer_bias(file))
    assert (precisions(file, file.rounded(made, 0.05), tmp_path).get("Conv2d") == {"u8"}) is pairs


def test_what_htp_has_no_form_for_is_named(tmp_path: Path) -> None:
    """Its log names the node, and the reason; a remainder of floats is one that version 2.7 lacks."""
    file = File()
    rest = file.node("Mod", file.rounded("x"), file.constant(np.float32(1.5)), fmod=1)
    with pytest.raises(RuntimeError, match="HTP has no kernel for Mod "):
        Compiled(file.save(tmp_path / "a.onnx", SHAPE, rest))
