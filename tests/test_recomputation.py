"""Activation checkpointing runs parts of a forward again inside the backward: every call must find its own quantizers again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_cco import QuantizedModel, quantize
from lightning_cco.errors import CCOError
from lightning_cco.graph.capture import capture
from lightning_cco.settings import Settings

Run = Callable[..., Tensor]


def plainly(function: Run, *args: Tensor) -> Tensor:
    return function(*args)


def reentrant(function: Run, *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=True)


def not_reentrant(function: Run, *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)


def to_the_end(function: Run, *args: Tensor) -> Tensor:
    if "early_stop" not in inspect.signature(checkpoint).parameters:
        pytest.skip("this PyTorch has no such argument")
    return checkpoint(function, *args, use_reentrant=False, early_stop=False)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))) + x


class Model(nn.Module):
    """``run`` is plainly a call, or a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.other, self.head = nn.Linear(4, 4), Body(), nn.Linear(4, 4), nn.Linear(4, 2)
        self.run = plainly

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)))

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class CalledOnce(Model):
    def middle(self, x: Tensor) -> Tensor:
        return self.run(self.body, x)


class EveryCallApart(Model):
    """Three calls of one module on tensors of different size, so that each has ranges of its own."""

    def middle(self, x: Tensor) -> Tensor:
        for factor in (1.0, 30.0, 900.0):
            x = self.run(self.body, torch.tanh(x) * factor)
        return x


class OnlyTheSecond(Model):
    def middle(self, x: Tensor) -> Tensor:
        return self.run(self.body, 100.0 * torch.tanh(self.body(x)))


class TwiceInOne(Model):
    """One checkpoint around two calls and what is between them."""

    def middle(self, x: Tensor) -> Tensor:
        def inside(x: Tensor) -> Tensor:
            return self.body(F.relu(self.other(self.body(x))) * 50.0)

        return self.run(inside, x)


class BesideModules(Model):
    """The checkpointed function calls torch functions of its own, as DenseNets do, after others of the same kinds outside of it."""

    def middle(self, x: Tensor) -> Tensor:
        x = F.relu(x + 3.0)

        def inside(x: Tensor, y: Tensor) -> Tensor:
            both = torch.cat([x + y, y], 1)
            return F.relu(self.other(both[:, 2:6]) + x)

        y = self.run(inside, x, 200.0 * x)
        return F.relu(y + x)


class NoModuleInside(Model):
    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.run(lambda x: torch.sigmoid(F.relu(x) * x + x), x) + x)


class Nested(Model):
    def middle(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return F.relu(self.body(x) * 20.0)

        def outer(x: Tensor) -> Tensor:
            return self.run(inner, self.body(x)) + self.run(self.body, x * 5.0)

        return self.run(outer, x)


class Sequence(Model):
    """`checkpoint_sequential`, on a module that appears twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.body, nn.ReLU(), self.other, self.body)

    def middle(self, x: Tensor) -> Tensor:
        if self.run is plainly:
            for block in self.blocks:
                x = block(x)
            return x
        return checkpoint_sequential(list(self.blocks), 2, x, use_reentrant=self.run is reentrant)


MODELS = [CalledOnce, EveryCallApart, OnlyTheSecond, TwiceInOne, BesideModules, NoModuleInside, Nested, Sequence]
CHECKPOINTS = [reentrant, not_reentrant, to_the_end]


def hooked(model: nn.Module, x: Tensor) -> QuantizedModel:
    quantized = quantize(model, {"global_quantization_settings": {"weights_num_bits": 4, "activations_num_bits": 4}}, (x,))
    quantized.calibrate([(x,)])
    quantized.freeze_ranges()
    return quantized


def gradients(model: Model, x: Tensor, run: Run) -> list[Tensor]:
    model.run = run
    model.zero_grad()
    x = x.clone().requires_grad_()
    # Two graphs at once, the older one first.
    losses = [model(scale * x).square().mean() for scale in (1.0, 0.5)]
    for loss in losses:
        loss.backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# Inside a reentrant checkpoint nothing requires a gradient; torch says so of a checkpoint in it.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("run", CHECKPOINTS)
@pytest.mark.parametrize("model_class", MODELS)
def test_gradients_are_those_without_checkpointing(model_class: type[Model], run: Run) -> None:
    model, x = model_class().train(), torch.randn(6, 4)
    quantized = hooked(model, x)
    expected = gradients(model, x, plainly)
    with quantized.disabled():
        plain = gradients(model, x, plainly)
    found = gradients(model, x, run)
    assert not torch.allclose(expected[0], plain[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert quantized.drift == []
    assert torch._C._len_torch_function_stack() == 0


class ForeignCheckpoint(torch.autograd.Function):
    """As other libraries write it."""

    @staticmethod
    def forward(ctx: Any, function: Run, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(grad)
        return None, x.grad


def test_a_foreign_checkpoint_of_a_module_called_once_is_recomputed_quantized() -> None:
    model, x = CalledOnce().train(), torch.randn(6, 4)
    hooked(model, x)
    expected = gradients(model, x, plainly)
    torch.testing.assert_close(gradients(model, x, ForeignCheckpoint.apply), expected, rtol=1e-5, atol=1e-7)


def test_a_foreign_checkpoint_of_a_module_called_often_is_refused() -> None:
    model, x = EveryCallApart().train(), torch.randn(6, 4)
    hooked(model, x)
    with pytest.raises(CCOError, match=r"module 'body' is run again.*captured 3 times"):
        gradients(model, x, ForeignCheckpoint.apply)
    assert torch._C._len_torch_function_stack() == 0
    torch.testing.assert_close(gradients(model, x, not_reentrant), gradients(model, x, plainly), rtol=1e-5, atol=1e-7)


def test_a_checkpoint_that_the_step_calls() -> None:
    """Outside of any module, on one that the model calls too."""
    model, x = EveryCallApart().train(), torch.randn(6, 4)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        return model.run(model.body, x * 7.0) + model.body(model.stem(x)) + model(x).sum()

    quantized = QuantizedModel(model, capture(model, lambda: step(model, x)), Settings())
    quantized.calibrate([x], step)
    quantized.freeze_ranges()

    def gradients_of_step(run: Run) -> list[Tensor]:
        model.run = run
        model.zero_grad()
        step(model, x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients_of_step(not_reentrant), gradients_of_step(plainly), rtol=1e-5, atol=1e-7)


def graphs_and_gradients(model: Model, x: Tensor, run: Run) -> tuple[int, list[Tensor]]:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    model.compile(backend=backend)
    found = gradients(model, x, run)
    model._compiled_call_impl = None
    torch._dynamo.reset()
    return backend.frame_count, found


# The compiler looks at the gradients of its inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("model_class", "run", "frozen"),
    [
        (CalledOnce, not_reentrant, False),
        (NoModuleInside, not_reentrant, True),
        pytest.param(CalledOnce, reentrant, False, marks=pytest.mark.slow),
        pytest.param(EveryCallApart, not_reentrant, True, marks=pytest.mark.slow),
        pytest.param(TwiceInOne, not_reentrant, False, marks=pytest.mark.slow),
        pytest.param(BesideModules, not_reentrant, False, marks=pytest.mark.slow),
        pytest.param(NoModuleInside, reentrant, False, marks=pytest.mark.slow),
    ],
)
def test_compiled_in_as_many_graphs_as_without_the_hooks(model_class: type[Model], run: Run, frozen: bool) -> None:
    model, x = model_class().train(), torch.randn(6, 4)
    graphs, _ = graphs_and_gradients(model, x, run)
    model.run = plainly
    quantized = hooked(model, x)
    expected = gradients(model, x, plainly)
    if not frozen:
        quantized.unfreeze_ranges()
    found_graphs, found = graphs_and_gradients(model, x, run)
    assert found_graphs == graphs == 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert quantized.drift == []
    passed = [key for key, quantizer in quantized.activations.items() if torch.isfinite(quantizer.extrema[1])]
    assert passed == ([] if frozen else list(quantized.activations))
