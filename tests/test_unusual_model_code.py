"""Ways of writing a model that are easily quantized in the wrong place, or not at all without a word."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear_inputs import LinearInputs
from matrix_models import CASES
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_cco import QuantizedModel, capture_graph, quantize
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.capture import capture
from lightning_cco.settings import Settings, load_settings


def hooked(model: nn.Module, *example: Tensor) -> QuantizedModel:
    quantized = quantize(model.eval(), None, example)
    quantized.calibrate([example])
    return quantized


def quantizers_called(quantized: QuantizedModel, *args: Tensor) -> set[str]:
    called: set[str] = set()
    handles = [
        quantizer.register_forward_hook(lambda *_, key=key: called.add(key))  # type: ignore[misc]
        for key, quantizer in quantized.activations.items()
    ]
    quantized.model(*args)
    for handle in handles:
        handle.remove()
    return called


class Between(nn.Module):
    """Two linear layers, and something to be written between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def between(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(x))))


class AssignsToItem(Between):
    def between(self, y: Tensor) -> Tensor:
        y[:, 0] = 0.5
        return y


class AddsToSlice(Between):
    def between(self, y: Tensor) -> Tensor:
        y[:, 1:3] += 1.0
        return y


@pytest.mark.parametrize("model_class", [AssignsToItem, AddsToSlice])
def test_an_assignment_is_quantized(model_class: type[Between]) -> None:
    model, x = model_class(), torch.randn(5, 4)
    quantized = hooked(model, x)
    with LinearInputs() as inputs:
        model(x)
    grid = inputs.found[1] / quantized.activations["setitem"].scale
    torch.testing.assert_close(grid, grid.round(), rtol=0, atol=1e-3)
    assert "setitem" in quantized.sensitivity([(x,)]).accumulated
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Exponential(Between):
    def between(self, y: Tensor) -> Tensor:
        y.exp_()
        return torch.exp(-y)


class PowerOfTwo(Between):
    def between(self, y: Tensor) -> Tensor:
        return 2**y


@pytest.mark.parametrize("model_class", [Exponential, PowerOfTwo])
def test_spellings_that_the_table_does_not_know(model_class: type[Between]) -> None:
    """``exp_`` and ``exp`` are one kind: the runtime must find both, and count both."""
    model, x = model_class(), torch.randn(5, 4)
    quantized = hooked(model, x)
    assert quantizers_called(quantized, x) == set(quantized.activations)
    with LinearInputs() as inputs:
        model(x)
    grid = inputs.found[1] / quantized.activations[quantized.graph.predecessors("linear_1")[0]].scale
    torch.testing.assert_close(grid, grid.round(), rtol=0, atol=1e-3)


class OwnLinear(nn.Linear):
    """A subclass that inherits ``forward``: no line of it is the user's."""


def test_a_subclass_that_inherits_forward_may_be_called_from_anywhere() -> None:
    model, x = nn.Sequential(OwnLinear(4, 4), nn.ReLU(), OwnLinear(4, 4), nn.ReLU(), OwnLinear(4, 2)), torch.randn(5, 4)
    quantized = hooked(model, x)

    def another_place() -> set[str]:
        return quantizers_called(quantized, x)

    assert another_place() == set(quantized.activations)
    assert quantized.drift == []


class NormOfOneSample(Between):
    """Its batch norm refuses to train on a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def between(self, y: Tensor) -> Tensor:
        return self.norm(F.relu(y)) + y


def test_an_example_of_one_sample_is_enough() -> None:
    model, batch = NormOfOneSample(), torch.randn(5, 4)
    quantized = quantize(model, None, (batch[:1],))
    quantized.calibrate([(batch,)])
    model.train()
    assert quantizers_called(quantized, batch) == set(quantized.activations)
    assert quantized.drift == []


class SometimesConcatenates(Between):
    twice = False

    def between(self, y: Tensor) -> Tensor:
        return torch.cat([y[:, :2], y[:, 2:]], dim=1) if self.twice else y


class SometimesByKeyword(Between):
    twice = False

    def between(self, y: Tensor) -> Tensor:
        return torch.clamp(input=y, min=-1.0) if self.twice else y


@pytest.mark.parametrize("model_class", [SometimesConcatenates, SometimesByKeyword])
def test_a_new_operation_is_reported_however_its_operands_are_given(model_class: type[Between]) -> None:
    model, x = model_class(), torch.randn(5, 4)
    quantized = hooked(model, x)
    model.twice = True
    with pytest.warns(CCOWarning, match="though never"):
        model(x)
    assert len(quantized.drift) == 1


class NoiseInPlace(Between):
    """Only training writes over what the layer before made, here through a view."""

    def between(self, y: Tensor) -> Tensor:
        if self.training:
            y.view(-1).add_(0.5)
        return y


def test_training_may_write_over_what_evaluation_leaves() -> None:
    model, x = NoiseInPlace(), torch.randn(5, 4)
    hooked(model, x)
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sensitivity_of_a_module_that_the_step_calls_twice() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 4)

    def twice(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        return model(batch), model(2 * batch)

    quantized = QuantizedModel(model, capture(model, lambda: twice(model, x)), Settings())
    quantized.calibrate([x], twice)
    alone, both = (quantized.sensitivity([x], forward).accumulated["relu"].qs for forward in (lambda m, x: m(x), twice))
    again = quantized.sensitivity([x], lambda m, x: m(2 * x)).accumulated["relu"].qs
    assert both == pytest.approx(((alone**2 + again**2) / 2) ** 0.5, rel=1e-4)


def weights_forgotten(quantized: QuantizedModel) -> None:
    for quantizers in quantized.weights.values():
        for quantizer in quantizers:
            quantizer._kept = None


def test_a_computed_weight_is_rounded_anew() -> None:
    """It is a new tensor each time, often at the address of the last one."""
    model, x = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 64)), nn.ReLU(), nn.Linear(64, 2)), torch.randn(5, 4)
    quantized = hooked(model, x)
    with torch.no_grad():
        for _ in range(5):
            model[0].parametrizations.weight.original1.mul_(-1)
            found = model(x)
            weights_forgotten(quantized)
            assert torch.equal(found, model(x))
            model(x)


def test_weights_written_through_data_are_rounded_anew_after_a_training_step() -> None:
    """As averaging callbacks and older optimizers write: the version of the parameter stays."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4)
    quantized = hooked(model, x)
    with torch.no_grad():
        model(x)
    model(x).sum().backward()
    model[0].weight.data.mul_(-1)
    with torch.no_grad():
        found = model(x)
        weights_forgotten(quantized)
        assert torch.equal(found, model(x))


def test_weights_that_stay_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)  # cuts its weight in three
    call = {"query": x, "key": x.clone(), "value": x.clone()}
    quantized = quantize(model.eval(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (), call)
    quantized.calibrate([call])
    with torch.no_grad():
        expected = model(**call)[0]
        monkeypatch.setattr("lightning_cco.quantization.weight_quantizer.fake_quantize_weight", lambda *_: pytest.fail("rounded again"))
        assert torch.equal(model(**call)[0], expected)


class ReadsCasts(nn.Module):
    """Layers whose float input was an integer or a complex number just before."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.label, self.real, self.pairs = nn.Linear(6, 4), nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(8, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, pixels: Tensor, label: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(pixels.float() / 255.0)
        x = self.pixels(pixels.float()) + self.label(F.one_hot(label, 3).to(torch.float32))
        return self.head(x + self.real(spectrum.real) + self.pairs(torch.view_as_real(spectrum).flatten(1)))


def test_floats_made_of_integers_and_complex_numbers_are_quantized() -> None:
    inputs = torch.randint(0, 256, (5, 6), dtype=torch.uint8), torch.randint(0, 3, (5,))
    model = ReadsCasts()
    quantized = hooked(model, *inputs)
    read = {name: quantized.graph.predecessors(name) for name in ("linear", "linear_1", "linear_2")}
    assert read == {"linear": ("cast_1",), "linear_1": ("cast_2",), "linear_2": ("cast_3",)}
    assert {f"cast_{i}" for i in range(1, 5)} <= quantizers_called(quantized, *inputs) == set(quantized.activations)


class MaskedAttention(nn.Module):
    """Scaled dot product attention with an additive mask: from the input, or a buffer."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3) if buffer else None)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = self.mask
        if mask is None:
            mask = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))[:, None]
        return self.head(self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


@pytest.mark.parametrize("buffer", [True, False])
def test_attention_with_a_float_mask_is_quantized(buffer: bool) -> None:
    model, inputs = MaskedAttention(buffer), (torch.randn(2, 3, 4), torch.tensor([[False, False, True], [False] * 3]))
    asked = [{"match": "scaled_dot_product_attention", "skip_quantization": False}]
    quantized = quantize(model, {"deployment_settings": {"target_framework": "tensorrt"}, "layer_settings": asked}, inputs)
    quantized.calibrate([inputs])
    assert "scaled_dot_product_attention" in quantized.plan.quantized
    assert not quantized.weights.get("scaled_dot_product_attention")
    assert quantizers_called(quantized, *inputs) == set(quantized.activations)
    assert torch.isfinite(model(*inputs)).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["multihead_attention", "transformer_encoder", "transformer_encoder_padded"])
def test_inner_products_of_torchs_own_attention_are_quantized_where_they_are_asked_for(name: str, training: bool) -> None:
    case = next(case for case in CASES if case.name == name)
    model, inputs = case.make().eval(), case.batch()
    whole = {"skip_tail_quantization": False}  # one of them hands out the weights of its attention
    attention = [layer.name for layer in capture_graph(model, *inputs) if layer.kind == "scaled_dot_product_attention"]
    asked = [{"match": name, "skip_quantization": False} for name in attention]
    settings = {"deployment_settings": {"target_framework": "tensorrt"}, "global_quantization_settings": whole, "layer_settings": asked}
    quantized = quantize(model, settings, inputs)
    quantized.calibrate([inputs])
    inner = [layer.name for layer in quantized.graph if layer.kind in ("scaled_dot_product_attention", "matmul")]
    assert inner
    assert set(inner) <= set(quantized.plan.quantized)
    model.train(training)
    assert quantizers_called(quantized, *inputs) == set(quantized.activations)
    assert quantized.drift == []


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(1000.0 * x))


def test_a_part_that_the_step_calls_by_itself_has_ranges_of_its_own() -> None:
    model, x = nn.Sequential(Outer()), torch.randn(5, 4)
    inner = model[0].inner

    def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), inner(x)

    settings = load_settings({"global_quantization_settings": {"skip_tail_quantization": False}})
    quantized = QuantizedModel(model, capture(model, lambda: step(model, x)), settings)
    quantized.calibrate([x], step)
    sizes = {name: float(quantized.activations[name].max_val) for name in ("relu", "relu_1")}
    assert max(sizes.values()) > 100 * min(sizes.values())
    with torch.no_grad():
        alone, plain = inner(x), torch.relu(F.linear(x, inner[0].weight, inner[0].bias))
    assert torch.allclose(alone, plain, atol=0.05)  # a thousandth of the other range would leave nothing of it
    assert alone.unique().numel() > 4
    assert quantized.drift == []
