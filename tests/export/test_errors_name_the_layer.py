"""What can't be in a file, or does not run in the engine, is refused with the layer's name."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.errors import CCOError, CCOWarning


class Ensemble(nn.Module):
    """Three linear layers as one function of their stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weights, self.last = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8, 8) / 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(torch.vmap(lambda weight: F.linear(x, weight))(self.weights).mean(0))


class Projected(nn.Module):
    """An LSTM whose hidden state is projected, for which ONNX has no operator; the exporter writes one all the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 12, proj_size=6, batch_first=True, **options)
        self.last = nn.Linear(12 if self.rnn.bidirectional else 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0])


def _export(model: nn.Module, x: Tensor, path: Path, **options: Any) -> None:
    quantized = quantize(model.eval(), None, (x,))
    quantized.calibrate([x])
    quantized.export(path, **options)


def test_weights_inside_a_vmap(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"'linear_1'.*torch\.vmap"):
        _export(Ensemble(), torch.randn(4, 8), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match="does not run in ONNX Runtime at layer 'lstm'"):
        _export(Projected(), torch.randn(2, 5, 8), tmp_path / "a.onnx", custom_translation_table={})


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"bias": False}])
def test_an_lstm_with_a_projection(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"layer 'lstm' \(module 'rnn'\).*proj_size=6.*\.pt2"):
        _export(Projected(**options), torch.randn(2, 5, 8), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.filterwarnings("ignore:.*are not in the layer graph")
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_scripted_modules(ending: str, tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), inner, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(CCOError, match=r"What torch\.jit\.script has made can't be traced: '2\.1'\. Put the Python module"):
        _export(model, torch.randn(4, 8), tmp_path / f"a.{ending}")


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            positions = positions.requires_grad_(True)
            energy = self.net(positions).sum()
            return energy, -torch.autograd.grad(energy, positions)[0]


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_gradients_inside_a_forward(ending: str, tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"Its forward takes gradients .*Export the submodule that computes what is differentiated"):
        _export(Forces(), torch.randn(8, 3), tmp_path / f"a.{ending}")


class Graph:
    """A batch as graph libraries have it."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.x, self.edges = x, edges


class Messages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, graph: Graph) -> Tensor:
        x = torch.relu(self.first(graph.x))
        summed = torch.zeros_like(x).index_add_(0, graph.edges[1], x[graph.edges[0]])
        return self.last(torch.relu(self.second(summed)))


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_objects_that_hold_tensors(ending: str, tmp_path: Path) -> None:
    model, graph = Messages().eval(), Graph(torch.randn(5, 8), torch.randint(0, 5, (2, 9)))
    quantized = quantize(model, None, (graph,))
    quantized.calibrate([(graph,)])
    assert {"linear", "linear_1"} <= set(quantized.plan.quantized)
    with pytest.raises(
        CCOError, match=r"'graph' is a Graph that holds the tensors 'x', 'edges'.*def forward\(self, x, edges\).*self\(batch\.x, \.\.\.\)"
    ):
        quantized.export(tmp_path / f"a.{ending}", (graph,))


class Chosen(nn.Module):
    """Something is chosen of what a layer makes, and goes on; indices are returned beside it."""

    def __init__(self, choose: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]], width: int) -> None:
        super().__init__()
        self.choose, self.first, self.second, self.last = choose, nn.Linear(8, 16), nn.Linear(width, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found = self.choose(torch.relu(self.first(x)))
        values, indices = found if isinstance(found, tuple) else (found, None)
        y = self.last(torch.relu(self.second(values)))
        return y if indices is None else (y, indices)


def test_an_operator_that_the_engine_has_not_for_a_type(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"does not run in ONNX Runtime at layer 'unique'.*NOT_IMPLEMENTED"):
        _export(Chosen(lambda x: x * torch.unique(x > 0).sum(), 16), torch.randn(8, 8), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_an_operator_that_onnx_has_not(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"uses aten\.cummax, which ONNX has no operator for"):
        _export(Chosen(lambda x: x.cummax(1).values, 16), torch.randn(8, 8), tmp_path / "a.onnx")


def test_indices_of_equal_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(CCOError, match=r"% of the integers of the output 'output_1' differ.*of equal values.*Return the values"):
        _export(Chosen(lambda x: x.topk(9, 1), 9), torch.randn(32, 8), tmp_path / "a.onnx")


def _choices(x: Tensor) -> Tensor:
    parts = x.view(-1, 4, 4)
    gathered = x.gather(1, x.topk(5, 1).indices) * 2
    chosen = [parts.max(1).values, parts.min(2)[0], x.topk(5, 1, largest=False)[0], (x - 3).topk(5, 1)[0], x.sort(1, descending=True)[0]]
    return torch.cat([*chosen, gathered, *torch.aminmax(parts, dim=1)], 1)


def test_what_is_chosen_is_right_in_the_engine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Chosen(_choices, 47).eval(), torch.randn(32, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx")
    assert report.sqnr_db > 50
    given = torch.randn(7, 8)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    with torch.no_grad():
        wanted = model(given)
    found = session.run(None, {"x": given.numpy()})[0]
    assert float((torch.from_numpy(found) - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


class OfAGraph(nn.Module):
    """Two layers around products with the matrix of a graph."""

    def __init__(self, matrix: Tensor | None = None) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor, matrix: Tensor | None = None) -> Tensor:
        matrix = self.matrix if matrix is None else matrix
        return self.last(F.relu(matrix @ self.second(F.relu(matrix @ self.first(x)))))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors(layout: torch.layout, tmp_path: Path) -> None:
    matrix = torch.eye(6).roll(1, 0).to_sparse(layout=layout)
    x = torch.randn(6, 8)
    with pytest.raises(CCOError, match=r"sparse tensor.*to_dense\(\)"):
        _export(OfAGraph(matrix), x, tmp_path / "a.onnx")
    model = OfAGraph().eval()
    quantized = quantize(model, None, (x, matrix))
    quantized.calibrate([(x, matrix)])
    with pytest.raises(CCOError, match=r"argument 'matrix' has the layout torch.sparse"):
        quantized.export(tmp_path / "a.onnx")


class Copies(nn.Module):
    """A part of itself, or a tensor, copied in its forward."""

    def __init__(self, of_module: bool) -> None:
        super().__init__()
        self.of_module = of_module
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = copy.deepcopy(self.first) if self.of_module else self.first
        return self.last(F.relu(first(x if self.of_module else copy.deepcopy(x))))


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize("of_module", [True, False])
def test_copies_made_in_a_forward(of_module: bool, ending: str, tmp_path: Path) -> None:
    line = inspect.getsourcelines(Copies.forward)[1] + (1 if of_module else 2)
    with pytest.raises(
        CCOError, match=rf"by torch.export at line {line} of {Path(__file__).name}: .*copies by copy\.deepcopy.*tensor\.clone\(\)"
    ):
        _export(Copies(of_module), torch.randn(4, 8), tmp_path / f"a.{ending}")


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.filterwarnings("ignore:.*though never when")
def test_a_model_that_was_changed_behind_its_plan(tmp_path: Path) -> None:
    """As where adapters are merged: nothing is called where it was when the layers were captured."""
    model, x = Outer(Outer(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))).eval(), torch.randint(9, (4,))
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model.inner = model.inner.inner
    with pytest.raises(
        CCOError, match=r"does not run 'embedding', 'linear' of the plan, nor any other.*Call \.remove\(\), then quantize the changed model"
    ):
        quantized.export(tmp_path / "a.onnx")


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_part_of_a_model_that_was_changed_behind_its_plan(ending: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(4, 8)
    deployment = {"target_framework": "ort" if ending == "onnx" else "executorch"}
    quantized = quantize(model, {"deployment_settings": deployment, "global_quantization_settings": {"weights_num_bits": 4}}, (x,))
    quantized.calibrate([x])
    model[2] = nn.Linear(8, 8)
    with pytest.warns(CCOWarning) as given:
        report = quantized.export(tmp_path / f"a.{ending}")
    if ending == "onnx":
        [note] = [note for note in report.notes if note.startswith("weights of fewer than 8 bits")]
        assert note.endswith("narrower range: linear")
    assert any(re.search(r"the forward that is exported does not run 'linear_1' of the plan\. ", str(warning.message)) for warning in given)


def test_packed_sequences(tmp_path: Path) -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
            return self.last(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])

    with pytest.raises(CCOError, match=r"packs sequences.*the padded sequence"):
        _export(Packs(), torch.randn(2, 5, 8), tmp_path / "a.onnx")


@torch.library.custom_op("lightning_cco_tests::relu_in_place", mutates_args=("x",))
def relu_in_place(x: Tensor) -> None:
    x.clamp_(min=0)


def test_an_operator_of_the_users_that_writes_to_its_argument(tmp_path: Path) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).detach()
            relu_in_place(x)
            return self.last(x)

    with pytest.raises(CCOError, match=r"uses lightning_cco_tests.relu_in_place, which ONNX has no operator for"):
        _export(Writes(), torch.randn(4, 8), tmp_path / "a.onnx")


def test_what_comes_in_and_goes_out_by_one_name(tmp_path: Path) -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
            scores = self.last(F.relu(self.first(x)) * mask.unsqueeze(1))
            return {"x": x, "mask": mask > 0.5, "scores": scores}

    model, batch = Passes().eval(), (torch.randn(4, 8), torch.ones(4))
    quantized = quantize(model, None, batch)
    quantized.calibrate([batch])
    report = quantized.export(tmp_path / "a.onnx")
    assert list(report.inputs) == ["x", "mask"]
    assert [output.name for output in report.outputs] == ["x_output", "mask_output", "scores"]
    found = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"x": batch[0].numpy(), "mask": batch[1].numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), batch[0])
    torch.testing.assert_close(torch.from_numpy(found[2]), model(*batch)["scores"].detach(), rtol=0, atol=1e-3)


class Policy(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(8, 16), nn.Linear(16, 8), how

    def forward(self, x: Tensor) -> object:
        y = self.last(self.first(x).relu())
        if self.how == "categorical":
            return torch.distributions.Categorical(logits=y)
        normal = torch.distributions.Normal(y[:, :4], y[:, 4:].exp(), validate_args=self.how != "unchecked")
        return {"checked": normal.mean, "unchecked": {"normal": normal, "value": y.mean(1)}, "normal": normal}[self.how]


@pytest.mark.parametrize(
    ("how", "ending", "message"),
    [
        ("categorical", "onnx", r"returned Categorical .* Return its parameters \(distribution\.logits\)"),
        ("normal", "onnx", r"returned Normal .* Return its parameters \(distribution\.loc, distribution\.scale\)"),
        ("checked", "onnx", r"at line .*validate_args=False, or let the forward"),
        ("checked", "pt2", r"at line .*validate_args=False, or let the forward"),
        ("unchecked", "pt2", r"a distribution is none of its types\. Let the forward that is exported return its parameters"),
    ],
)
def test_what_to_return_instead_of_a_distribution_is_said(how: str, ending: str, message: str, tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    quantized = quantize(Policy(how).eval(), None, (x,))
    quantized.calibrate([x])
    with pytest.raises(CCOError, match=message):
        quantized.export(tmp_path / f"a.{ending}")
