"""Forwards as people write them: what an exported file takes and gives, which axes vary, and in which type."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOWarning, QuantizedModel, quantize
from lightning_cco.export.ort_session import engine_session

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class Body(nn.Module):
    """Eight numbers to three logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Detecting(nn.Module):
    """Beside the losses it returns what one of them is made of: the prediction of its first layer, and only with labels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 3), nn.Linear(3, 3)

    def forward(self, values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        early = self.first(values)
        logits = self.last(early.relu())
        if labels is None:
            return {"logits": logits}
        if (labels < 0).any():
            raise ValueError("no class")
        loss = nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(early, labels)
        return {"loss": loss, "logits": logits, "early": early}


class Labelled(Body):
    def forward(self, values: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.logits(values if mask is None else values * mask)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Keywords(Body):
    def forward(self, **inputs: Tensor) -> Tensor:
        return self.logits(inputs["values"] * inputs["mask"])


class Rest(Body):
    def forward(self, values: Tensor, *rest: Any, scale: float = 1.0) -> Tensor:
        return self.logits(values * scale)


class Nested(Body):
    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = batch["pair"]
        return self.logits(first), {"other": self.logits(second)}


def ready(model: nn.Module, *args: Any, **kwargs: Any) -> QuantizedModel:
    quantized = quantize(model.eval(), None, args, example_kwargs=kwargs)
    quantized.calibrate([None], lambda module, _: module(*args, **kwargs))
    return quantized


def names(session: ort.InferenceSession) -> tuple[list[str], list[str]]:
    return [entry.name for entry in session.get_inputs()], [entry.name for entry in session.get_outputs()]


VALUES, MASK = torch.linspace(-1, 1, 40).reshape(5, 8), (torch.arange(40).reshape(5, 8) % 3 > 0).float()
LABELS = torch.arange(5) % 3


@pytest.mark.parametrize(
    ("make", "args", "kwargs", "inputs", "outputs"),
    [
        (Labelled, (), {"values": VALUES, "mask": MASK, "labels": LABELS}, ["values", "mask"], ["logits"]),
        (Detecting, (), {"values": VALUES, "labels": LABELS}, ["values"], ["logits"]),
        (Keywords, (), {"values": VALUES, "mask": MASK}, ["values", "mask"], ["output_0"]),
        (Rest, (VALUES,), {"scale": 0.5}, ["values"], ["output_0"]),
        (Nested, ({"pair": (VALUES, MASK)},), {}, ["batch_pair_0", "batch_pair_1"], ["output_0", "output_1"]),
    ],
    ids=["labels", "labels of layers", "keywords", "rest", "nested"],
)
def test_a_file_takes_the_tensors_of_the_forward_without_labels(
    make: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[str], outputs: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    quantized = ready(make(), *args, **kwargs)
    report = quantized.export(tmp_path / "model.onnx", args, kwargs)
    assert any("labels" in note for note in report.notes) == ("labels" in kwargs)
    session = engine_session(str(tmp_path / "model.onnx"))
    assert names(session) == (inputs, outputs)
    feeds = dict(zip(inputs, (VALUES.numpy(), MASK.numpy()), strict=False))
    got = session.run(None, feeds)
    with torch.no_grad():
        expected = quantized.model(*args, **kwargs)
    expected = expected["logits"] if isinstance(expected, dict) else expected[0] if isinstance(expected, tuple) else expected
    np.testing.assert_allclose(got[0], expected.numpy(), atol=0.05)


class Masked(Body):
    """Sequence first, with a mask of each pair of steps and the positions of the steps."""

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return self.logits(torch.softmax(mask, -1) @ x + positions[:, None])


class Graph(Body):
    """Nodes, and edges between any number of them."""

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        return self.logits(torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]]))


class Shared(Body):
    """A batch, and one table for all of it."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.logits(x + table)


@pytest.mark.parametrize(
    ("make", "shapes", "others"),
    [
        (Masked, ((5, 8), (5, 5), (5,)), ((7, 8), (7, 7), (7,))),
        (Graph, ((9, 8), (2, 20)), ((4, 8), (2, 20))),
        (Shared, ((4, 6, 8), (1, 6, 8)), ((3, 6, 8), (1, 6, 8))),
        (Shared, ((1, 6, 8), (6, 8)), ((3, 6, 8), (6, 8))),
    ],
    ids=["sequence first", "graph", "broadcast", "no batch"],
)
def test_axes_vary_where_the_model_lets_them(make: Any, shapes: tuple[Any, ...], others: tuple[Any, ...], tmp_path: Path) -> None:
    def inputs(sizes: tuple[Any, ...]) -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randint(0, 4, size) if size == (2, 20) else torch.rand(size) for size in sizes]

    quantized = ready(make(), *inputs(shapes))
    quantized.export(tmp_path / "model.onnx", inputs(shapes), check=False)
    session = engine_session(str(tmp_path / "model.onnx"))
    feeds = inputs(others)
    got = session.run(None, {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), feeds, strict=True)})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, quantized.model(*feeds).numpy(), atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_type_is_exported_in_float32_and_stays_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = ready(Rest().to(dtype), VALUES.to(dtype))
    quantized.model(VALUES.to(dtype)).sum().backward()  # what a step leaves
    gradients = [parameter.grad for parameter in quantized.model.parameters()]
    before = {name: tensor.clone() for name, tensor in quantized.model.state_dict().items()}
    report = quantized.export(tmp_path / "model.onnx", (VALUES.to(dtype),))
    assert any("float32" in note for note in report.notes)
    after = quantized.model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype is dtype for name, tensor in before.items())
    assert all(parameter.grad is grad for parameter, grad in zip(quantized.model.parameters(), gradients, strict=True))
    session = engine_session(str(tmp_path / "model.onnx"))
    got = session.run(None, {"values": VALUES.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, quantized.model(VALUES.to(dtype)).float().numpy(), atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_so_it_is_with_quantized_operators(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype),
        torch.randn(6, 8).to(dtype),
    )
    quantized = quantize(model, {"deployment_settings": {"target_framework": "executorch"}}, (x,))
    quantized.calibrate([(x,)])
    program = quantized.export(tmp_path / "model.pt2", (x,), pt2e=True, batches=[(x[:3],)])
    assert isinstance(program, torch.export.ExportedProgram)
    assert all(parameter.dtype is dtype for parameter in model.parameters())
    with torch.no_grad():
        expected = model(x).float().numpy()
        for parameter in model.parameters():
            parameter.zero_()  # the model trains on
        for one in (program, torch.export.load(tmp_path / "model.pt2")):
            np.testing.assert_allclose(one.module()(x.float()).numpy(), expected, atol=0.05)


class NamedAsOperators(nn.Module):
    """Arguments, results and parameters that are called as the exporter calls what is inside of a file."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.first, self.second, self.last = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, cat: Tensor, linear: Tensor, weight: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.first(torch.cat([cat, linear], 1)))
        h = torch.relu(self.second(h) + weight @ self.weight + self.bias)
        return {"relu": h, "linear_1": self.last(h), "bias": h * 2}


@pytest.mark.parametrize(
    "names",
    [{}, {"input_names": ["mean", "view", "last.weight"], "output_names": ["cat", "quantize_linear", "relu_1"]}],
    ids=["own", "given"],
)
def test_names_that_are_those_of_operators(names: dict[str, Any], tmp_path: Path) -> None:
    model, batch = NamedAsOperators().eval(), tuple(torch.randn(4, 8) for _ in range(3))
    quantized = quantize(model, None, batch)
    quantized.calibrate([batch])
    quantized.export(tmp_path / "a.onnx", batch, **names)
    session = ort.InferenceSession(tmp_path / "a.onnx")
    assert [given.name for given in session.get_inputs()] == names.get("input_names", ["cat", "linear", "weight"])
    assert [given.name for given in session.get_outputs()] == names.get("output_names", ["relu", "linear_1", "bias"])
    found = session.run(None, {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), batch, strict=True)})
    with torch.no_grad():
        wanted = model(*batch)
    for got, want in zip(found, wanted.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-3)


class Shifted(nn.Module):
    """Reads the labels, shifted by one, as the decoders of translators do, and places that no gradient reaches; gives a loss beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            places = torch.arange(x.shape[1]).float()[:, None].sin()
        logits = self.head(torch.relu(self.body(x) + self.table(labels.roll(1, 1)) + places))
        return {"loss": nn.functional.cross_entropy(logits.view(-1, 6), labels.view(-1)), "logits": logits}


def test_a_loss_of_labels_that_the_logits_need_is_left_out_of_a_forward_that_switches_gradients_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(2, 5, 8), torch.randint(0, 6, (2, 5))
    model = Shifted().eval()
    quantized = quantize(model, None, (x, labels))
    quantized.calibrate([(x, labels)])
    quantized.export(tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx")
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    (found,) = session.run(None, {"x": x.numpy(), "labels": labels.numpy()})
    np.testing.assert_allclose(found, quantized.model(x, labels)["logits"].detach(), atol=1e-4)


class Masked(nn.Module):
    """Without a mask it adds something else at another place."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.relu(self.body(x))
        if mask is None:
            x = x + self.body.bias
        else:
            x = x + mask
        logits = self.head(torch.relu(self.more(torch.relu(x))))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_arguments_that_are_left_out_to_find_labels_make_no_difference_to_what_was_captured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, mask, labels = torch.randn(4, 8), torch.rand(4, 8), torch.tensor([0, 1, 2, 0])
    quantized = quantize(Masked().eval(), None, (x, mask, labels))
    quantized.calibrate([(x, mask, labels)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = quantized.export(tmp_path / "model.onnx", batches=[(x, mask, labels)])
    assert not [str(entry.message) for entry in caught if issubclass(entry.category, CCOWarning)]
    assert not quantized.drift
    assert list(report.inputs) == ["x", "mask"]
    (found,) = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy(), "mask": mask.numpy()})
    np.testing.assert_allclose(found, quantized.model(x, mask)["logits"].detach(), atol=5e-3)  # a step of the grid


class Contrastive(nn.Module):
    """Compares each sample with each other one of its batch; a flag asks for the loss, as in CLIP and SigLIP of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor, return_loss: bool | None = None, return_features: bool = False) -> dict[str, Tensor]:
        features = torch.relu(self.body(x))
        found = {"logits": self.head(features), **({"features": features} if return_features else {})}
        if not return_loss:
            return found
        likeness = found["logits"] @ found["logits"].t()
        return {"loss": nn.functional.cross_entropy(likeness, torch.arange(len(x))), **found}


@pytest.mark.parametrize("features", [False, True])
def test_a_flag_that_asks_for_a_loss_is_left_out(features: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    example = {"return_loss": True, "return_features": features}
    quantized = quantize(Contrastive().eval(), None, (x,), example)
    quantized.calibrate([{"x": x, **example}])
    report = quantized.export(tmp_path / "a.onnx")
    assert list(report.inputs) == ["x"]
    assert report.inputs["x"][0] == "batch"  # a loss that counts the samples would fix it
    outputs = [output.name for output in ort.InferenceSession(tmp_path / "a.onnx").get_outputs()]
    assert outputs == (["logits", "features"] if features else ["logits"])
