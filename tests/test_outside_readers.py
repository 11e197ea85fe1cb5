"""Hooks, kept tensors, losses and logs read the values of the float run, though INT8 layers read the same tensors rounded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.errors import CCOWarning

SEEN: list[Tensor] = []
Middle = Callable[[nn.Module, Tensor], None]


class Net(nn.Module):
    """`middle` gets what a ReLU between two convolutions makes, beside the second of them."""

    def __init__(self, middle: Middle | None = None) -> None:
        super().__init__()
        self.middle = middle
        self.first, self.act, self.second, self.norm = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.third, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        if self.middle is not None:
            self.middle(self, y)
        y = torch.relu(self.norm(self.second(y)) + y)
        return self.last(torch.relu(self.third(y)))


def _keep(value: Tensor) -> None:
    SEEN[:] = [value.detach().clone()]


def _attribute(module: Any, y: Tensor) -> None:
    module.kept = y


def _list_in_a_dictionary(module: Any, y: Tensor) -> None:
    module.kept = {"features": [y.flatten(1)]}


def _in_training(module: Any, y: Tensor) -> None:
    if module.training:
        module.kept = y


def _loss(module: Any, y: Tensor) -> None:
    module.loss = (y * 1.0).square().mean()
    _keep(y)


def _loss_in_training(module: Any, y: Tensor) -> None:
    if module.training:
        module.loss = (y * 1.0).square().mean()
        _keep(y)


def _compared(module: Any, y: Tensor) -> None:
    module.dead = (y == 0).float().mean()
    _keep(y)


def _cast(module: Any, y: Tensor) -> None:
    module.counts = torch.bincount((10 * y).long().flatten())
    _keep(y)


def _gradient(module: Any, y: Tensor) -> None:
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_()
        module.slope = torch.autograd.grad(torch.tanh(y).sum(), y, create_graph=module.training)[0]
    _keep(y)


def _kept(model: Any) -> Tensor:
    kept = model.kept
    return kept["features"][0] if isinstance(kept, dict) else kept


READERS: dict[str, tuple[Middle, Callable[[Any], Tensor], bool]] = {
    "attribute": (_attribute, _kept, False),
    "attribute in a training": (_attribute, _kept, True),
    "flattened, in a list": (_list_in_a_dictionary, _kept, False),
    "attribute, in training only": (_in_training, _kept, True),
    "list outside of the model": (lambda _, y: SEEN.append(y), lambda _: SEEN[-1], False),
    "loss": (_loss, lambda _: SEEN[0], False),
    "loss, in training only": (_loss_in_training, lambda _: SEEN[0], True),
    "comparison": (_compared, lambda _: SEEN[0], False),
    "cast": (_cast, lambda _: SEEN[0], False),
    "autograd.grad": (_gradient, lambda _: SEEN[0], False),
    "autograd.grad in a training": (_gradient, lambda _: SEEN[0], True),
}


def _example() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 8, 8)


def _float_values(model: Net, x: Tensor) -> Tensor:
    """What the second convolution reads, unrounded, from weights of 8 bits."""
    rounded = next(iter(model.first.parameters()))
    scale = rounded.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    step = float(x.max() - x.min()) / 255
    grid = (x / step).round() * step  # within half a step of whatever the zero point is
    return torch.relu(torch.conv2d(grid, (rounded / scale).round() * scale, model.first.bias, padding=1))


def _is_float(value: Tensor) -> bool:
    return len(value.detach().unique()) > 256


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_beside_an_int8_layer_reads_floats(reader: str) -> None:
    torch.manual_seed(0)
    SEEN.clear()
    middle, get, training = READERS[reader]
    model, x = Net(middle), _example()
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model.train(training)
    model(x)
    value = get(model)
    assert _is_float(value)
    torch.testing.assert_close(value.detach().reshape(4, 8, 8, 8), _float_values(model, x), atol=0.05, rtol=0)
    assert {"conv", "conv_1", "conv_2"} <= quantized.plan.in_int8
    assert "relu" in quantized.plan.at_readers
    assert quantized.plan.reads["conv_1"] == {0: "relu"}
    assert "relu" not in {key for key in quantized.plan.tensors if quantized.plan.rounds(key)}
    assert quantized.drift == []


def test_without_such_readers_tensors_are_rounded_once() -> None:
    torch.manual_seed(0)
    model, x = Net(), _example()
    plan = quantize(model, None, (x,)).plan
    assert plan.at_readers == {"input_0"}
    assert plan.rounds("relu")


class Switched:
    """A hook that keeps something once it is told to."""

    def __init__(self) -> None:
        self.on = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.on:
            SEEN.append(output)


def _hook_output(model: Net) -> None:
    model.act.register_forward_hook(lambda module, args, output: SEEN.append(output))


def _hook_input(model: Net) -> None:
    model.second.register_forward_hook(lambda module, args, output: SEEN.append(args[0].detach()))


def _pre_hook(model: Net) -> None:
    model.second.register_forward_pre_hook(lambda module, args: SEEN.append(args[0]))


def _switched(model: Net) -> None:
    model.act.register_forward_hook(Switched())


HOOKS: dict[str, Callable[[Net], None]] = {
    "output": _hook_output,
    "input": _hook_input,
    "pre-hook": _pre_hook,
    "switched on later": _switched,
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_read_floats(hook: str) -> None:
    torch.manual_seed(0)
    SEEN.clear()
    model, x = Net(), _example()
    HOOKS[hook](model)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    for known in model.act._forward_hooks.values():
        if isinstance(known, Switched):
            known.on = True
    model(x)
    assert _is_float(SEEN[-1])
    assert quantized.plan.reads["conv_1"] == {0: "relu"}


def test_hooks_on_all_modules_read_floats() -> None:
    torch.manual_seed(0)
    model, x, seen = Net(), _example(), {}

    def keep(module: nn.Module, args: Any, output: Tensor, seen: dict[str, Tensor]) -> None:
        seen[type(module).__name__] = output

    handle = nn.modules.module.register_module_forward_hook(partial(keep, seen=seen))
    try:
        quantized = quantize(model, None, (x,))
        quantized.calibrate([x])
        model(x)
    finally:
        handle.remove()
    assert _is_float(seen["ReLU"])
    assert {"conv", "conv_1", "conv_2"} <= quantized.plan.in_int8


def test_hooks_that_make_weights_change_nothing() -> None:
    torch.manual_seed(0)
    model, x = Net(), _example()
    model.second = nn.utils.spectral_norm(model.second)  # type: ignore[assignment]
    assert "relu" not in quantize(model, None, (x,)).plan.at_readers


def test_a_hook_that_comes_later_is_named() -> None:
    torch.manual_seed(0)
    model, x = Net(), _example()
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model.third.register_forward_pre_hook(lambda module, args: None)
    with pytest.warns(CCOWarning, match="forward hooks were put on 'third' after the layers were captured.*before quantize"):
        [model(x) for _ in range(8)]
    assert len(quantized.drift) == 1


def test_what_serves_a_loss_alone_is_not_planned() -> None:
    torch.manual_seed(0)

    def pooled(module: Any, y: Tensor) -> None:
        module.loss = (y.mean((2, 3)) * 2.0).sum()

    model, x = Net(pooled), _example()
    quantized = quantize(model, None, (x,))
    assert {"mean", "mul", "sum"} <= set(quantized.plan.skipped)
    assert "used for a loss" in quantized.plan.skipped["mean"]
    assert not [key for key in quantized.plan.tensors if key in ("mean", "mul", "sum")]


def test_a_file_of_a_model_that_keeps_a_tensor_runs_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(_attribute).eval(), _example()
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "model.onnx")
    assert not [island for island in report.float_islands if island.unplanned]
    assert report.integer_nodes == {"QLinearConv": 3, "QLinearAdd": 1}


def test_what_becomes_complex_is_said_to() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.window = nn.Buffer(torch.hann_window(16))
            self.first, self.second = nn.Linear(9, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(torch.fft.rfft(x * self.window).abs())))

    skipped = quantize(Spectrum(), None, (torch.randn(4, 16),)).plan.skipped
    assert skipped["mul"] == "what it computes becomes complex numbers (an FFT), which stay in float"
    assert "complex numbers" in skipped["fft_rfft"]
