"""Changes a written file before it is checked, as a fault of the exporter would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lightning_cco import QuantizedModel
from lightning_cco.export import check
from lightning_cco.export.check_limits import judge
from lightning_cco.export.report import ExportReport

Harm = Callable[[onnx.ModelProto], None]


class Written:
    """A file as it was handed to its check, and the check of a changed one."""

    def __init__(self, quantized: QuantizedModel, folder: Path) -> None:
        self.quantized, self.folder = quantized, folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_cco.export.onnx_file.check_file", self._keep)
            quantized.export(folder / "model.onnx")

    def _keep(self, quantized: QuantizedModel, path: Path, emitter: Any, calls: Any, report: ExportReport, sizes: bool) -> None:
        self.model, self.emitter, self.calls, self.sizes = onnx.load(path), emitter, calls, sizes

    def checked(self, harm: Harm | None = None) -> ExportReport:
        model, report = onnx.ModelProto(), ExportReport("")
        model.CopyFrom(self.model)
        if harm is not None:
            harm(model)
        onnx.save(model, self.folder / "changed.onnx")
        check.check_file(self.quantized, self.folder / "changed.onnx", self.emitter, self.calls, report, self.sizes)
        judge(report)
        return report


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def change(model: onnx.ModelProto, value: str, how: Callable[[Any], Any]) -> None:
    """Change a constant, or the integers that a dequantized one is made of."""
    entries = {entry.name: entry for entry in model.graph.initializer}
    while value not in entries:
        value = next(node for node in model.graph.node if value in node.output).input[0]
    entry = entries[value]
    array = onnx.numpy_helper.to_array(entry)
    entry.CopyFrom(onnx.numpy_helper.from_array(np.asarray(how(array.copy()), array.dtype), entry.name))


def own(model: onnx.ModelProto, node: onnx.NodeProto, number: int, how: Callable[[Any], Any]) -> None:
    """Give a node a changed constant of its own, which others may share."""
    entry = next(entry for entry in model.graph.initializer if entry.name == node.input[number])
    array = onnx.numpy_helper.to_array(entry)
    name = f"{node.name}.harmed.{number}"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(how(array.copy()), array.dtype), name))
    node.input[number] = name
