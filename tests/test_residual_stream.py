"""The residual stream: in float, at 8 bits, or of the bits of all activations; in the model, in the plan and in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import ResidualCNN
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_cco as cc

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class PreActivation(nn.Module):
    """Norm and activation before each convolution; the second sum is written in place, the third is a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.convs[0](F.relu(self.norms[0](x)))
        x += self.convs[1](F.relu(self.norms[1](x)))
        x = torch.sub(x, self.convs[2](F.relu(self.norms[2](x))))
        return self.head(F.relu(x).mean((2, 3)))


class Bottlenecks(nn.Module):
    """Linear bottlenecks, whose shortcut no activation is in; the second branch ends in a product, as with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4)
        self.wide = nn.ModuleList(nn.Conv2d(8, 16, 1) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(2))
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.narrow[0](F.relu6(self.wide[0](x)))
        h = self.narrow[1](F.relu6(self.wide[1](x)))
        x = x + h * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(h, 1)))
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


class Pyramid(nn.Module):
    """A top-down path with lateral convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.lateral, self.smooth, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.first(x))
        coarse = F.relu(self.second(fine))
        return self.last(F.relu(self.smooth(self.lateral(fine) + F.interpolate(coarse, scale_factor=2.0))))


class Encoder(nn.Module):
    """A transformer's layer before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.layer = nn.Conv2d(1, 16, 4, 4), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


NETWORKS = {"residual": ResidualCNN, "pre-activation": PreActivation, "bottlenecks": Bottlenecks, "pyramid": Pyramid, "encoder": Encoder}
FORMS = ["quantized", "int8", "float"]


def quantized_network(name: str, form: str, bits: int = 2, target: str = "ort") -> tuple[cc.QuantizedModel, Tensor]:
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.randn(8, 1, 16, 16)
    recipe = {
        "global_quantization_settings": {"weights_num_bits": bits, "activations_num_bits": bits, "residual_stream": form},
        "deployment_settings": {"target_framework": target},
    }
    quantized = cc.quantize(model, recipe, (x,))
    quantized.calibrate([x])
    return quantized, x


class Levels(TorchFunctionMode):
    """How many different values the convolutions and the sums of a forward read."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[int] = []
        self.sums: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if name == "conv2d":
            self.convolutions.append(len(args[0].unique()))
        elif name in ("add", "add_", "sub") and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args):
            self.sums += [len(arg.unique()) for arg in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("name", ["residual", "pre-activation", "bottlenecks"])
def test_sums_are_as_fine_as_the_setting_says(name: str, target: str) -> None:
    """Of 2 bits an unsigned format has 4 levels. Whatever the sums read, convolutions of blocks read no more than these."""
    most = {"quantized": (0, 4), "int8": (5, 256), "float": (257, 10**9)}
    for form, (fewest, largest) in most.items():
        quantized, x = quantized_network(name, form, target=target)
        with torch.no_grad(), Levels() as levels:
            quantized.model(x)
        assert max(levels.sums) <= largest, form
        assert max(levels.sums) >= fewest, form
        behind_sums = levels.convolutions[1:]
        in_float = [layer for layer in quantized.plan.weight_only if quantized.graph[layer].kind == "conv"]
        few = [count for count in behind_sums if count <= 4]
        assert len(few) >= len(behind_sums) - len(in_float)
        quantized.remove()


@pytest.mark.parametrize(
    ("name", "form"),
    [("residual", "int8"), ("bottlenecks", "float")]
    + [pytest.param(name, form, marks=pytest.mark.slow) for name in NETWORKS for form in FORMS],
)
def test_the_file_computes_what_the_model_does(name: str, form: str, tmp_path: Path) -> None:
    """Export runs the file in ONNX Runtime and refuses one that differs; what is planned in INT8 runs in INT8 there."""
    quantized, x = quantized_network(name, form, bits=3)
    report = quantized.export(tmp_path / "model.onnx", (x,))
    assert report.sqnr_db > 30
    assert not [island for island in report.float_islands if island.reason.startswith("planned in INT8")]
    convolutions = sum(quantized.graph[layer].kind == "conv" for layer in quantized.plan.quantized)
    assert report.integer_nodes.get("QLinearConv", 0) >= convolutions


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_resolved_recipe_and_the_state_give_the_same_model(name: str, form: str) -> None:
    quantized, x = quantized_network(name, form)
    again = cc.plan_quantization(quantized.graph, quantized.plan.resolved_settings())
    assert again.tensors == quantized.plan.tensors
    assert again.reads == quantized.plan.reads
    assert again.quantized == quantized.plan.quantized
    with torch.no_grad():
        wanted = quantized.model(x)
    other, _ = quantized_network(name, form)
    other.model.load_state_dict(quantized.model.state_dict())
    assert other.load_state_dict(quantized.state_dict()) == []
    assert not other.uncalibrated
    with torch.no_grad():
        torch.testing.assert_close(other.model(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "form"), [(2, "int8"), (3, "int8"), (8, "quantized")])
def test_auto_goes_by_the_bits(bits: int, form: str) -> None:
    assert quantized_network("residual", "auto", bits)[0].plan.tensors == quantized_network("residual", form, bits)[0].plan.tensors


def test_of_4_bits_sums_that_are_multiplied_have_4() -> None:
    plan = quantized_network("residual", "auto", 4)[0].plan
    assert not [key for key in plan.tensors if key.as_read]
    assert plan.decisions["relu"].activations_num_bits == 4  # which is added, and multiplied


def test_eight_bits_are_seen_in_the_plan() -> None:
    quantized, x = quantized_network("residual", "int8")
    stream = quantized.plan.decisions["relu"]
    assert (stream.activations_num_bits, stream.read_num_bits, stream.bits()) == (8, 2, "A8→2")
    assert quantized.plan.decisions["relu_1"].bits() == "A2"
    report = quantized.sensitivity([[x]])
    assert {"relu", "relu_1"} <= set(report.local)


def test_a_layer_keeps_its_rule_in_a_stream_in_float() -> None:
    """A convolution whose result is in float runs in float in ONNX Runtime, unless a rule wants it quantized by name."""
    graph = cc.capture_graph(ResidualCNN().eval(), torch.randn(2, 1, 16, 16))
    last = next(layer.name for layer in graph if layer.path == "blocks.0.conv2")
    general = {"activations_num_bits": 4, "residual_stream": "float"}
    plan = cc.plan_quantization(graph, cc.load_settings({"global_quantization_settings": general}))
    assert last in plan.weight_only
    assert "residual_stream: float" in plan.skipped[last]
    asked = {"global_quantization_settings": general, "layer_settings": [{"match": last, "skip_quantization": False}]}
    assert last in cc.plan_quantization(graph, cc.load_settings(asked)).quantized


def test_what_the_setting_may_be() -> None:
    with pytest.raises(cc.CCOError, match=r"residual_stream: expected one of .*, got 'floot'.*float"):
        cc.load_settings({"global_quantization_settings": {"residual_stream": "floot"}})
