"""What quantizers see, and what they should see, recorded apart from each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_cco import QuantizedModel
from lightning_cco.graph.attention import multi_head_attention
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.ops import operation
from lightning_cco.quantization import activation_quantizer, weight_quantizer


def same_tensors(found: Iterable[Tensor], expected: Iterable[Tensor], exact: bool = True) -> bool:
    found, expected = list(found), list(expected)
    if [t.shape for t in found] != [t.shape for t in expected]:
        return False
    if exact:
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))


def loss_of(output: Any) -> Tensor:
    """The model's own loss, else the mean squares of all floats that it returns."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    return sum(
        t.float().square().mean()
        for _, t in tensors_in(output)
        if t.is_floating_point() and (t.requires_grad or not torch.is_grad_enabled())
    )


def repeatable(model: nn.Module) -> None:
    """Let training compute what evaluation computes: no dropout, batch norms with the batch's statistics in both modes."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False


class Seen:
    """The tensors given to each quantizer since they were last taken."""

    def __init__(self) -> None:
        self.activations: dict[str, list[Tensor]] = {}
        self.weights: dict[tuple[str, int], list[Tensor]] = {}

    def take(self) -> dict[str, list[Tensor]]:
        taken, self.activations = self.activations, {}
        return taken

    def take_weights(self) -> dict[tuple[str, int], list[Tensor]]:
        taken, self.weights = self.weights, {}
        return taken


def round_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make fake-quantization the identity, or the clamp alone that it takes over."""

    def same(x: Tensor, scale: Any, zero_point: Any, num_bits: int, symmetric: bool, clamp: Any, inplace: bool, *_: Any) -> Tensor:
        if clamp is None:
            return x.clone()
        return x.clamp_(*clamp) if inplace else x.clamp(*clamp)

    monkeypatch.setattr(activation_quantizer, "fake_quantize", same)
    monkeypatch.setattr(activation_quantizer, "has_small_gradient", lambda x: False)
    monkeypatch.setattr(weight_quantizer, "fake_quantize_weight", lambda weight, *_: weight.clone())
    monkeypatch.setattr(weight_quantizer, "fake_quantize_small_weight", lambda *_: None)
    monkeypatch.setattr(weight_quantizer, "rounded_weight", lambda weight, *_: weight.clone())  # of what is cut from a table


def identities(quantized: QuantizedModel, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Make fake-quantization the identity, so that no rounding hides whose values a quantizer sees, and write down what comes."""

    round_nothing(monkeypatch)
    seen = Seen()
    for key, quantizer in quantized.activations.items():

        def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], key: str = key) -> None:
            value, clamp = args[0].detach().clone(), kwargs.get("clamp")
            seen.activations.setdefault(key, []).append(value if clamp is None else value.clamp(*clamp))

        def observe(x: Tensor, batch: int | None = None, *, key: str = key, original: Any = quantizer.observe) -> None:
            seen.activations.setdefault(key, []).append(x.detach().clone())
            original(x, batch)

        quantizer.register_forward_pre_hook(keep, with_kwargs=True)
        monkeypatch.setattr(quantizer, "observe", observe)
    for name, quantizers in quantized.weights.items():
        for k, of_weight in enumerate(quantizers):

            def keep_weight(module: nn.Module, args: tuple[Tensor, ...], key: tuple[str, int] = (name, k)) -> None:
                seen.weights.setdefault(key, []).append(args[0].detach().clone())

            of_weight.register_forward_pre_hook(keep_weight)
    return seen


class Recorder(TorchFunctionMode):
    """Runs over the plain model and keeps every result and every operand by the kind of the call, in order: it knows of no frame and no index."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
        self.results: dict[str, list[list[Tensor]]] = {}
        self.operands: dict[str, list[list[Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            with self:  # PyTorch's own hides what it does; test_capture compares the two
                return multi_head_attention(*args, **kwargs)
        kind = operation(name).kind
        operands = [t.detach().clone() for _, t in tensors_in([args, kwargs])]
        result = func(*args, **kwargs)
        changed = args[0] if name == "__setitem__" else result
        tensors = [t.detach().clone() for _, t in tensors_in(changed)]
        if tensors:
            self.operands.setdefault(kind, []).append(operands)
            self.results.setdefault(kind, []).append(tensors)
        return result

    def check(self, quantized: QuantizedModel, observed: dict[str, list[Tensor]], batch: Any, twice: bool) -> None:
        """Assert that the quantizers of each kind saw results of that kind, in the order of the calls."""
        given = [t for _, t in tensors_in(batch)]
        positions: dict[tuple[str, int], int] = {}
        for key, tensors in observed.items():
            tensors = tensors[:1] if twice else tensors
            layer, _, output = key.partition(":")
            kind, number = quantized.graph[layer].kind, int(output or 0)
            if kind == "input":
                expected = [given[int(layer.partition("_")[2])]] * len(tensors)
                assert same_tensors([t.to(expected[0].dtype) for t in tensors], expected), key
                continue
            if not quantized.capture.sites[layer].visible or number in quantized.graph[layer].read_out:
                # No mode sees it made, or somebody reads it who needs it as it is: each INT8 consumer must be given one and the same tensor.
                assert same_tensors(tensors, [tensors[0]] * len(tensors)), key
                continue
            assert len(tensors) == 1, f"{key} was called {len(tensors)} times in one forward"
            calls, start = self.results.get(kind, []), positions.get((kind, number), 0)
            found = [i for i in range(start, len(calls)) if len(calls[i]) > number and same_tensors(tensors, [calls[i][number]], False)]
            assert found, f"{key} saw what no {kind} after call {start} of {len(calls)} made"
            positions[kind, number] = found[0] + 1

    def check_weights(self, quantized: QuantizedModel, seen: dict[tuple[str, int], list[Tensor]]) -> None:
        """Assert that each weight quantizer saw the layer's own parameter, or, where it is computed or sliced, an operand of a call of that kind."""
        for (layer, k), tensors in seen.items():
            names = quantized.capture.sites[layer].weights[k].parameters
            kind = quantized.graph[layer].kind
            own = [self.parameters[name] for name in names if self.parameters[name].shape == tensors[0].shape]
            if len(names) == 1 and own and ".parametrizations." not in f".{names[0]}":
                assert same_tensors([tensors[0]], own[:1], False), layer
                continue
            assert any(same_tensors([tensors[0]], [t], False) for call in self.operands[kind] for t in call), layer
