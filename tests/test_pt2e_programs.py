"""A program with quantized operators (PT2E) computes what the fake-quantized model computes, and engines recognize its integer operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export_case import calibrated
from models import GuideCNN, ResidualCNN, TokenModel
from torch import Tensor, nn
from torch.fx import Node

from lightning_cco import CCOError, QuantizedModel, quantize
from lightning_cco.compat.decomposed import operators
from lightning_cco.export.dialects import Pt2eDialect
from lightning_cco.export.pt2e_passes import operator_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export's own
PRODUCTS = ("aten::conv2d", "aten::conv_transpose2d", "aten::linear")
CLAMPS = ("aten::relu", "aten::hardtanh", "aten::relu6", "aten::clamp")
FEW = {"global_quantization_settings": {"weights_num_bits": 3, "activations_num_bits": 4}}
WHOLE = {"global_quantization_settings": {"skip_tail_quantization": False}}


class UpAndDown(nn.Module):
    """Concatenation, a transposed convolution, an activation in place on a chain of views, a sum of three, and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 2, 2)
        self.last, self.head = nn.Conv2d(5, 4, 1), nn.Linear(4, 3)

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
        small = F.relu6(self.down(image))
        small = small + small * scale
        joined = torch.cat([self.up(small), image], 1)
        rows = self.last(joined).flatten(2).transpose(1, 2)
        return {"rows": self.head(F.relu(rows, inplace=True)), "joined": joined}


def written(
    path: Path, model: nn.Module, example: Callable[[], Tensor], settings: dict[str, Any], **options: Any
) -> tuple[QuantizedModel, torch.export.ExportedProgram]:
    quantized, _ = calibrated(model, example, {"deployment_settings": {"target_framework": "executorch"}, **settings})
    quantized.export(path / "model.pt2", **options)
    return quantized, torch.export.load(path / "model.pt2")


def calls(program: torch.export.ExportedProgram, *names: str) -> list[Node]:
    return [node for node in program.graph.nodes if operator_of(node) in names]


def rounded(node: Node) -> bool:
    """Whether all that reads a node quantizes it, after a clamp or without."""
    users = list(node.users)
    return bool(users) and all(user.target is operators().quantize or (operator_of(user) in CLAMPS and rounded(user)) for user in users)


def constant(program: torch.export.ExportedProgram, node: Node) -> bool:
    return any(spec.arg.name == node.name and spec.target for spec in program.graph_signature.input_specs)


def integer(program: torch.export.ExportedProgram, node: Node) -> bool:
    """Whether a product is one of integers: what it reads and its weight are dequantized, its result is quantized."""
    x, weight = node.args[:2]
    per_channel = weight.target is operators().dequantize_channels and constant(program, weight.args[0])
    return x.target is operators().dequantize and per_channel and rounded(node)


@pytest.mark.parametrize(
    ("model", "example", "settings", "products"),
    [
        (GuideCNN, GuideCNN.example, FEW, 3),
        pytest.param(ResidualCNN, ResidualCNN.example, WHOLE, 6, marks=pytest.mark.slow),
        pytest.param(ResidualCNN, ResidualCNN.example, FEW, 5, marks=pytest.mark.slow),
        pytest.param(TokenModel, TokenModel.example, {}, 4, marks=pytest.mark.slow),
    ],
    ids=["few bits", "residual", "residual of few bits", "transformer"],
)
def test_it_is_the_fake_quantized_model_in_integers(
    model: type[nn.Module], example: Callable[[], Tensor], settings: dict[str, Any], products: int, tmp_path: Path
) -> None:
    quantized, program = written(tmp_path, model(), example, settings)
    other = torch.cat([example(), example()])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), quantized.model(other), rtol=0, atol=1e-6)
    found = calls(program, *PRODUCTS)
    assert sum(integer(program, node) for node in found) == products
    floats = {spec.target for spec in program.graph_signature.input_specs if spec.target} & set(dict(quantized.model.named_parameters()))
    held = [layer.parameters for layer in quantized.graph if layer.name in quantized.weights and not layer.kind.startswith(("add", "mul"))]
    assert not floats & {name for names in held for name in names if name.endswith("weight")}, "a float weight beside its integers"
    assert all(
        node.args[-1] is torch.int8 and node.args[3:5] == (-128, 127) for node in program.graph.nodes if node.target is operators().quantize
    )
    for node in program.graph.nodes:
        assert node.target is not operators().dequantize or len(node.users) <= 1 or {user.op for user in node.users} == {"output"}
    assert not calls(program, "aten::copy", "aten::copy_", "aten::relu_", "aten::dropout")
    assert all(node.kwargs["memory_format"] is torch.contiguous_format for node in calls(program, "aten::clone"))


@pytest.mark.parametrize(
    ("target", "bits"),
    [("xnnpack", 8), pytest.param("xnnpack", 4, marks=pytest.mark.slow), pytest.param("tflite", 8, marks=pytest.mark.slow)],
)
def test_arguments_and_outputs_are_those_of_the_model(target: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UpAndDown().eval()
    example = {"image": torch.randn(2, 2, 8, 8), "scale": torch.rand(2, 4, 1, 1)}
    overall = {"skip_tail_quantization": False, "activations_num_bits": bits}
    settings = {"deployment_settings": {"target_framework": target}, "global_quantization_settings": overall}
    quantized = quantize(model, settings, example_kwargs=example)
    quantized.calibrate([example])
    quantized.export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    image, scale = torch.randn(3, 2, 8, 8), torch.rand(3, 4, 1, 1)
    given, wanted = program.module()(image, scale), quantized.model(image=image, scale=scale)
    assert list(given) == ["rows", "joined"]
    for name, value in wanted.items():
        torch.testing.assert_close(given[name], value, rtol=0, atol=1e-6)
    assert [integer(program, node) for node in calls(program, *PRODUCTS)] == [True, target == "xnnpack", True, True], (
        "a view or a concatenation is between a pair and its reader"
    )
    (concat,) = calls(program, "aten::cat")
    formats = {node.args[1:] for node in (*concat.args[0], *concat.users)}
    assert (len(formats) == 1) is (target == "xnnpack"), "XNNPACK joins integers of one scale alone"
    assert rounded(concat)
    assert not calls(program, "aten::clamp")


@pytest.mark.parametrize(("target", "zero"), [pytest.param("ort", False, marks=pytest.mark.slow), ("tensorrt", True)])
def test_a_plan_for_another_engine_is_written_as_it_is(target: str, zero: bool, tmp_path: Path) -> None:
    quantized, program = written(
        tmp_path, GuideCNN(), GuideCNN.example, {"deployment_settings": {"target_framework": target}}, pt2e=True, dynamic_batch=False
    )
    x = GuideCNN.example()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), quantized.model(x), rtol=0, atol=1e-6)
    pairs = [node for node in program.graph.nodes if node.target is operators().quantize]
    assert pairs
    assert all(node.args[2] == 0 for node in pairs) is zero


def test_without_quantized_operators_it_is_fake_quantized(tmp_path: Path) -> None:
    quantized, program = written(tmp_path, GuideCNN(), GuideCNN.example, {}, pt2e=False, dynamic_batch=False)
    assert not [node for node in program.graph.nodes if "quantized_decomposed" in str(node.target)]
    x = GuideCNN.example()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), quantized.model(x))


@pytest.mark.parametrize("harm", ["clamp", *(pytest.param(harm, marks=pytest.mark.slow) for harm in ("zero point", "scale"))])
def test_a_program_that_is_wrong_is_refused_by_name(harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = calibrated(GuideCNN(), GuideCNN.example, {"deployment_settings": {"target_framework": "executorch"}, **FEW})
    right, pair = Pt2eDialect.stored, Pt2eDialect.pair

    def stored(self: Pt2eDialect, format: Any) -> Any:
        scale, zero, *rest = right(self, format)
        return (scale, zero + 5 * (harm == "zero point"), *rest) if harm != "scale" else (scale * 1.5, zero, *rest)

    if harm == "clamp":
        monkeypatch.setattr(Pt2eDialect, "pair", lambda self, x, format, name, limits=None: pair(self, x * 1.2, format, name))
    else:
        monkeypatch.setattr(Pt2eDialect, "stored", stored)
    with pytest.raises(CCOError, match=r"differs from the fake-quantized model.*first layer that differs is 'input_0'"):
        quantized.export(tmp_path / "model.pt2", dynamic_batch=False)
    assert not list(tmp_path.iterdir())
