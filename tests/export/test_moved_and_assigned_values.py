"""Between layers, what only moves values or assigns to a part of a tensor: the layers after it run in INT8, and compute what the model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import CCOError, quantize
from lightning_cco.export.qdq_pairs import QdqPairs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Move = Callable[[Tensor, Tensor], Tensor]


def first_row(u: Tensor, v: Tensor) -> Tensor:
    u = u.clone()
    u[:, 0] = v[:, 1]
    return u


def both_halves(u: Tensor, v: Tensor) -> Tensor:
    whole = torch.zeros(u.shape)
    whole[:, :2] = u[:, :2]
    whole[:, 2:] = v[:, 2:]
    return whole


def wider(u: Tensor, _: Tensor) -> Tensor:
    whole = u.new_zeros(u.shape[0], 6, 8)
    whole[:, 1:5] = u
    return whole


def by_indices(u: Tensor, v: Tensor) -> Tensor:
    whole = torch.zeros_like(u)
    whole[torch.arange(u.shape[0]), 0] = v[:, 1]
    return whole


def added_to_a_row(u: Tensor, v: Tensor) -> Tensor:
    u = u.clone()
    u[:, 0] += v[:, 0]
    return u


def where_large(u: Tensor, _: Tensor) -> Tensor:
    u = u.clone()
    u[u > 0.5] = 2.0
    return u


def window(u: Tensor, _: Tensor) -> Tensor:
    """As in a Swin transformer: rolled along both axes, and cut into windows."""
    image = u.reshape(-1, 2, 2, 8).repeat(1, 2, 2, 1).roll((-1, -1), (1, 2))
    return image.view(-1, 2, 2, 2, 2, 8).transpose(2, 3).reshape(-1, 4, 8)


MOVES: dict[str, Move] = {
    "rolled along two axes": lambda u, _: u.roll((1, 3), (1, 2)),
    "window": window,
    "parts swapped, one picked": lambda u, _: torch.cat(u.chunk(2, 1)[::-1], 1)[:, 1:3],
    "put together twice": lambda u, _: torch.cat([torch.cat([u[:, :1], u[:, 2:3]], 1), u[:, 1:2]], 1),
    "stacked": lambda u, _: torch.stack([u[:, 1], u[:, 0]], 1),
    "interleaved": lambda u, _: torch.stack([u[..., ::2], u[..., 1::2]], -1).flatten(-2),
    "hstack": lambda u, v: torch.hstack([u, v]),
    "vstack": lambda u, v: torch.vstack([u, v]),
    "dstack": lambda u, v: torch.dstack([u[..., :4], v[..., 4:]]),
    "row_stack": lambda u, v: torch.row_stack([v, u]),
    "column_stack": lambda u, v: torch.column_stack([v, u]),
    "broadcast_tensors": lambda u, _: torch.broadcast_tensors(u, torch.zeros(1, 4, 1))[0],
}
ASSIGNMENTS: dict[str, Move] = {f.__name__: f for f in (first_row, both_halves, wider, by_indices, added_to_a_row, where_large)}


class Branches(nn.Module):
    """Two linear layers; each branch moves or assigns what they give, and another layer reads that."""

    def __init__(self, moves: dict[str, Move]) -> None:
        super().__init__()
        self.one, self.two, self.moves = nn.Linear(8, 8), nn.Linear(8, 8), list(moves.values())
        self.readers = nn.ModuleList(nn.Linear(8, 4) for _ in moves)

    def forward(self, x: Tensor) -> list[Tensor]:
        u, v = F.relu(self.one(x)), self.two(x)
        return [F.relu(reader(move(u, v))) for reader, move in zip(self.readers, self.moves, strict=True)]


@pytest.mark.parametrize("moves", [MOVES, ASSIGNMENTS], ids=["moved", "assigned"])
def test_the_layers_after_it_run_in_int8_and_give_what_the_model_gives(moves: dict[str, Move], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, other = torch.randn(2, 16, 4, 8)
    model = Branches(moves).eval()
    with torch.no_grad():
        in_float = model(other)
    quantized = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x, other])
    with torch.no_grad():
        expected = model(other)
    for found, reference in zip(expected, in_float, strict=True):
        assert found.shape == reference.shape
        assert torch.nn.functional.mse_loss(found, reference) < 1e-2 * reference.square().mean()
    report = quantized.export(tmp_path / "a.onnx")
    products = sum(count for kind, count in report.integer_nodes.items() if kind in ("QGemm", "MatMulIntegerToFloat", "QLinearMatMul"))
    assert products == len(moves) + 2
    assert not [island for island in report.float_islands if any(name.startswith("linear") for name in island.layers)]
    assert report.uncompared == {}
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    for found, reference in zip(session.run(None, {"x": other.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), reference, atol=0.02, rtol=0)


def test_a_rounding_that_is_not_written_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = QdqPairs.with_outputs

    def forgets(pairs: QdqPairs, site: object, args: tuple[object, ...], result: object, limits: object = None) -> object:
        return result if site.layer == "relu_1" else written(pairs, site, args, result, limits)  # type: ignore[attr-defined, arg-type]

    monkeypatch.setattr(QdqPairs, "with_outputs", forgets)
    x = torch.randn(4, 4, 8)
    quantized = quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), None, (x,))
    quantized.calibrate([x])
    with pytest.raises(CCOError, match="layer 'relu_1': expected 'relu_1' to be rounded as planned, but relu was written without it"):
        quantized.export(tmp_path / "a.onnx")


def test_an_operator_that_the_engine_takes_apart_belongs_to_its_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 8)
    quantized = quantize(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Hardswish(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), None, (x,)
    )
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx")
    assert report.float_nodes["HardSigmoid"] == 1  # a part of HardSwish
    assert [island.layers for island in report.float_islands if "hardswish" in island.layers]
    assert not [island for island in report.float_islands if "relu" in island.layers]
