"""Constants that a forward cuts from a parameter or a buffer have the scale of the whole: in the model, in its file, at every size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.export.ort_session import engine_session
from lightning_cco.graph.capture import capture
from lightning_cco.quantization.qparams import weight_scale

CUTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "parameter": lambda m, x: m.pos[:, :, : x.shape[2]],
    "buffer": lambda m, x: m.buffer[..., : x.shape[2]],
    "attribute": lambda m, x: m.plain[:, :, : x.shape[2]],
    "offset": lambda m, x: m.pos.narrow(2, 4, x.shape[2]),
    "index_select": lambda m, x: m.pos.index_select(2, torch.arange(x.shape[2])),
    "rows": lambda m, x: m.rows[torch.arange(x.shape[2])].t()[None],
    "embedding": lambda m, x: m.embedding(torch.arange(x.shape[2])).t(),
    "transposed": lambda m, x: m.rows[: x.shape[2]].t().contiguous().unsqueeze(0),
    "batch": lambda m, x: m.samples[: x.shape[0]],
    "row, then slice": lambda m, x: m.stack[1][:, : x.shape[2]][None],
    "row and slice": lambda m, x: m.stack[-1, :, : x.shape[2]],
    "row, transposed, slice": lambda m, x: m.stack[1].t()[: x.shape[2]].t(),
    "rows of a row": lambda m, x: m.stack[1].t().index_select(0, torch.arange(x.shape[2])).t(),
    "channels": lambda m, x: m.bias[None, :, None].expand(-1, -1, x.shape[2]),
}


class Cutting(nn.Module):
    """A small network for each cut."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Conv1d(4, 8, 3, padding=1) for _ in names)
        self.second = nn.ModuleList(nn.Conv1d(8, 3, 1) for _ in names)
        table = torch.randn(1, 8, 40) * torch.linspace(0.2, 5, 40)  # other ranges in each slice
        self.pos, self.plain = nn.Parameter(table), table.clone()
        self.stack = nn.Parameter(torch.cat([table * 100, table]))
        self.register_buffer("buffer", table.clone())
        self.register_buffer("rows", table[0].t().clone())
        self.embedding = nn.Embedding(40, 8, _weight=table[0].t().clone())
        self.samples = nn.Parameter(torch.randn(8, 8, 1) * torch.linspace(0.2, 5, 8)[:, None, None])
        self.bias = nn.Parameter(torch.randn(8))
        self.cuts = [CUTS[name] for name in names]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [second(first(x).relu() + cut(self, x)) for first, cut, second in zip(self.first, self.cuts, self.second, strict=True)]


def made(*names: str) -> QuantizedModel:
    torch.manual_seed(0)
    quantized = quantize(Cutting(*names).eval(), None, (torch.randn(2, 4, 16),))
    quantized.calibrate([torch.randn(3, 4, length) for length in (8, 16, 32)])
    return quantized


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_file_and_model_agree_at_other_sizes(tmp_path: Path) -> None:
    quantized = made(*CUTS)
    report = quantized.export(tmp_path / "model.onnx")
    assert report.inputs == {"x": ["batch", 4, "sequence"]}, report.notes
    assert not any("at least" in note for note in report.notes)
    session = engine_session(str(tmp_path / "model.onnx"), as_written=True)
    for samples, length in ((1, 8), (3, 24), (7, 36)):
        x = torch.randn(samples, 4, length)
        with torch.no_grad():
            expected = quantized.model(x)
        for name, one, found in zip(CUTS, expected, session.run(None, {"x": x.numpy()}), strict=True):
            assert np.median(np.abs(found - one.numpy())) < 1e-5, (name, samples, length)


@pytest.mark.parametrize("learned", [False, True])
def test_the_scale_is_that_of_the_whole(learned: bool) -> None:
    quantized = made("parameter")
    if learned:
        quantized.replan({"training_settings": {"weight_estimator": "learned"}})
        quantized.calibrate([torch.randn(3, 4, 16)])
    seen: list[Tensor] = []
    (quantizer,) = quantized.weights["add"]
    quantizer.register_forward_hook(lambda _, args, result: seen.extend((args[0], result)))
    quantized.model.train()(torch.randn(2, 4, 8))[0].sum().backward()
    whole = quantized.model.pos.detach()
    scale = float(weight_scale(whole, 8, None, mse=True)) if learned else float(whole.abs().max()) / 127
    expected = torch.fake_quantize_per_tensor_affine(whole, scale, 0, -127, 127)[:, :, :8]
    torch.testing.assert_close(seen[1].detach(), expected)
    assert quantized.model.pos.grad[:, :, :8].abs().sum() > 0


class Rows(nn.Module):
    """Positions whose first rows are one piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)
        self.pos = nn.Parameter(torch.randn(40, 8) * torch.linspace(0.2, 5, 40)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu() + self.pos[: x.shape[1]])


@pytest.mark.parametrize("length", [8, 40])
def test_the_scale_in_a_training_is_that_of_the_whole(length: int) -> None:
    torch.manual_seed(0)
    quantized = quantize(Rows(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (torch.randn(2, 16, 8),))
    quantized.calibrate([torch.randn(2, 16, 8)])
    seen: list[Tensor] = []
    quantized.weights["add"][0].register_forward_hook(lambda _, args, result: seen.append(result))
    quantized.model.train()(torch.randn(2, length, 8)).sum().backward()
    whole = quantized.model.pos.detach()
    expected = torch.fake_quantize_per_tensor_affine(whole, float(whole.abs().max()) / 127, 0, -127, 127)[:length]
    torch.testing.assert_close(seen[0].detach(), expected)


def test_the_scale_follows_a_part_that_is_not_read_now() -> None:
    quantized, x = made("parameter"), torch.randn(2, 4, 8)
    compiled = torch.compile(quantized.model, backend="eager")
    with torch.no_grad():
        (before,) = quantized.model(x)
        torch.testing.assert_close(compiled(x)[0], before, rtol=0, atol=0)
        torch.testing.assert_close(quantized.model(x)[0], before, rtol=0, atol=0)
        quantized.model.pos.data[:, :, 39] *= 100  # as an optimizer, or somebody who writes past autograd
        (after,) = quantized.model(x)
        assert not torch.equal(before, after)
        torch.testing.assert_close(compiled(x)[0], after, rtol=0, atol=0)


class Pieces(nn.Module):
    """Two constants of unlike size in one buffer, and one module that adds several."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("packed", torch.stack([torch.randn(8), torch.randn(8) * 1e4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x) + self.packed[0]))


def test_a_piece_by_its_number_is_a_constant_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = Pieces().eval(), torch.randn(16, 8)
    with torch.no_grad():
        expected = model(x)
        quantize(model, None, (x,)).calibrate([x])
        assert (model(x) - expected).square().sum() < 1e-3 * expected.square().sum()


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, constant: Tensor) -> Tensor:
        return self.layer(self.layer(x) + constant)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adding, self.head = Adding(), nn.Linear(8, 3)
        self.small, self.large = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8) * 1e4)


def test_a_module_that_is_given_slices_of_several_parameters() -> None:
    model, x = Twice(), torch.randn(2, 8)
    once = capture(model, lambda: model.head(model.adding(x, model.large[:2])))
    twice = capture(model, lambda: model.head(model.adding(x, model.large[:2]) + model.adding(x, model.small[:2])))
    cuts = [[weight.cut_from for site in found.sites.values() if site.layer == "add" for weight in site.weights] for found in (once, twice)]
    assert cuts == [["large"], [None]]


def test_a_compiled_cut_is_an_eager_one() -> None:
    x = torch.randn(2, 4, 16)
    quantized = quantize(Cutting("parameter").eval(), "w8a8", (x,))
    quantized.calibrate([(x,)])
    eager = quantized.model(x)
    torch.testing.assert_close(torch.compile(quantized.model, backend="aot_eager", fullgraph=True)(x), eager, atol=1e-5, rtol=1e-5)
