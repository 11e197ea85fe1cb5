"""What moves a range, when, and what says nothing about it; parameters that are no numbers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, quantize
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.range_updates import update_ranges

ESTIMATORS = ("moving_average", "min_max", "percentile", "mse")
TAIL = {"global_quantization_settings": {"skip_tail_quantization": False}}


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def scales(quantized: object) -> dict[str, float]:
    return {key: float(quantizer.scale) for key, quantizer in quantized._activations.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zeros_and_empty_tensors_say_nothing_in_calibration(estimator: str) -> None:
    values = [torch.linspace(-1.0, 2.0, 50), torch.linspace(-0.5, 3.0, 50)]
    told, disturbed = (ActivationQuantizer(estimator=estimator) for _ in range(2))
    for batch in values:
        told.observe(batch)
    for batch in (torch.zeros(5), values[0], torch.empty(0, 3), torch.zeros(5), values[1], torch.empty(0)):
        disturbed.observe(batch)
    assert told.finish_calibration() == disturbed.finish_calibration() == "ok"
    assert {k: float(v) for k, v in told.get_ranges().items()} == {k: float(v) for k, v in disturbed.get_ranges().items()}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zeros_and_empty_tensors_say_nothing_in_training(estimator: str) -> None:
    quantizer = ActivationQuantizer(estimator=estimator)
    quantizer.observe(torch.tensor([-1.0, 2.0]))
    quantizer.finish_calibration()
    before = quantizer.get_ranges()
    for nothing in (torch.zeros(4), torch.empty(0)):
        quantizer(nothing, track=True)
        update_ranges([quantizer])
    assert quantizer.get_ranges() == before


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_was_all_zeros_passes_unrounded_and_takes_the_first_values(estimator: str) -> None:
    quantizer = ActivationQuantizer(estimator=estimator)
    quantizer.observe(torch.zeros(4))
    quantizer.finish_calibration()
    x = torch.tensor([-3.0, 0.1, 5.0])
    assert torch.equal(quantizer(x), x)
    assert torch.equal(quantizer(x, clamp=(0.0, float("inf"))), x.relu())
    quantizer(x, track=True)
    update_ranges([quantizer])
    assert float(quantizer.max_val) > 4.9
    assert not quantizer.empty
    assert not torch.equal(quantizer(x), x)


def test_values_that_are_nearly_all_zero_keep_a_range() -> None:
    quantizer = ActivationQuantizer(estimator="percentile", percentile=99.0)
    x = torch.zeros(1000)
    x[3] = 2.0
    quantizer.observe(x)
    quantizer.finish_calibration()
    assert float(quantizer(x)[3]) == pytest.approx(2.0)


def test_a_layer_without_rows_at_calibration_is_named_and_not_clipped() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.box, self.end = (
                nn.Linear(8, 16),
                nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)),
                nn.Linear(16, 4),
            )

        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            return self.end(self.box(torch.relu(self.stem(x))[rows]))

    torch.manual_seed(0)
    model, x = Head().eval(), torch.randn(8, 8)
    none, some = torch.empty(0, dtype=torch.long), torch.arange(8)
    reference = model(x, some).detach()
    quantized = quantize(model, None, (x, some))
    with pytest.warns(CCOWarning, match="nothing came out of 'relu_1'"):
        quantized.calibrate([(x, none)])
    assert float((model(x, some).detach() - reference).norm() / reference.norm()) < 0.05


@pytest.mark.parametrize("estimator", ["moving_average", "min_max"])
def test_one_outlier_batch_is_told_and_moves_nothing_a_second_does(estimator: str) -> None:
    model, x = perceptron(), torch.randn(16, 8)
    quantized = quantize(model, {**TAIL, "training_settings": {"range_estimator": estimator}}, (x,))
    quantized.calibrate([x])
    before = scales(quantized)
    model(1e15 * x)
    with pytest.warns(CCOWarning, match="thousand times as large as the range of 'input_0'"):
        quantized.update_ranges()
    assert scales(quantized) == before
    model(1e15 * x)
    quantized.update_ranges()
    assert scales(quantized)["input_0"] > 1e3 * before["input_0"]


@pytest.mark.parametrize("mode", [True, False])
def test_ranges_follow_where_gradients_are_recorded_whatever_the_mode(mode: bool) -> None:
    model, x = perceptron(), torch.randn(16, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    before = scales(quantized)
    for part in (model, model[0]):  # a network of parts in different modes
        part.train(mode)
    with torch.no_grad():
        model(5 * x)
    with torch.inference_mode():
        model(5 * x)
    quantized.update_ranges()
    assert scales(quantized) == before
    model(5 * x)
    with quantized.evaluating():
        model(50 * x)
    quantized.update_ranges()
    assert all(before[key] < after < 1.5 * before[key] for key, after in scales(quantized).items())


def test_a_frozen_part_without_gradients_inside_a_training_forward_follows() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = perceptron(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.backbone(x)
            return self.head(features)

    model, x = Frozen(), torch.randn(16, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    before = scales(quantized)
    model(5 * x)
    quantized.update_ranges()
    assert all(after != before[key] for key, after in scales(quantized).items())


def test_an_evaluation_that_records_gradients_moves_no_range() -> None:
    model, x = perceptron(), torch.randn(16, 8)
    quantized = quantize(model.eval(), None, (x,))
    quantized.calibrate([x])
    before = scales(quantized)
    model(9 * x)  # no torch.no_grad
    assert {key: float(quantizer.scale) for key, quantizer in quantized.activations.items()} == before
    model.train()(x).sum().backward()
    quantized.update_ranges()
    assert all(after < 1.05 * before[key] for key, after in scales(quantized).items())


@pytest.mark.parametrize("ask", ["activations", "state_dict", "freeze"])
def test_ranges_have_moved_on_before_anything_is_read(ask: str) -> None:
    model, x = perceptron(), torch.randn(16, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    before = scales(quantized)
    model(3 * x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    if ask == "activations":
        got = {key: float(quantizer.scale) for key, quantizer in quantized.activations.items()}
    elif ask == "state_dict":
        got = {key: float(ranges["scale"]) for key, ranges in quantized.state_dict()["ranges"].items()}
    else:
        quantized.freeze_ranges()
        got = scales(quantized)
    assert all(got[key] > before[key] for key in before)
    with torch.no_grad():
        model(x)
    assert scales(quantized) == got


@pytest.mark.parametrize(
    ("number", "what", "value"), [(0, "bias", "inf"), (2, "bias", "nan"), (4, "bias", "inf"), (4, "weight", "nan"), (2, "weight", "-inf")]
)
def test_parameters_that_are_no_numbers_are_named_wherever_they_are(number: int, what: str, value: str) -> None:
    model, x = perceptron(), torch.randn(16, 8)
    with torch.no_grad():
        getattr(model[number], what).flatten()[1] = float(value)
    quantized = quantize(model, None, (x,))
    with pytest.raises(CCOError, match=f"the parameter '{number}.{what}' of layer 'linear"):
        quantized.calibrate([x])


def test_embeddings_renormalize_the_parameter_as_in_float() -> None:
    def trained(quantizes: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 8, max_norm=1.0), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        ids, targets = torch.arange(60) % 20, torch.randn(60, 2)
        if quantizes:
            quantize(model, None, (ids,)).calibrate([ids])
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(ids), targets).backward()
            optimizer.step()
        with torch.no_grad():
            model(ids)
        return model[0].weight.detach().norm(dim=1)

    expected, got = trained(False), trained(True)
    assert float(got[:20].max()) <= 1.0 + 1e-5
    torch.testing.assert_close(got[20:], expected[20:])  # rows that were never looked up stay as they are


def test_no_warning_where_nothing_is_wrong() -> None:
    model, x = perceptron(), torch.randn(16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize(model, None, (x,))
        quantized.calibrate([x])
        for factor in (1.0, 30.0, 0.01):
            model(factor * x)
            quantized.update_ranges()


class Sliced(nn.Module):
    """Two layers that read columns of one table."""

    def __init__(self, cut: str, last: bool = False) -> None:
        super().__init__()
        self.last, self.cut, self.small, self.large, self.head = last, cut, nn.Linear(3, 8), nn.Linear(5, 8), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = 5 if self.last else 3
        parts = (x[:, :first], x[:, first:]) if self.cut == "slice" else x.split([first, 8 - first], 1)
        small, large = reversed(parts) if self.last else parts
        return self.head(torch.cat([self.small(small).relu(), self.large(large).relu()], 1))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("cut", ["slice", "split"])
@pytest.mark.parametrize("large", [1000.0, 10.0])
def test_a_slice_that_is_much_narrower_than_the_others_is_named(cut: str, large: float, last: bool) -> None:
    torch.manual_seed(0)
    columns = torch.tensor([1.0] * 3 + [large] * 5)
    model, x = Sliced(cut, last), torch.rand(64, 8) * (columns.flip(0) if last else columns)
    quantized = quantize(model, TAIL, (x,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized.calibrate([x])
    said = [str(warning.message) for warning in caught if "read slices of 'input_0'" in str(warning.message)]
    model(x).sum().backward()
    learns = bool((model.small.weight.grad != 0).any())
    assert len(said) == (large == 1000.0) == (not learns), "it is said where nothing is learned"
    assert all("{match: linear, skip_quantization: true}" in text for text in said)


def test_the_advice_for_a_narrow_slice_lets_its_layer_learn() -> None:
    torch.manual_seed(0)
    model, x = Sliced("slice"), torch.rand(64, 8) * torch.tensor([1.0] * 3 + [1000.0] * 5)
    quantized = quantize(model, {**TAIL, "layer_settings": [{"match": "linear", "skip_quantization": True}]}, (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized.calibrate([x])
    model(x).sum().backward()
    assert (model.small.weight.grad != 0).any()
