"""The operations that compilers put into their graphs, by torch's own checks of operations and against torch's reductions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_cco.quantization import native, operations
from lightning_cco.quantization.qparams import weight_scale
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no C compiler")
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second": lambda x: torch.stack([x, 1e9 * x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widened(layout: Any, dtype: torch.dtype) -> None:
    x, start = layout(torch.randn(3, 4, 5, 700, dtype=dtype)), torch.tensor([-0.5, 0.5])
    for below, above in ((-float("inf"), float("inf")), (0.0, 1.0)):
        low, high = torch.aminmax(x.float().clamp(below, above))
        expected = torch.stack([torch.minimum(start[0], low), torch.maximum(start[1], high)])
        assert torch.equal(operations.widened(start, x, (below, above)), expected)
        torch.library.opcheck(torch.ops.lightning_cco.widened, (start, x, below, above), test_utils=CHECKS)
    x = x.clone()
    x[0, 0, 0, 0] = float("nan")
    assert operations.widened(start, x, (0.0, 1.0)).isnan().all()


@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 3, 3), 0), ((5, 700), 0), ((6, 4, 2), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_scale(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    weight.select(axis, 0).zero_()
    found = operations.weight_scale(weight, axis, 127, 1e-12)
    assert torch.equal(found, weight_scale(weight, 8, axis))
    assert torch.equal(found, operations.weight_scale(weight.mT.contiguous().mT, axis, 127, 1e-12))
    torch.library.opcheck(torch.ops.lightning_cco.weight_scale, (weight, axis, 127, 1e-12), test_utils=CHECKS)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_weight_is_an_eager_one(backend: str) -> None:
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    compiled = torch.compile(lambda w: fake_quantize_weight(w, 8, 0), backend=backend, fullgraph=True)
    result = compiled(weight)
    assert torch.equal(result, fake_quantize_weight(weight, 8, 0))
    result.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))  # type: ignore[arg-type]


def test_an_exported_graph_has_none_of_them() -> None:
    class Weight(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fake_quantize_weight(x, 8, 0)

    assert "lightning_cco" not in str(torch.export.export(Weight(), (torch.randn(4, 5),)).graph)
