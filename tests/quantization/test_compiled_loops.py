"""A compiled model in a training loop of one's own: ranges and few-bit layers follow as they do eagerly, whatever of the hooks is compiled with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import quantize

FORMS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model: model,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "module.compile": lambda model: (model.compile(backend="eager"), model)[1],
    "compiled step": lambda model: torch.compile(lambda x: model(x), backend="eager"),
    "compiled part": lambda model: (model[2].compile(backend="eager"), model)[1],
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(form: str) -> dict[str, tuple[float, float]]:
    """The ranges after some steps on larger and larger values, as they are before anybody asks for them."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(64, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    call, optimizer = FORMS[form](model), torch.optim.SGD(model.parameters(), 1e-3)
    for factor in (2, 4, 8):
        optimizer.zero_grad()
        call(factor * x).square().mean().backward()
        optimizer.step()
    call(x)
    return {str(key): (float(quantizer.min_val), float(quantizer.max_val)) for key, quantizer in quantized._activations.items()}


# The compiler looks at the gradients of its inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "form",
    ["module.compile", *(pytest.param(form, marks=pytest.mark.slow) for form in ("torch.compile", "compiled step", "compiled part"))],
)
def test_ranges_follow_the_steps(form: str) -> None:
    eagerly, compiled = trained("eager"), trained(form)
    assert eagerly["input_0"][1] > 4.0  # they began at 3.5
    assert compiled.keys() == eagerly.keys()
    for key, ends in compiled.items():
        assert ends == pytest.approx(eagerly[key], rel=1e-5)


@pytest.mark.slow
def test_two_models_in_one_graph() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)]
    x = torch.randn(16, 8)
    both = [quantize(model, None, (x,)) for model in models]
    for quantized in both:
        quantized.calibrate([x])
    before = [float(quantized._activations["input_0"].max_val) for quantized in both]
    step = torch.compile(lambda x: models[0](x) + models[1](x), backend="eager")
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], 1e-3)
    for factor in (2, 3, 4):
        step(factor * x).square().mean().backward()
        optimizer.step()
    assert all(float(quantized._activations["input_0"].max_val) > 1.05 * value for quantized, value in zip(both, before, strict=True))
