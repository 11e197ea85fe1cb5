"""Networks that compute a table of positions once for each size of image and keep it: equal to the last bit to the same network that computes it each time."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOWarning, quantize
from lightning_cco.quantized_model import QuantizedModel


def computed(height: int, width: int) -> Tensor:
    rows, columns = torch.arange(height) * 0.1, torch.arange(width) * 0.2
    return torch.add(rows[:, None], columns[None]).mul(0.5)[None]


@functools.lru_cache(maxsize=1)
def kept_by_a_function(height: int, width: int) -> Tensor:
    return computed(height, width)


_TABLES: dict[tuple[int, int], Tensor] = {}


class Net(nn.Module):
    """One of its additions is that of a table, and the table is made by additions and products, too."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.last = nn.Linear(8, 4), nn.Linear(4, 2)
        self.kept, self.size = kept, (0, 0)
        self.table: Tensor | None = None
        self.tables: dict[tuple[int, int], Tensor] = {}
        self.by_method = functools.lru_cache(maxsize=2)(self.compute)

    def compute(self, height: int, width: int) -> Tensor:
        return computed(height, width)

    def positions(self, height: int, width: int) -> Tensor:
        if self.kept == "function":
            return kept_by_a_function(height, width)
        if self.kept == "method":
            return self.by_method(height, width)
        if self.kept in ("dictionary", "global"):
            tables = self.tables if self.kept == "dictionary" else _TABLES
            if (height, width) not in tables:
                tables[height, width] = computed(height, width)
            return tables[height, width]
        if self.kept == "attribute":
            if self.size != (height, width):
                self.table, self.size = computed(height, width), (height, width)
            assert self.table is not None
            return self.table
        if self.kept == "in the forward" and self.size == (height, width):
            assert self.table is not None
            return self.table
        self.table, self.size = (
            torch.add(torch.arange(height)[:, None] * 0.1, torch.arange(width)[None] * 0.2).mul(0.5)[None],
            (height, width),
        )
        return self.table

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x + self.positions(x.shape[-2], x.shape[-1])
        y = self.second(y).relu() + y
        return self.last(self.head(y.mul(y).mean((2, 3))).relu())


KEPT = ["function", "method", "dictionary", "global", "attribute", "in the forward"]
IMAGES = {size: torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in (6, 8, 10)}


def trained(
    kept: str, sizes: list[int], run: Callable[[nn.Module], nn.Module] = lambda model: model
) -> tuple[QuantizedModel, list[Tensor]]:
    kept_by_a_function.cache_clear()
    _TABLES.clear()
    model = Net(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        quantized = quantize(model, {}, (IMAGES[8],))
        quantized.calibrate([(IMAGES[8],)])
        optimizer, called, outputs = torch.optim.SGD(model.train().parameters(), 0.01), run(model), []
        for size in sizes:
            optimizer.zero_grad()
            outputs.append(called(IMAGES[size]))
            outputs[-1].square().mean().backward()
            optimizer.step()
        model.eval()
        outputs += [called(IMAGES[size]).detach() for size in sizes]
    assert not quantized.drift
    return quantized, outputs


@pytest.mark.parametrize("sizes", [[8, 8], [8, 6, 8, 10, 8], [6, 8, 8, 6]])
@pytest.mark.parametrize("kept", KEPT)
def test_equal_to_one_that_keeps_nothing(kept: str, sizes: list[int]) -> None:
    ours, outputs = trained(kept, sizes)
    theirs, expected = trained("nothing", sizes)
    assert ours.plan.quantized == theirs.plan.quantized
    assert all(torch.equal(output, other) for output, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("kept", KEPT)
def test_compiled(kept: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, outputs = trained(kept, [8, 8], lambda model: torch.compile(model, backend="aot_eager"))
    _, expected = trained("nothing", [8, 8])
    assert all(torch.allclose(output, other, atol=1e-6) for output, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("kept", ["function", "dictionary", "in the forward"])
def test_what_was_kept_before_the_capture_makes_no_difference(kept: str) -> None:
    model = Net(kept)
    model(IMAGES[8])
    quantized = quantize(model, {}, (IMAGES[8],))
    quantized.calibrate([(IMAGES[8],)])
    reference, _ = trained("nothing", [])
    assert torch.equal(model(IMAGES[8]), reference.model(IMAGES[8]))
    assert not quantized.drift


@pytest.mark.parametrize("kept", ["function", "attribute"])
def test_the_file(kept: str, tmp_path: Path) -> None:
    quantized, _ = trained(kept, [8, 6])
    report = quantized.export(tmp_path / "model.onnx", (IMAGES[8],), batches=[(IMAGES[8],)])
    reference, _ = trained("nothing", [8, 6])
    expected = reference.export(tmp_path / "reference.onnx", (IMAGES[8],), batches=[(IMAGES[8],)])
    assert report.integer_nodes == expected.integer_nodes
    assert report.inputs == expected.inputs


class Branches(nn.Module):
    """It adds what depends on its values, before and after what is added always."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, more: bool = True) -> Tensor:
        y = self.first(x)
        if more:
            y = y + x
        z = self.second(y)
        z = z + y
        return self.last(self.third(z))


def test_a_branch_that_is_left_out_does_not_move_the_ranges_of_what_comes_after_it() -> None:
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(16, 8)
    quantized = quantize(model, {}, (x,))
    quantized.calibrate([(x,)])
    seen: dict[str, Tensor] = {}
    for name in ("add", "add_1"):
        quantized.activations[name].register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].clone()))
    model.eval()(x, more=False)
    assert list(seen) == ["add_1"]
    assert not quantized.drift
