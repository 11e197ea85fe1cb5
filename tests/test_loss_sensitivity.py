"""The loss sensitivity is the rise of the loss that rounding one thing alone brings, as measured by doing so."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from brute_force import Batch, images, loss_of, measured_rises, quantized, texts, trained
from models import GuideCNN, ResidualCNN, TokenModel
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cco import CCOError, CCOWarning, quantize
from lightning_cco.loss_measurement import divergence
from lightning_cco.loss_sensitivity import LossSensitivities, LossSensitivity, LossSensitivityReport

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize(("network", "data"), [(GuideCNN, images), (ResidualCNN, images), (TokenModel, texts)])
def test_ranks_as_brute_force_does(network: type[nn.Module], data: Callable[[], Batch]) -> None:
    everything = data()
    model = trained(network, everything)
    batches = list(zip(everything[0].split(512), everything[1].split(512), strict=True))
    measured = measured_rises(lambda bits: quantized(copy.deepcopy(model), batches, bits), batches, BITS)
    hooked = quantized(model, batches)
    for loss in (loss_of, None):
        report = hooked.loss_sensitivity(batches, lambda net, batch: net(batch[0]), loss)
        expected = {rounding: getattr(report, rounding[0])[rounding[1]][rounding[2]] for rounding in measured}
        rank = spearmanr(list(expected.values()), list(measured.values()))[0]
        assert rank >= 0.9, (loss, rank)
        assert report.loss == ("loss" if loss else "divergence")
        # Not only in order: where it is more than the first order, the rise itself, roughly.
        seen = [expected[rounding] / rise for rounding, rise in measured.items() if 0.01 < rise < 0.5]
        assert seen
        assert 1 / 3 < math.exp(statistics.fmean(map(math.log, seen))) < 3, seen


def test_a_linear_layer_by_hand() -> None:
    """½ · E[(g · (W_q − W) x)²], with each sample's own gradient."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x, target = torch.randn(5, 6), torch.randn(5, 3)
    hooked = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    hooked.calibrate([[x]])
    report = hooked.loss_sensitivity([(x, target)], loss=lambda net, batch: F.mse_loss(net(batch[0]), batch[1]))
    error = hooked.weights["linear"][0](model.weight).detach() - model.weight.detach()
    rises = []
    for sample, wanted in zip(x, target, strict=True):
        own = 2 * (model.weight @ sample + model.bias - wanted).detach() / 3
        rises.append(0.5 * float(own @ error @ sample) ** 2)
    assert report.weights["linear"][8] == pytest.approx(sum(rises) / 5, rel=1e-4)


def test_batches_add_up_to_their_mean_and_the_single_metric_agrees() -> None:
    torch.manual_seed(0)
    everything, single = LossSensitivities([("weights", "a", 4), ("weights", "b", 4)]), LossSensitivity()
    for _ in range(3):
        quantized_output, output, gradient = torch.randn(3, 4, 5)
        everything.start_batch()
        everything.update(("weights", "a", 4), quantized_output - output, gradient, 4)
        single.update(quantized_output, output, gradient)
    report = everything.report("loss")
    assert report.weights == {"a": {4: pytest.approx(float(single.compute()))}}  # "b" never ran
    assert LossSensitivityReport.from_dict(report.to_dict()) == report


def test_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = ResidualCNN()
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    hooked = quantize(model, None, (x,))
    hooked.calibrate([[x]])
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hooks: list[Tensor] = []
    model.fc.weight.register_post_accumulate_grad_hook(hooks.append)
    hooked.loss_sensitivity([(x, y)], loss=loss_of)
    hooked.loss_sensitivity([(x,)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not hooks
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert model.stem.weight.grad is None


class Recurrent(nn.Module):
    """An embedding and an LSTM of which only the last state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(10, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        _, (state, _) = self.lstm(self.embedding(tokens))
        return self.head(state[-1])


class Frozen(nn.Module):
    """A frozen backbone, run without gradients, and its input written to in place."""

    def __init__(self, without_gradients: bool = False) -> None:
        super().__init__()
        self.backbone, self.relu, self.head = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 3)
        self.without_gradients = without_gradients
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.without_gradients):
            x = self.relu(self.backbone(x))
            x += 1
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Recurrent(), torch.randint(0, 10, (4, 5))),
        (Frozen(), torch.randn(4, 1, 6, 6)),
        (TokenModel(), torch.randint(0, 20, (4, 12))),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(4, 6)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)), torch.randn(4, 1, 9, 9)),
    ],
    ids=["recurrent", "frozen", "token", "regression", "segmentation"],
)
def test_every_weight_has_a_rise(model: nn.Module, example: Tensor) -> None:
    hooked = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (example,))
    hooked.calibrate([[example]])
    report = hooked.loss_sensitivity([[example]])
    assert set(report.weights) == set(hooked.weights)
    assert set(report.activations) == {str(key) for key in hooked.activations}
    for by_bits in report.weights.values():
        assert set(by_bits) == set(BITS)
        assert by_bits[2] > by_bits[8] > 0


def test_what_the_step_freezes_is_named() -> None:
    hooked = quantize(
        Frozen(without_gradients=True), {"global_quantization_settings": {"skip_tail_quantization": False}}, (torch.randn(4, 1, 6, 6),)
    )
    hooked.calibrate([[torch.randn(4, 1, 6, 6)]])
    with pytest.warns(CCOWarning, match="no gradient came back to 'conv'"):
        report = hooked.loss_sensitivity([[torch.randn(4, 1, 6, 6)]])
    assert "conv" not in report.weights
    assert "linear" in report.weights


class Within(nn.Module):
    """Its middle runs in a way of its own."""

    def __init__(self, way: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.first, self.middle, self.last, self.head = (
            way,
            nn.Linear(8, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(self.way(lambda x: torch.relu(self.middle(x)), torch.relu(self.first(x))))))


def _measured_within(way: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> tuple[LossSensitivityReport, set[str]]:
    torch.manual_seed(0)
    hooked = quantize(Within(way), None, (torch.randn(8, 8),))
    hooked.calibrate([torch.randn(8, 8)])
    torch.manual_seed(1)
    report = hooked.loss_sensitivity([torch.randn(16, 8)])
    return report, set(hooked.plan.quantized) - set(report.rises(hooked.plan))


@pytest.mark.parametrize("way", [torch.vmap, lambda f: lambda x: x + f(x).detach()], ids=["vmap", "detach"])
def test_what_has_no_value_is_named(way: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    with pytest.warns(CCOWarning, match="no gradient came back to 'linear_1', 'relu_1': what rounding costs"):
        _, unknown = _measured_within(lambda f, x: way(f)(x))
    assert unknown == {"linear_1", "relu_1"}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_measured_as_what_they_hold(reentrant: bool) -> None:
    wanted, unknown = _measured_within(lambda f, x: f(x))
    assert not unknown
    found, _ = _measured_within(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert found.weights == wanted.weights
    assert found.activations == wanted.activations


def test_says_what_no_loss_is() -> None:
    hooked = quantize(nn.Linear(4, 2), {"global_quantization_settings": {"skip_tail_quantization": False}}, (torch.randn(3, 4),))
    with pytest.raises(CCOError, match="never calibrated"):
        hooked.loss_sensitivity([[torch.randn(3, 4)]])
    hooked.calibrate([[torch.randn(3, 4)]])
    with pytest.raises(CCOError, match=r"one number that depends on the layers\), got a tensor of shape \(3, 2\)"):
        hooked.loss_sensitivity([[torch.randn(3, 4)]], loss=lambda net, batch: net(batch[0]))
    with pytest.raises(CCOError, match="returns no float"):
        divergence({"classes": torch.zeros(3, dtype=torch.int64)})
