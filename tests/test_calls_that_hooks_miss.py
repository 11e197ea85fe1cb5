"""What runs where no function mode can see it is named in a warning, and what runs out of the blue is drift."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cco import quantize
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.capture import capture


@torch.jit.script
def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.t() + bias


class ScriptedFunction(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _affine(x, self.weight, self.bias)


class NumPy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return torch.from_numpy(x.detach().numpy() @ self.weight.detach().numpy().T)


class Opaque(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x @ weight.t()


HIDDEN: dict[str, Callable[[], nn.Module]] = {
    "scripted function": lambda: ScriptedFunction(4, 4),
    "NumPy": lambda: NumPy(4, 4),
    "custom function": lambda: Opaque(4, 4),
    "scripted module": lambda: torch.jit.script(nn.Linear(4, 4)),
    "traced module": lambda: torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4)),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_module_that_runs_unseen_is_named(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), HIDDEN[kind](), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 4)
    with pytest.warns(CCOWarning, match="not in the layer graph, so they stay in float: '2'"):
        quantized = quantize(model, None, (x,))
    assert {"linear", "linear_1"} <= set(quantized.plan.quantized)
    assert quantized.graph["linear_1"].path == "3"


def test_a_model_that_runs_unseen_as_a_whole_is_an_error_that_says_so() -> None:
    with pytest.raises(CCOError, match=r"no layer was captured.*TorchScript"):
        quantize(nn.Sequential(torch.jit.script(nn.Linear(4, 4))), None, (torch.randn(5, 4),))


class Affine(torch.autograd.Function):
    """The linear layer of PyTorch's tutorial on extending autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.mm(weight.t()) + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return grad.mm(weight), grad.t().mm(x), grad.sum(0)


class Block(nn.Module):
    """Has a weight of its own beside a child with another, and one that is never used."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.child, self.product = nn.LayerNorm(4), nn.Linear(4, 4), product
        self.weight, self.bias, self.unused = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.norm(x), self.weight, self.bias) + self.product(x, self.child.weight, self.child.bias)


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scripted function": lambda x, weight, bias: _affine(x, weight, bias),
    "NumPy": lambda x, weight, bias: torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T) + bias,
    "list": lambda x, weight, bias: x.new_tensor(
        [[sum(a * b for a, b in zip(r, w, strict=True)) for w in weight.tolist()] for r in x.tolist()]
    ),
    "custom function": Affine.apply,
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_weights_that_a_part_of_a_model_uses_unseen_are_named(kind: str) -> None:
    model, x = (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Block(PRODUCTS[kind]), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        torch.randn(5, 4),
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.warns(CCOWarning, match=r"(?s)stay in float: .*2\.weight.*2\.child\.weight") as caught:
        quantize(model, None, (x,))
    assert not any("unused" in str(warning.message) for warning in caught)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weights_that_nobody_uses_are_not_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Block(F.linear), nn.ReLU(), nn.Linear(4, 2))
    assert {"linear_1", "linear_2"} <= set(quantize(model, None, (torch.randn(5, 4),)).plan.quantized)


class Threaded(nn.Module):
    """A branch of its forward runs in another thread."""

    def __init__(self, beside: Callable[[Callable[[], Tensor]], Tensor], function: bool = False) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)
        self.beside, self.weight = beside, nn.Parameter(torch.randn(4, 4)) if function else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.beside(lambda: self.branch(x) if self.weight is None else F.linear(x, self.weight)) + x)


def _submitted(call: Callable[[], Tensor]) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _threaded(call: Callable[[], Tensor]) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


THREADS: dict[str, Callable[[Callable[[], Tensor]], Tensor]] = {
    "submit": _submitted,
    "thread": _threaded,
    "asyncio": lambda call: asyncio.run(asyncio.to_thread(call)),
    "in one another": lambda call: _submitted(lambda: _threaded(call)),
    "checkpoint": lambda call: _submitted(lambda: checkpoint(call, use_reentrant=False)),
}


@pytest.mark.parametrize("kind", THREADS)
def test_a_module_that_the_forward_calls_in_another_thread_is_named_and_stays_in_float(kind: str) -> None:
    model, x = Threaded(THREADS[kind]), torch.randn(5, 4)
    with pytest.warns(
        CCOWarning, match=r"stay in float: 'branch' \(Sequential: it was called in another thread than the forward"
    ) as caught:
        quantized = quantize(model, None, (x,))
    assert len(caught) == 1
    assert [layer.path for layer in quantized.graph if layer.weighted] == ["stem", "head"]
    assert sum(layer.kind == "output" for layer in quantized.graph) == 1
    quantized.calibrate([(x,)])
    seen: list[tuple[Tensor, Tensor]] = []
    model.branch.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    model(x).sum().backward()
    given, made = seen[0]
    assert torch.equal(made, F.relu(F.linear(given, model.branch[0].weight, model.branch[0].bias)))
    assert model.branch[0].weight.grad is not None
    assert quantized.drift == []


class PartlyThreaded(Threaded):
    """The same branch, called once in the forward's own thread as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(self.branch(x)))


@pytest.mark.parametrize("kind", THREADS)
def test_a_module_that_is_called_in_both_threads_is_named_and_in_float_in_the_other(kind: str) -> None:
    model, x = PartlyThreaded(THREADS[kind]), torch.randn(5, 4)
    with pytest.warns(CCOWarning, match=r"stay in float: 'branch' \(Sequential: some of its calls are made in another thread") as caught:
        quantized = quantize(model, None, (x,))
    assert len(caught) == 1
    assert [layer.path for layer in quantized.graph if layer.weighted] == ["branch.0", "stem", "head"]
    quantized.calibrate([(x,)])
    seen: list[tuple[Tensor, Tensor]] = []
    model.branch[0].register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    model(x).sum().backward()
    weight, bias = model.branch[0].weight, model.branch[0].bias
    in_float = [torch.equal(made, given @ weight.T + bias) or torch.equal(made, torch.addmm(bias, given, weight.T)) for given, made in seen]
    assert in_float[:2] == [False, True]
    assert in_float[2:] == [True] * (kind == "checkpoint")  # and once more in the backward


def test_a_weight_that_only_another_thread_multiplies_by_is_named() -> None:
    with pytest.warns(CCOWarning, match="stay in float: 'weight' "):
        quantize(Threaded(_submitted, function=True), None, (torch.randn(5, 4),))


def test_modules_that_a_step_calls_in_other_threads_are_captured() -> None:
    """Nothing of the model runs around them, so they are the forward."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 4)
    captured = capture(model, lambda: _submitted(lambda: model(x)))
    assert [layer.path for layer in captured.graph if layer.weighted] == ["0", "2"]


class Sometimes(nn.Module):
    """Does one thing more from some time on."""

    def __init__(self, more: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.more, self.now = nn.Linear(4, 4), nn.Linear(4, 4), more, False

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.second(self.more(y) if self.now else y)


MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "div": lambda y: y / 2.0,
    "stack": lambda y: torch.stack([y, y])[0],
    "mean": lambda y: y - torch.mean(y, 1, keepdim=True),
    "interpolate": lambda y: F.interpolate(y[:, None], size=4)[:, 0],
    "adaptive_avg_pool": lambda y: F.adaptive_avg_pool1d(y, 4),
    "sigmoid": lambda y: torch.sigmoid(y),
}


@pytest.mark.parametrize("kind", MORE)
def test_whatever_the_engine_runs_in_int8_is_drift_when_it_runs_unseen(kind: str) -> None:
    model, x = Sometimes(MORE[kind]), torch.randn(5, 4)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    model(x)
    assert quantized.drift == []
    model.now = True
    with pytest.warns(CCOWarning, match="though never"):
        model(x)
    assert any(f"'{kind}'" in message for message in quantized.drift)


def test_what_gives_no_tensor_is_no_drift_however_often_it_runs() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.times = nn.Linear(4, 4), nn.Linear(4, 4), 1

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.first(x))
            return self.second(y * sum(len(y) for _ in range(self.times)))

    model, x = Counting(), torch.randn(5, 4)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    model.times = 3
    model(x)
    assert quantized.drift == []
