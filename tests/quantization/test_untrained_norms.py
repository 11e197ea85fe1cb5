"""Networks that are trained with quantization from their first step: norms that have seen no batch, and ranges that were wrong."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_cco import CCOWarning, QuantizedModel, quantize
from lightning_cco.quantization.untrained_norms import by_batch_statistics, untrained_norms

digits = load_digits()
IMAGES, LABELS = torch.tensor(digits.images, dtype=torch.float32)[:512, None] / 16, torch.tensor(digits.target)[:512]


def network(norm: type[nn.Module] = nn.BatchNorm2d, depth: int = 8) -> nn.Sequential:
    """Convolutions without biases shrink what they read: without norms the last one gives values a thousand times smaller than the first."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for number in range(depth):
        blocks += [nn.Conv2d(1 if number == 0 else 16, 16, 3, padding=1, bias=False), norm(16, track_running_stats=True), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def trained(model: nn.Module, steps: int = 40) -> float:
    """The mean loss of the last ten steps."""
    torch.manual_seed(0)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    model.train()
    for step in range(steps):
        chosen = slice(64 * (step % 8), 64 * (step % 8) + 64)
        loss = F.cross_entropy(model(IMAGES[chosen]), LABELS[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


def largest_values(model: nn.Module, images: Tensor) -> list[float]:
    """What comes out of each ReLU of the float model in training."""
    twin, found = copy.deepcopy(model).train(), []
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, args, output: found.append(float(output.detach().max())))
    twin(images)
    return found


def calibrated(model: nn.Module, **settings: object) -> QuantizedModel:
    quantized = quantize(model, {"training_settings": settings}, (IMAGES[:64],))
    quantized.calibrate([(IMAGES[:64],)])
    return quantized


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_an_untrained_network_is_calibrated_as_it_is_trained(norm: type[nn.Module]) -> None:
    model = network(norm).train()
    expected = largest_values(model, IMAGES[:64])
    state = copy.deepcopy(model.state_dict())
    quantized = calibrated(model)
    relus = [quantizer for key, quantizer in quantized.activations.items() if key.startswith("relu")]
    assert len(relus) >= len(expected) - 1  # the last one is not rounded for an engine that computes the norm before it in float
    for quantizer, largest in zip(relus, expected, strict=False):
        assert float(quantizer.max_val) == pytest.approx(largest, rel=0.02)  # the moving average of one batch
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(module.training and module.track_running_stats for module in model.modules() if isinstance(module, norm))


def test_a_network_is_trained_from_its_first_step() -> None:
    whole = trained(network())
    model = network().train()
    calibrated(model)
    assert trained(model) < 1.2 * whole + 0.05
    assert whole < 1.5  # of 2.3 before


def test_norms_in_evaluation_or_with_statistics_keep_these() -> None:
    model = network(depth=2).train()
    assert list(untrained_norms(model)) == ["1", "4"]
    model[1].eval()
    for _ in range(29):  # 0.9 ** 28 of what it begins with is 5.2 %
        assert list(untrained_norms(model)) == ["4"]
        model[4](torch.randn(4, 16, 3, 3))
    assert not untrained_norms(model)
    assert not untrained_norms(network().eval())
    loaded = network(depth=1).train()  # of a checkpoint that counts no batches
    loaded[1].running_var.mul_(2.0)
    assert not untrained_norms(loaded)
    x = torch.randn(4, 16, 3, 3)
    model = network(depth=1).eval()
    with by_batch_statistics([model[1]]):
        assert torch.allclose(model[1](x), F.batch_norm(x, None, None, training=True))
    assert torch.equal(model[1](x), copy.deepcopy(model[1])(x))


def test_frozen_ranges_of_an_untrained_network_are_said() -> None:
    for estimator, warns in (("auto", True), ("moving_average", False), ("learned", False)):
        model = network(depth=2).train()
        quantized = quantize(
            model,
            {"global_quantization_settings": {"activations_num_bits": 2}, "training_settings": {"range_estimator": estimator}},
            (IMAGES[:8],),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quantized.calibrate([(IMAGES[:64],)])
        said = [str(entry.message) for entry in caught if "not trained yet" in str(entry.message)]
        assert bool(said) is warns
        assert all("start_at_step" in message and "'1'" in message for message in said)


def test_a_network_that_was_trained_for_a_few_steps_goes_on() -> None:
    """Its running statistics are half those that they began with: ranges by them would clip what training computes, and its gradients exploded."""
    model = network(depth=24).train()
    trained(model, steps=6)
    quantized = calibrated(model)
    F.cross_entropy(model.train()(IMAGES[64:128]), LABELS[64:128]).backward()
    gradients = {name: float(p.grad.abs().max()) for name, p in model.named_parameters()}
    quantized.remove()
    model.zero_grad()
    F.cross_entropy(model(IMAGES[64:128]), LABELS[64:128]).backward()
    for name, parameter in model.named_parameters():
        assert gradients[name] < 10 * float(parameter.grad.abs().max()) + 0.1, name


def test_a_network_that_is_calibrated_in_evaluation_mode_and_then_trained_is_said() -> None:
    """Its ranges are too small for the training, by what the float network computes there; the advice makes them large enough."""
    wanted, largest = max(largest_values(network(depth=2), IMAGES[:64])), []
    for mode in (False, True):
        model = network(depth=2).train(mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quantized = calibrated(model)
        largest.append(max(float(quantizer.max_val) for key, quantizer in quantized.activations.items() if key.layer.startswith("relu")))
        said = [str(item.message) for item in caught if issubclass(item.category, CCOWarning)]
        assert ["in evaluation mode" in message and "'1', '4'" in message and "model.train()" in message for message in said] == [True] * (
            not mode
        )
    assert largest[0] < 0.5 * wanted < 0.9 * wanted < largest[1]


def test_a_trained_network_and_one_with_given_statistics_may_be_calibrated_in_evaluation_mode() -> None:
    for batches in (0, 100):
        model = network(depth=1)
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.num_batches_tracked is not None
        norm.running_mean.fill_(0.1)
        norm.num_batches_tracked.fill_(batches)
        with warnings.catch_warnings():
            warnings.simplefilter("error", CCOWarning)
            calibrated(model.eval())
