"""Constants of channels after a layer with weights (frozen batch norms written out, LayerScale): folded as batch norms are, in training and in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from export_case import run
from torch import Tensor, nn

from lightning_cco import QuantizedModel, plan_quantization, quantize
from lightning_cco.batches import capture_module
from lightning_cco.export.ort_session import engine_session

Form = Callable[[nn.Module, Tensor], Tensor]


class Frozen(nn.Module):
    """A batch norm of buffers, as torchvision and transformers write it out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.2)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = weight * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (bias - self.running_mean.reshape(1, -1, 1, 1) * scale)


def norm(frozen: Frozen) -> nn.Module:
    made = nn.BatchNorm2d(len(frozen.weight)).eval()
    made.load_state_dict(frozen.state_dict(), strict=False)
    return made


class Residual(nn.Module):
    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3, bias=False), *(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))])
        self.norms = nn.ModuleList(norms)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.convs[0](x)))
        y = F.relu(self.norms[1](self.convs[1](x)))
        y = F.relu(self.norms[2](self.convs[2](y)) + x)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("target", ["ort", "openvino", "tensorrt", "executorch", "qnn"])
def test_a_frozen_batch_norm_is_planned_as_one_of_pytorch(target: str) -> None:
    torch.manual_seed(0)
    frozen = [Frozen(8) for _ in range(3)]
    written, reference = Residual(list(frozen)), Residual([norm(one) for one in frozen])
    reference.load_state_dict(written.state_dict(), strict=False)
    batches = [torch.randn(4, 3, 10, 10) for _ in range(3)]
    made = [quantize(net.eval(), {"deployment_settings": {"target_framework": target}}, (batches[0],)) for net in (written, reference)]
    for quantized in made:
        quantized.calibrate([(x,) for x in batches])
    mine, theirs = (
        [
            (quantized.graph[key.layer].kind, spec.num_bits, float(quantized.activations[key].scale))
            for key, spec in quantized.plan.tensors.items()
        ]
        for quantized in made
    )
    as_norms = {"mul": "batch_norm", "add": "batch_norm"}
    assert [(as_norms.get(kind, kind), bits) for kind, bits, _ in mine] == [(as_norms.get(kind, kind), bits) for kind, bits, _ in theirs]
    np.testing.assert_allclose([scale for *_, scale in mine], [scale for *_, scale in theirs], rtol=1e-5)
    x = torch.randn(8, 3, 10, 10)
    with torch.no_grad():
        expected, found = reference(x), written(x)
    assert (found - expected).abs().mean() < 1e-4 * expected.abs().mean()
    assert sum(name.startswith(("mul", "add")) for name in made[0].plan.folded) == 6


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_file_is_that_of_a_batch_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    frozen = [Frozen(8) for _ in range(3)]
    written, reference = Residual(list(frozen)), Residual([norm(one) for one in frozen])
    reference.load_state_dict(written.state_dict(), strict=False)
    batches = [torch.randn(4, 3, 10, 10) for _ in range(3)]
    nodes, results = [], []
    for number, net in enumerate((written, reference)):
        quantized = quantize(net.eval(), None, (batches[0],))
        quantized.calibrate([(x,) for x in batches])
        report = quantized.export(tmp_path / f"{number}.onnx")
        assert report.largest_steps <= 1.0
        nodes.append(sorted(node.op_type for node in onnx.load(tmp_path / f"{number}.onnx").graph.node))
        results.append(run(tmp_path / f"{number}.onnx", batches[1]))
    assert nodes[0] == nodes[1]
    assert "Mul" not in nodes[0]
    np.testing.assert_allclose(results[0], results[1], atol=1e-4 * np.abs(results[1]).max())


class Single(nn.Module):
    """A layer, what comes after it, a ReLU, and a layer in float."""

    def __init__(self, layer: nn.Module, form: Form) -> None:
        super().__init__()
        self.layer, self.form, rows = layer, form, isinstance(layer, nn.Linear)
        self.factor, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        with torch.no_grad():
            self.factor[0], self.factor[1] = 0.0, -abs(float(self.factor[1]))
        self.register_buffer("one", torch.tensor(-0.7))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3) if rows else nn.Conv2d(8, 3, 1)

    def column(self, name: str) -> Tensor:
        return getattr(self, name)[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.form(self, self.layer(x)))


def in_place(module: nn.Module, x: Tensor) -> Tensor:
    x.mul_(module.column("factor"))
    x += module.column("shift")
    return F.relu(x)


def divisor(module: nn.Module) -> Tensor:
    return module.factor.abs() + 0.3


Folded = Callable[[nn.Module], tuple[Tensor | float, Tensor | float]]
IMAGES: dict[str, tuple[Form, Folded]] = {
    "mul": (lambda m, x: F.relu(x * m.column("factor")), lambda m: (m.factor, 0.0)),
    "on its left": (lambda m, x: F.relu(m.column("factor")[None] * x), lambda m: (m.factor, 0.0)),
    "mul, add": (lambda m, x: F.relu(x * m.column("factor") + m.column("shift")), lambda m: (m.factor, m.shift)),
    "add, mul": (lambda m, x: F.relu((x + m.column("shift")) * m.column("factor")), lambda m: (m.factor, m.shift * m.factor)),
    "sub, div": (
        lambda m, x: F.relu((x - m.column("shift")) / divisor(m)[:, None, None]),
        lambda m: (1 / divisor(m), -m.shift / divisor(m)),
    ),
    "of one value": (lambda m, x: F.relu(x * m.one + m.one), lambda m: (m.one, m.one)),
    "in place": (in_place, lambda m: (m.factor, m.shift)),
    "by keywords": (lambda m, x: F.relu(torch.mul(other=m.column("factor"), input=x)), lambda m: (m.factor, 0.0)),
    "after dropout": (lambda m, x: F.relu(m.drop(x) * m.column("factor")), lambda m: (m.factor, 0.0)),
    "three": (lambda m, x: F.relu(m.one * (x * m.column("factor") * m.one)), lambda m: (m.one * m.one * m.factor, 0.0)),
}
ROWS: dict[str, tuple[Form, Folded]] = {
    "mul": (lambda m, x: F.relu(x * m.factor), lambda m: (m.factor, 0.0)),
    "mul, add": (lambda m, x: F.relu(x * m.factor[None, None] + m.shift), lambda m: (m.factor, m.shift)),
    "moved between": (lambda m, x: F.relu(x.permute((0, 2, 1)) * m.factor[:, None]).transpose(1, 2), lambda m: (m.factor, 0.0)),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[Form, Folded]]]] = {
    "conv": (lambda: nn.Conv2d(4, 8, 3), [*IMAGES.values()]),
    "conv in groups, without bias": (lambda: nn.Conv2d(4, 8, 3, bias=False, groups=2), [IMAGES["mul"], IMAGES["mul, add"]]),
    "linear": (lambda: nn.Linear(16, 8), [*ROWS.values()]),
    "linear without bias": (lambda: nn.Linear(16, 8, bias=False), [ROWS["mul"], ROWS["mul, add"]]),
}
FOLDED = [folded for _, forms in LAYERS.values() for _, folded in forms]


class Forms(nn.Module):
    """Each form after each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Single(make(), form) for make, forms in LAYERS.values() for form, _ in forms)

    def forward(self, image: Tensor, rows: Tensor) -> list[Tensor]:
        return [part(rows if isinstance(part.layer, nn.Linear) else image) for part in self.parts]


def example() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)


def on_grid(x: Tensor, quantized: QuantizedModel, name: str) -> Tensor:
    quantizer = quantized.activations[name]
    return torch.fake_quantize_per_tensor_affine(x, float(quantizer.scale), int(quantizer.zero_point), 0, 255)


def by_hand(quantized: QuantizedModel, part: Single, x: Tensor, relu: str, factor: Tensor | float, shift: Tensor | float) -> Tensor:
    """Torch's own fake quantize of the weight times the factor, which are multiplied in float64."""
    weight = part.layer.weight.double()
    factor = torch.as_tensor(factor).double().expand(len(weight))
    weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    scale = weight.abs().flatten(1).amax(1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    weight = torch.fake_quantize_per_channel_affine(weight.float(), scale.float(), torch.zeros(len(weight)).int(), 0, -127, 127)
    bias = (part.layer.bias.double() * factor if part.layer.bias is not None else 0.0) + torch.as_tensor(shift).double().expand_as(factor)
    y = F.linear(x, weight, bias.float()) if x.dim() == 3 else F.conv2d(x, weight, bias.float(), groups=part.layer.groups)
    return part.head(on_grid(F.relu(y), quantized, relu))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_training_and_file_have_the_weight_times_the_factor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Forms().eval()
    quantized = quantize(net, None, example())
    quantized.calibrate([example() for _ in range(3)])
    relus = [layer.name for layer in quantized.graph if layer.kind == "relu"]
    assert list(quantized.plan.tensors) == ["input_0", "input_1", *relus]
    x = example()
    report = quantized.export(tmp_path / "model.onnx")
    assert report.largest_steps <= 1.0
    file = engine_session(str(tmp_path / "model.onnx"))
    assert not {"Mul", "Div", "Sub"} & {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    with torch.no_grad():
        trained, written = net(*x), file.run(None, {"image": x[0].numpy(), "rows": x[1].numpy()})
        for part, relu, folded, one, other in zip(net.parts, relus, FOLDED, trained, written, strict=True):
            rows = isinstance(part.layer, nn.Linear)
            expected = by_hand(quantized, part, on_grid(x[rows], quantized, f"input_{int(rows)}"), relu, *folded(part))
            # A value between two levels may go to either.
            step = float(quantized.activations[relu].scale) * float(part.head.weight.abs().amax())
            for found in (one, torch.from_numpy(other)):
                assert (found - expected).abs().max() <= 1.01 * step
                assert (found - expected).abs().mean() < 0.02 * step


def test_gradients_are_those_of_the_float_factor_after_a_rounded_product() -> None:
    torch.manual_seed(0)
    net = Single(nn.Conv2d(4, 8, 3), IMAGES["mul, add"][0])
    x = torch.randn(4, 4, 8, 8)
    quantized = quantize(net, None, (x,))
    quantized.calibrate([(x,)])
    quantized.freeze_ranges()
    net.train()(x).square().sum().backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    weight = net.layer.weight
    scale = weight.detach().abs().flatten(1).amax(1) / 127
    rounded = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(8).int(), 0, -127, 127)
    y = F.conv2d(on_grid(x, quantized, "input_0"), rounded, net.layer.bias) * net.column("factor") + net.column("shift")
    y = on_grid(F.relu(y), quantized, "relu")
    F.conv2d(y, net.head.weight, net.head.bias).square().sum().backward()
    for one, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-3, atol=1e-3)
    assert float(net.factor.grad.abs().sum()) > 0


class Net(nn.Module):
    """A convolution, some use of its result, and a ReLU before two more."""

    def __init__(self, use: Form, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.use = use
        self.layer, self.other, self.head = layer or nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        self.factor, self.row, self.place = (
            nn.Parameter(torch.rand(8, 1, 1) + 0.5),
            nn.Parameter(torch.rand(8)),
            nn.Parameter(torch.rand(1, 8, 8)),
        )
        self.register_buffer("integers", torch.arange(1, 9)[:, None, None])

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.use(self, x)

    def rest(self, y: Tensor) -> Tensor:
        return self.head(F.relu(self.other(F.relu(y))))

    def in_evaluation(self, y: Tensor) -> Tensor:
        if not self.training:
            y = y * self.factor
        return y


def with_output(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.layer(x)
    return m.rest(y * m.factor), y


def read_twice(m: nn.Module, x: Tensor) -> Tensor:
    y = m.layer(x)
    return m.rest(y * m.factor + y)


def written_through_a_view(m: nn.Module, x: Tensor) -> Tensor:
    y = m.layer(x)
    y.permute((0, 2, 3, 1)).mul_(m.row)
    return m.rest(y)


APART: dict[str, Form] = {
    "read twice": read_twice,
    "an output": with_output,
    "a factor of the input": lambda m, x: m.rest(m.layer(x) * x.mean((2, 3)).repeat(1, 2)[..., None, None]),
    "one for each place": lambda m, x: m.rest(m.layer(x) * m.place),
    "one for each column": lambda m, x: m.rest(m.layer(x) * m.row),
    "integers": lambda m, x: m.rest(m.layer(x) * m.integers),
    "less than a constant": lambda m, x: m.rest(m.factor - m.layer(x)),
    "reversed": lambda m, x: m.rest(torch.rsub(m.layer(x), m.factor)),
    "a divisor": lambda m, x: m.rest(m.factor / (m.layer(x).square() + 1)),
    "alpha": lambda m, x: m.rest(torch.add(m.layer(x), m.factor, alpha=2)),
    "in evaluation alone": lambda m, x: m.rest(m.in_evaluation(m.layer(x))),
    "in training alone": lambda m, x: m.rest(m.layer(x) * m.factor if m.training else m.layer(x)),
    "through a view": written_through_a_view,
    "another type": lambda m, x: m.rest((m.layer(x) * m.factor.double()).float()),
}


@pytest.mark.parametrize("name", APART)
def test_what_does_not_fold(name: str) -> None:
    torch.manual_seed(0)
    plan = quantize(Net(APART[name]).eval(), None, (torch.randn(2, 4, 8, 8),)).plan
    assert not plan.folded
    assert "conv" not in plan.groups or plan.graph[plan.groups["conv"]].kind == "relu"


def scaled(module: nn.Module, x: Tensor) -> Tensor:
    return module.rest(module.layer(x) * module.factor)


def test_rules_and_forms_of_weights_that_keep_a_factor_apart() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert quantize(Net(scaled), None, (x,)).plan.folded == {"mul": "conv"}
    for rule in ({"match": "mul", "skip_quantization": True}, {"match": "conv", "skip_quantization": True}):
        assert not quantize(Net(scaled), {"layer_settings": [rule]}, (x,)).plan.folded

    def rows(m: nn.Module, x: Tensor) -> Tensor:
        return m.rest((m.layer(x) * m.row).reshape(2, 8, 4, 4))

    grouped = {"global_quantization_settings": {"weights_group_size": 16}}
    assert quantize(Net(rows, nn.Linear(32, 8)), None, (torch.randn(2, 16, 32),)).plan.folded == {"mul": "linear"}
    assert not quantize(Net(rows, nn.Linear(32, 8)), grouped, (torch.randn(2, 16, 32),)).plan.folded


@pytest.mark.parametrize("target", ["ort", "executorch"])
@pytest.mark.parametrize("last", [False, True])
def test_the_resolved_recipe_gives_the_plan_again(target: str, last: bool) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 8, 2), nn.BatchNorm2d(8), Net(scaled, nn.ConvTranspose2d(8, 8, 1))).eval()
    settings = {"deployment_settings": {"target_framework": target}, "global_quantization_settings": {"skip_tail_quantization": not last}}
    plan = quantize(net, settings, (torch.randn(2, 4, 8, 8),)).plan
    assert len(plan.folded) == 2
    again = plan_quantization(plan.graph, plan.resolved_settings())
    assert (again.folded, again.groups, again.quantized, again.weight_only) == (plan.folded, plan.groups, plan.quantized, plan.weight_only)


class Shared(nn.Module):
    """One module called with two factors, one factor after two modules, one weight in two layers, and a LayerScale before a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.tied, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.tied.weight = self.first.weight
        self.factors = nn.ParameterList(torch.randn(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x) * self.factors[0])
        x = F.relu(self.first(x) * self.factors[1])
        x = F.relu(self.tied(x) * self.factors[2])
        x = x + self.second(x) * self.factors[2]
        return self.head(F.layer_norm(x, (8,)))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_shared_modules_weights_and_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Shared().eval()
    batches = [torch.randn(4, 5, 8) for _ in range(3)]
    quantized = quantize(net, None, (batches[0],))
    quantized.calibrate([(x,) for x in batches])
    assert quantized.plan.folded == {"mul": "linear", "mul_1": "linear_1", "mul_2": "linear_2", "mul_3": "linear_3"}
    assert "mul_3" not in quantized.plan.tensors  # as the result of a linear layer, the branch is not rounded before it is added
    report = quantized.export(tmp_path / "model.onnx")
    assert report.largest_steps <= 1.0
    assert "Mul" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    with torch.no_grad():
        expected = net(batches[1]).numpy()
    difference = run(tmp_path / "model.onnx", batches[1]) - expected
    assert np.square(difference).sum() < 1e-4 * np.square(expected).sum()


class Tasks(nn.Module):
    """A factor for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.factors, self.task = nn.ParameterList(torch.rand(8) for _ in range(2)), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x) * self.factors[self.task]))


class TasksInTurn(pl.LightningModule):
    """Calls a network twice in a step, for one task or for two."""

    def __init__(self, tasks: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.tasks = Tasks(), tasks

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.of_task(batch, 0) + self.of_task(batch, 1)

    def of_task(self, batch: Tensor, turn: int) -> Tensor:
        self.net.task = self.tasks[turn]
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize("tasks", [(0, 0), (0, 1)])
def test_a_module_that_is_called_with_two_factors_takes_in_neither(tasks: tuple[int, int]) -> None:
    module = TasksInTurn(tasks)
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    plan = plan_quantization(capture_module(module, torch.randn(4, 8))[0].graph)
    assert plan.folded == ({"mul": "linear"} if tasks == (0, 0) else {})
