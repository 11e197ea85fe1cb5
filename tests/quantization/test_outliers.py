"""Batches a thousand times as wide as a tensor's range: the first moves nothing, a second in a row does, and who resumes between them knows of the first."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.quantization import range_updates
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.outliers import Outliers, new_outliers
from lightning_cco.quantization.range_updates import update_ranges
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantized_model import QuantizedModel

BATCHES = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))


def test_what_is_beyond_the_range_twice_in_a_row_is_the_range() -> None:
    # The ranges of two layers are wrong, and show it in turns: each batch has one that is new, so that waiting for a batch without would be for ever.
    first, second, right = (ActivationQuantizer(8) for _ in range(3))
    for quantizer in (first, second, right):
        quantizer.min_val.fill_(0.0)
        quantizer.max_val.fill_(1.0)
        quantizer.refresh()
    before: Tensor | None = None
    for largest in ((5000.0, 1.0, 1.5), (5000.0, 7000.0, 1.5), (5000.0, 7000.0, 1.5)):
        for quantizer, value in zip((first, second, right), largest, strict=True):
            quantizer.extrema.copy_(torch.tensor([0.0, value]))
        after = update_ranges([first, second, right], before)
        assert after is not None
        before = after
    assert float(first.max_val) == pytest.approx(5000.0)
    assert float(second.max_val) == pytest.approx(7000.0)
    assert 1.0 < float(right.max_val) < 1.5
    assert not new_outliers(torch.tensor([True]), torch.tensor([True])).any()


def test_one_batch_beyond_the_range_moves_nothing() -> None:
    quantizer = ActivationQuantizer(8)
    quantizer.max_val.fill_(1.0)
    quantizer.refresh()
    quantizer.extrema.copy_(torch.tensor([0.0, 1e6]))
    before = update_ranges([quantizer], None)
    assert float(quantizer.max_val) == 1.0
    quantizer.extrema.copy_(torch.tensor([0.0, 1.1]))
    update_ranges([quantizer], before)
    assert float(quantizer.max_val) == pytest.approx(1.005)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def prepared(estimator: str) -> tuple[QuantizedModel, torch.optim.Optimizer]:
    quantized = quantize(network(), {"training_settings": {"range_estimator": estimator}}, (BATCHES[0],))
    quantized.calibrate([(batch,) for batch in BATCHES])
    return quantized, torch.optim.SGD(quantized.model.parameters(), 1e-4)


def step(quantized: QuantizedModel, optimizer: torch.optim.Optimizer, number: int, wide: str) -> None:
    """One step of training; of a batch ten thousand times as wide where `wide` has a ``1``. The loss stays small: the weights must not explode."""
    optimizer.zero_grad()
    (quantized.model.train()(BATCHES[number] * (1e4 if wide[number] == "1" else 1.0)) * 1e-9).square().mean().backward()
    optimizer.step()


def assert_same(ours: QuantizedModel, theirs: QuantizedModel) -> None:
    ours.update_ranges()
    theirs.update_ranges()
    for key, quantizer in theirs.activations.items():
        for name, buffer in quantizer.named_buffers():
            assert torch.equal(dict(ours.activations[key].named_buffers())[name], buffer), (key, name)


@pytest.mark.filterwarnings("ignore:training. a batch gave values")
@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("estimator", ["moving_average", "min_max"])
@pytest.mark.parametrize("wide", ["0100", "0110", "1011", "0101"])
def test_resumed_after_any_step_is_as_if_never_stopped(wide: str, estimator: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_kernel:
        monkeypatch.setattr(range_updates, "move_by_kernel", lambda *_: None)
    whole, optimizer = prepared(estimator)
    saved, saving_optimizer = prepared(estimator)
    checkpoints = []
    for number in range(4):
        step(whole, optimizer, number, wide)
        step(saved, saving_optimizer, number, wide)
        saved.state_dict()  # saving is no batch: whoever saves twice has the same as who saves once, or never
        checkpoints.append(copy.deepcopy((saved.state_dict(), saved.model.state_dict())))
    assert_same(saved, whole)
    for number, (state, weights) in enumerate(checkpoints):
        resumed, optimizer = prepared(estimator)
        resumed.model.load_state_dict(weights)
        resumed.load_state_dict(state)
        for later in range(number + 1, 4):
            step(resumed, optimizer, later, wide)
        assert_same(resumed, whole)


def test_a_tensor_that_a_batch_does_not_reach_keeps_its_last_one() -> None:
    """An expert that no row was sent to: the next batch that it sees is the next in a row."""
    quantizer = ActivationQuantizer(8)
    quantizer.max_val.fill_(1.0)
    quantizer.refresh()
    before: Tensor | None = None
    for largest in (5000.0, None, 5000.0):
        if largest is not None:
            quantizer.extrema.copy_(torch.tensor([0.0, largest]))
        before = update_ranges([quantizer], before)
    assert float(quantizer.max_val) == 5000.0


def test_what_is_remembered_stays_with_its_tensor_when_others_are_frozen() -> None:
    first, second, third = map(TensorKey, "abc")
    outliers, cpu = Outliers(), torch.device("cpu")
    with pytest.warns(match="range of 'b'"):
        outliers.note([first, second], torch.tensor([False, True]))
    assert outliers.names() == [second]
    assert torch.equal(outliers.last([second, third], cpu), torch.tensor([True, False]))
    other = Outliers()
    other.load(["b", "gone"], [first, second])
    assert other.names() == [second]
    assert torch.equal(other.last([third, second, first], cpu), torch.tensor([False, True, False]))


def test_on_a_device_outliers_of_all_steps_are_said_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_cco.quantization.outliers.reads_at_once", lambda _: False)
    keys, outliers = [TensorKey("conv"), TensorKey("linear")], Outliers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in ([False, True], [False, False], [True, False], [False, False]):
            outliers.note(keys, torch.tensor(found))
    with pytest.warns(match="'conv', 'linear'"):
        outliers.warn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outliers.warn()
