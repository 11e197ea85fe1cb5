"""Layers whose forward casts to other floats and back run in INT8 in ONNX Runtime, as planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize

Form = Callable[["Casting", Tensor], Tensor]


class Casting(nn.Module):
    """A form between two layers that run in INT8."""

    def __init__(self, form: Form, returned: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.form, self.returned = form, returned
        self.first, self.other, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.form(self, F.relu(self.first(x))))).to(self.returned)


def _autocast(s: Casting, h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return s.second(s.other(h)).float()


def _attention(s: Casting, h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        q = s.other(h)
        return s.second(torch.softmax(q @ q.transpose(-1, -2) / 4, -1) @ q).float()


FORMS: dict[str, tuple[Form, int]] = {
    "bfloat16, added": (lambda s, h: s.second(h + s.other(h).to(torch.bfloat16).to(torch.float32)), 4),
    "half": (lambda s, h: s.second(s.other(h).half().float()), 3),
    "half before": (lambda s, h: s.second(s.other(h.half().float())), 3),
    "half residual": (lambda s, h: s.second(h.half().float() + s.other(h)), 4),
    "added in half": (lambda s, h: s.second((h.half() + s.other(h).half()).float()), 4),
    "relu in half": (lambda s, h: s.second(torch.relu(s.other(h).half()).float()), 3),
    "relu after": (lambda s, h: s.second(torch.relu(s.other(h).half().float())), 3),
    "type_as": (lambda s, h: s.second(h + s.other(h).type_as(h.new_zeros(1, dtype=torch.float16)).type_as(h)), 4),
    "double": (lambda s, h: s.second(h + s.other(h).double().float()), 4),
    "in double": (lambda s, h: s.second(torch.cumsum(s.other(h).double(), -1).float()), 3),
    "moved in half": (lambda s, h: s.second(s.other(h).half().reshape(-1, 4, 4).transpose(1, 2).float().reshape(-1, 16)), 3),
    "weights in bfloat16": (lambda s, h: F.linear(h.bfloat16(), s.other.weight.bfloat16(), s.other.bias.bfloat16()).float(), 2),
    "weights in half": (lambda s, h: (h.half() @ s.other.weight.half().t()).float(), 2),
    "autocast": (_autocast, 3),
    "attention in autocast": (_attention, 3),
}
FAST = ("bfloat16, added", "in double", "weights in bfloat16", "autocast")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FORMS])
def test_a_cast_to_other_floats_and_back_leaves_a_layer_in_int8(form: str, tmp_path: Path) -> None:
    """That nothing is planned in INT8 and computed in float is asserted for each export (`conftest`)."""
    function, integer = FORMS[form]
    model, x = Casting(function).eval(), torch.randn(8, 16)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx")
    assert sum(report.integer_nodes.values()) >= integer
    assert "LeakyRelu" not in report.float_nodes  # that a layer is kept from its rounding by: a reader in float which there is not
    session = ort.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    got, want = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], model(x).detach().numpy()
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inputs_and_outputs_keep_their_types(tmp_path: Path) -> None:
    x = torch.randn(8, 16).half()
    model = Casting(lambda s, h: s.second(s.other(h)), torch.float16).eval()
    model.first.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    quantized.export(tmp_path / "a.onnx")
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)] == [onnx.TensorProto.FLOAT16] * 2
    session = ort.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    got, want = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], model(x).detach().numpy()
    assert got.dtype == np.float16
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize("form", [pytest.param(name, marks=() if name == "autocast" else pytest.mark.slow) for name in FORMS])
def test_a_program_with_quantized_operators_computes_in_float32(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Casting(FORMS[form][0]).eval(), torch.randn(4, 8, 16)
    quantized = quantize(model, {"deployment_settings": {"target_framework": "executorch"}}, (x,))
    quantized.calibrate([x])
    program = quantized.export(tmp_path / "a.pt2")
    with torch.no_grad():
        wanted = model(x)
        assert float((program.module()(x) - wanted).abs().max()) < 0.03 * float(wanted.abs().max())
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    types = {node.meta["val"].dtype for node in calls if isinstance(node.meta.get("val"), Tensor)}
    assert types.isdisjoint({torch.float16, torch.bfloat16})
    linear = [node for node in calls if node.target is torch.ops.aten.linear.default]
    assert len(linear) == len({node.args[1] for node in linear}) >= 2
    planned = [layer for layer in quantized.plan.quantized if quantized.graph[layer].kind == "linear"]
    integer = [node for node in linear if all("dequantize" in str(operand.target) for operand in node.args[:2])]
    assert len(integer) == len(planned) == len(linear) - 1


def test_types_of_inputs_and_outputs_of_a_program_stay(tmp_path: Path) -> None:
    model, x = Casting(lambda s, h: s.second(s.other(h).bfloat16().float()), torch.float16).eval(), torch.randn(4, 8, 16)
    quantized = quantize(model, {"deployment_settings": {"target_framework": "executorch"}}, (x,))
    quantized.calibrate([x])
    program = quantized.export(tmp_path / "a.pt2")
    assert program.module()(x).dtype is torch.float16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*runs functions whose calls hooks")
def test_a_branch_in_the_file_is_in_nobodys_way(tmp_path: Path) -> None:
    def form(s: Casting, h: Tensor) -> Tensor:
        h = torch.relu(s.other(h).half()).float()
        return torch.cond(h.sum() > 0, lambda h: torch.relu(s.second(h)), lambda h: h * 2.0, (h,))

    model, x = Casting(form).eval(), torch.randn(8, 16)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx")
    assert report.integer_nodes == {"QGemm": 2}
    session = ort.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        want = model(x).numpy()
    got = session.run(None, {"x": x.numpy()})[0]
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()
