"""A file holds what its engine needs: nothing of the trace that it was made by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from lightning_cco import quantize


def holders(graph: Any) -> list[Any]:
    return [graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]


@pytest.mark.parametrize("options", [{"int4": True}, {"dynamic_batch": False}])
def test_nothing_of_the_trace_is_in_the_file(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    x = torch.randn(4, 1, 8, 8)
    recipe = {"global_quantization_settings": {"weights_num_bits": 4, "skip_tail_quantization": False}}
    quantized = quantize(net, recipe, (x,))
    quantized.calibrate([[x]])
    quantized.export(tmp_path / "a.onnx", (x,), **options)
    written = onnx.load(str(tmp_path / "a.onnx"))
    onnx.checker.check_model(written, full_check=True)
    assert [entry.key for one in holders(written.graph) for entry in one.metadata_props if entry.key.startswith("pkg.")] == []
    constants = {entry.name for entry in written.graph.initializer}
    assert constants.isdisjoint(entry.name for entry in written.graph.value_info)
    assert {entry.key for entry in written.metadata_props} >= {"lightning_cco.version", "lightning_cco.recipe"}
    # Beside weights and biases: a few kilobytes of operators, names and the recipe.
    weights = sum(onnx.numpy_helper.to_array(entry).nbytes for entry in written.graph.initializer)
    assert (tmp_path / "a.onnx").stat().st_size < weights + 9000
    session = ort.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].shape == (4, 10)
    quantized.remove()
