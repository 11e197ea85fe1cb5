"""Whoever needs a tensor as it is reads it unrounded: indices, masks, steps, derivatives; INT8 layers alone read a rounded one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import CCOError, quantize

TO_INDEX: dict[str, Callable[[Tensor], Tensor]] = {
    "long": lambda ids: ids.long(),
    "to": lambda ids: ids.to(torch.int64),
    "type": lambda ids: ids.type(torch.LongTensor),
    "tolist": lambda ids: torch.tensor([int(value) for value in ids.tolist()]),
    "round": lambda ids: (ids + 0.25).round().int(),
    "bucketize": lambda ids: torch.bucketize(ids.contiguous(), torch.arange(1000.0)),
    "scaled": lambda ids: (ids * 0.5).long(),
    "remainder": lambda ids: (ids % 7).long(),
    "floor": lambda ids: torch.div(ids, 3, rounding_mode="floor").long(),
    "argsort": lambda ids: ids.argsort(),
    "compare": lambda ids: (ids > 499.0).long() + (ids == 3.0).long(),
}


class Table(nn.Module):
    """The first column is a category, the others are measurements."""

    def __init__(self, index: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.index, self.seen = index, torch.empty(0)
        self.embedding, self.first, self.second, self.last = nn.Embedding(1000, 16), nn.Linear(5, 16), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.index(x[:, 0])
        return self.last(torch.relu(self.second(torch.cat([self.embedding(self.seen), torch.relu(self.first(x[:, 1:]))], 1))))


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("name", TO_INDEX)
def test_indices_are_those_of_the_float_model(name: str, target: str) -> None:
    torch.manual_seed(0)
    model = Table(TO_INDEX[name]).eval()
    x = torch.cat([torch.randint(0, 1000, (64, 1)).float(), torch.randn(64, 5)], 1)
    given = x.clone()
    with torch.no_grad():
        reference, wanted = model(x), model.seen
        quantized = quantize(model, {"deployment_settings": {"target_framework": target}}, (x,))
        quantized.calibrate([x])
        output = model(x)
    assert torch.equal(model.seen, wanted)
    assert torch.equal(x, given)
    assert float((output - reference).norm() / reference.norm()) < 0.05
    assert {"linear", "relu"} <= quantized.plan.quantized
    assert "slice" not in quantized.plan.quantized
    assert float(quantized.activations["input_0"].max_val) < 10.0  # the range is that of the measurements
    report = quantized.sensitivity([x])
    assert "input_0" in report.main


@pytest.mark.parametrize("name", ["long", "to", "scaled", "round"])
def test_indices_in_the_file_are_those_of_the_float_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Table(TO_INDEX[name]).eval()
    x = torch.cat([torch.randint(0, 1000, (64, 1)).float(), torch.randn(64, 5)], 1)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    assert quantized.export(tmp_path / "table.onnx").sqnr_db > 25.0


class Masked(nn.Module):
    """Features that convolutions read, and of which a mask is made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.first(x))
        self.seen = [features.detach().clone(), features > 0.1, features.flatten(1).argmax(1)]
        return self.last(torch.relu(self.second(features)))


def test_features_with_a_mask_are_rounded_where_convolutions_read_them() -> None:
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(2, 3, 8, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    with torch.no_grad():
        model(x)
    features, mask, largest = model.seen
    assert quantized.plan.at_readers == {"input_0", "relu"}
    assert quantized.plan.reads["conv_1"] == {0: "relu"}
    assert len(features.unique()) > 256  # not rounded to 256 levels
    assert torch.equal(mask, features > 0.1)
    assert torch.equal(largest, features.flatten(1).argmax(1))


def test_tensors_without_such_readers_are_rounded_where_they_are_made() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 2, 4)
    plan = quantize(model, None, (x,)).plan
    assert plan.at_readers == {"input_0"}
    assert plan.reads == {"flatten": {0: "input_0"}}
    assert plan.rounds("relu")


class Potential(nn.Module):
    """Forces as the derivative of an energy, inside the forward."""

    def __init__(self, enables: bool) -> None:
        super().__init__()
        self.enables, self.net = enables, nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.enables):
            x = x.requires_grad_(True)
            energy = self.net(x)
            return energy, -torch.autograd.grad(energy.sum(), x, create_graph=self.training)[0]


@pytest.mark.parametrize("enables", [True, False])
def test_forces_are_those_of_the_float_model_up_to_rounding(enables: bool) -> None:
    torch.manual_seed(0)
    model, x = Potential(enables), torch.randn(32, 3)
    reference = [value.detach() for value in model(x.clone())]
    quantized = quantize(model, None, (x.clone(),))
    quantized.calibrate([x.clone()])
    assert all(parameter.grad is None for parameter in model.parameters())
    energy, forces = model(x.clone())
    for got, wanted in zip((energy, forces), reference, strict=True):
        assert 0 < float((got - wanted).detach().norm() / wanted.norm()) < 0.05
    (energy.square().mean() + forces.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in model.net.parameters() if parameter.dim() > 1)
    gradients = [parameter.grad for parameter in model.parameters()]
    scales = {key: float(quantizer.scale) for key, quantizer in quantized.activations.items()}
    assert quantized.sensitivity([x.clone()]).main
    assert [parameter.grad for parameter in model.parameters()] == gradients or all(
        a is b for a, b in zip((p.grad for p in model.parameters()), gradients, strict=True)
    )
    assert {key: float(quantizer.scale) for key, quantizer in quantized.activations.items()} == scales


def test_a_file_that_would_need_gradients_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model, x = Potential(True), torch.randn(8, 3)
    quantized = quantize(model, None, (x.clone(),))
    quantized.calibrate([x.clone()])
    with pytest.raises(
        CCOError, match=r"after layer 'grad'.* takes gradients .* Export the submodule that computes what is differentiated"
    ):
        quantized.export(tmp_path / "forces.onnx")


def test_a_gradient_penalty_that_only_training_has() -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(), nn.Linear(16, 16), nn.LeakyReLU(), nn.Linear(16, 1))

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return self.net(x)
            x = x.detach().requires_grad_(True)
            score = self.net(x)
            return score + (torch.autograd.grad(score.sum(), x, create_graph=True)[0].norm(dim=1, keepdim=True) - 1).square()

    torch.manual_seed(0)
    model, x = Critic(), torch.randn(8, 4)
    quantized = quantize(model, None, (x,))
    assert not quantized.capture.needs_gradients
    quantized.calibrate([x])
    F.mse_loss(model.train()(x), torch.ones(8, 1)).backward()
    assert quantized.drift == []


@pytest.mark.parametrize("name", ["unique", "unique_consecutive", "histc"])
def test_values_that_are_counted_are_those_of_the_float_model(name: str) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            self.levels = h.unique().numel()
            return self.last(torch.relu(self.second(h * getattr(torch, name)(h).numel())))

    torch.manual_seed(0)
    model, x = Counted().eval(), torch.randn(200, 4)
    quantized = quantize(model, {"global_quantization_settings": {"activations_num_bits": 4}}, (x,))
    quantized.calibrate([x])
    model(x)
    assert model.levels > 2**4
    assert "linear_1" in quantized.plan.quantized


class Packs(nn.Module):
    """Layers before and inside of packed sequences, whose lengths depend on no float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.second, self.last = nn.Linear(6, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(F.relu(self.first(x)), lengths, batch_first=True, enforce_sorted=False)
        states = self.rnn(packed)[0]
        inside = nn.utils.rnn.PackedSequence(F.relu(self.second(states.data)), *states[1:])
        return self.last(nn.utils.rnn.pad_packed_sequence(inside, batch_first=True)[0])


def test_packing_a_sequence_makes_no_index_of_its_values() -> None:
    model, batch = Packs().eval(), (torch.randn(3, 5, 6), torch.tensor([3, 5, 2]))
    quantized = quantize(model, None, batch)
    quantized.calibrate([batch])
    assert {"linear", "relu", "linear_1", "relu_1"} <= quantized.plan.quantized
    assert not any("is used as an index" in reason for reason in quantized.plan.skipped.values())
    seen: list[Tensor] = []
    model.rnn.register_forward_pre_hook(lambda _, args: seen.append(args[0].data.detach()))
    with torch.no_grad():
        model(*batch)
    steps = seen[-1] / quantized.activations["relu"].scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
