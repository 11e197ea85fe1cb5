"""Bias correction: means as in float, files that agree, and the user's parameters as they were."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, QuantizedModel, quantize

CORRECTED: dict[str, Any] = {
    "training_settings": {"bias_correction": True},
    "global_quantization_settings": {"skip_tail_quantization": False, "weights_num_bits": 4},
    "layer_settings": [{"match": "*", "weights_num_bits": 4}],
}
PLAIN = {**CORRECTED, "training_settings": {}}


class Depthwise(nn.Module):
    """An inverted residual between a convolution and a linear layer; convolutions with and without a bias, with and without a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.project = nn.Conv2d(16, 8, 1, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2, bias=False)
        self.head = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.depth(F.relu6(self.norm(self.stem(x)))))
        return self.head(self.up(self.project(h)).mean((2, 3)))


def network() -> Depthwise:
    torch.manual_seed(0)
    model = Depthwise()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def images(seed: int = 1, count: int = 4) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.rand(16, 3, 16, 16, generator=generator)] for _ in range(count)]


def calibrated(settings: dict[str, Any], model: nn.Module | None = None) -> QuantizedModel:
    quantized = quantize(model or network(), settings, images()[0])
    quantized.calibrate(images())
    return quantized


def outputs(model: nn.Module, layer: str) -> Tensor:
    """The channels of a module's results over the calibration's batches, as the batch norm or the activation gets them."""
    found: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _, __, result: found.append(result.detach().transpose(0, 1).flatten(1))
    )
    with torch.no_grad():
        for batch in images():
            model(*batch)
    handle.remove()
    return torch.cat(found, 1)


def test_means_are_those_of_the_float_model() -> None:
    float_model, plain, corrected = network(), calibrated(PLAIN), calibrated(CORRECTED)
    for layer in ("stem", "depth", "project"):
        wanted = outputs(float_model, layer).mean(1)
        off = [(outputs(quantized.model, layer).mean(1) - wanted).abs().max() for quantized in (plain, corrected)]
        assert off[1] < 1e-3 < 0.2 * off[0], layer
    x = images(seed=7)[0][0]
    with torch.no_grad():
        noise = [float((quantized.model(x) - float_model(x)).square().mean()) for quantized in (plain, corrected)]
    assert noise[1] < 0.5 * noise[0]


def test_parameters_stay_and_remove_gives_the_float_model_back() -> None:
    model, before = network(), network().state_dict()
    quantized = calibrated(CORRECTED, model)
    assert set(quantized.corrections) == {"conv", "conv_1", "conv_2", "conv_transpose", "linear"}
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    quantized.remove()
    x = images()[0][0]
    with torch.no_grad():
        assert torch.equal(model(x), network()(x))


def test_only_where_it_is_asked_for() -> None:
    quantized = calibrated(PLAIN)
    assert not quantized.corrections
    assert quantized.state_dict()["bias_corrections"] == {}


@pytest.mark.parametrize(("target", "everywhere"), [("ort", {}), ("ort", {"weight_only": True}), ("tensorrt", {"weights_num_bits": 8})])
def test_files_agree(tmp_path: Path, target: str, everywhere: dict[str, Any]) -> None:
    settings = {
        **CORRECTED,
        "global_quantization_settings": {**CORRECTED["global_quantization_settings"], **everywhere},
        "deployment_settings": {"target_framework": target, "vnni": False},
    }
    quantized = calibrated(settings)
    report = quantized.export(tmp_path / "m.onnx")
    assert not report.faults
    assert report.sqnr_db > 35
    assert not report.largest_steps > 1  # NaN where nothing but weights is rounded


def test_programs_agree(tmp_path: Path) -> None:
    quantized = calibrated({**CORRECTED, "deployment_settings": {"target_framework": "executorch"}})
    program = quantized.export(tmp_path / "m.pt2")
    x = images()[0][0]
    with torch.no_grad():
        off = (program.module()(x) - quantized.model(x)).abs().max()
        assert off < 0.1 * quantized.model(x).std()


def test_weights_in_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.rand(32, 64)
    quantized = quantize(model, {**CORRECTED, "global_quantization_settings": {"weights_num_bits": 4, "weights_group_size": 32}}, (x,))
    quantized.calibrate([x])
    assert set(quantized.corrections) >= {"linear", "linear_1"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CCOWarning)  # on rows of one dimension ONNX Runtime multiplies floats
        assert quantized.export(tmp_path / "m.onnx").sqnr_db > 100


def test_a_state_carries_them() -> None:
    first = calibrated(CORRECTED)
    state = first.state_dict()
    second = quantize(network(), CORRECTED, images()[0])
    second.load_state_dict(state)
    x = images(seed=3)[0][0]
    with torch.no_grad():
        assert torch.equal(first.model(x), second.model(x))
    for damage in (torch.full((16,), float("nan")), torch.zeros(3), "x"):
        broken = copy.deepcopy(state)
        broken["bias_corrections"]["conv"] = damage
        with pytest.raises(CCOError, match=r"bias_corrections\.conv"):
            second.load_state_dict(broken)
    lost = {key: value for key, value in state.items() if key != "bias_corrections"}
    with pytest.raises(CCOError, match=r"lacks 'quantized\.bias_corrections'"):
        second.load_state_dict(lost)
    assert second.corrections  # nothing was applied
    second.load_state_dict({**lost, "version": 1})  # which had none where nothing was corrected
    assert not second.corrections
    second.load_state_dict(calibrated(PLAIN).state_dict())
    assert not second.corrections


def test_a_layer_that_goes_to_float_has_none() -> None:
    quantized = calibrated(CORRECTED)
    quantized.replan({**CORRECTED, "layer_settings": [{"match": "conv_1", "skip_quantization": True}]})
    assert "conv_1" not in quantized.corrections
    assert "conv" in quantized.corrections


def test_calibrating_again_measures_again() -> None:
    quantized = calibrated(CORRECTED)
    before = quantized.corrections["conv"].value.clone()
    quantized.calibrate(images())
    assert torch.equal(quantized.corrections["conv"].value, before)
    quantized.calibrate(iter(images(seed=5)))  # a stream, which can be read once
    assert not torch.equal(quantized.corrections["conv"].value, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_with_them(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    quantized = quantize(model, CORRECTED, (images()[0][0].to(dtype),))
    quantized.calibrate([batch[0].to(dtype)] for batch in images())
    model.train()
    before = quantized.corrections["conv_1"].value.clone()
    model(images()[0][0].to(dtype)).square().mean().backward()
    assert model.depth.bias is not None
    assert model.depth.bias.grad is not None
    assert model.depth.bias.grad.abs().sum() > 0
    assert torch.equal(quantized.corrections["conv_1"].value, before)


def test_a_run_keeps_and_resumes_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, cco = Classifier(), quick(training_settings={"bias_correction": True, "stats_steps": 2})
    checkpoint = ModelCheckpoint(tmp_path)
    make_trainer(tmp_path, cco, checkpoint).fit(module, batches(), batches(shuffle=False))
    assert cco.quantized is not None
    corrections = {name: correction.value for name, correction in cco.quantized.corrections.items()}
    assert corrections
    report = cco.export(tmp_path / "m.onnx")
    assert report.sqnr_db > 35
    assert report.largest_steps <= 1
    again = quick(training_settings={"bias_correction": True, "stats_steps": 2})
    make_trainer(tmp_path, again, max_epochs=2).fit(Classifier(), batches(), batches(shuffle=False), ckpt_path=checkpoint.best_model_path)
    assert again.quantized is not None
    assert {name: correction.value.tolist() for name, correction in again.quantized.corrections.items()} == {
        name: value.tolist() for name, value in corrections.items()
    }


def _on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    quantized = quantize(network(), CORRECTED, images()[0])
    quantized.calibrate(images()[rank::2])
    torch.save({name: correction.value for name, correction in quantized.corrections.items()}, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_those_of_all_batches(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_on_rank, (str(tmp_path),), nprocs=2)
    alone = calibrated(CORRECTED)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert list(found) == list(alone.corrections)
        for name, value in found.items():
            torch.testing.assert_close(value, alone.corrections[name].value, rtol=1e-4, atol=1e-6)


def test_a_branch_that_no_batch_took_is_named() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(self.other(h) if len(x) == 1 else h)

    quantized = quantize(Branch().eval(), CORRECTED, (torch.rand(1, 4),))
    with pytest.warns(CCOWarning) as warned:  # of its range, too
        quantized.calibrate([[torch.rand(8, 4)]])
    assert any("bias_correction: the mean of 'linear_1' is not known" in str(one.message) for one in warned)


def test_functions_keywords_and_repeated_modules() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.again, self.conv = nn.Parameter(torch.randn(8, 4)), nn.Linear(8, 8), nn.Conv1d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.linear(input=x, weight=self.weight).relu()
            return self.conv(self.again(self.again(h).relu()).relu().transpose(1, 2))  # (batch, length, channels)

    torch.manual_seed(0)
    model = Odd().eval()
    batch = [torch.rand(16, 12, 4)]
    reference = copy.deepcopy(model)
    quantized = quantize(model, CORRECTED, batch)
    quantized.calibrate([batch])
    assert set(quantized.corrections) == {"linear", "linear_1", "linear_2", "conv"}
    with torch.no_grad():
        shift = (model(*batch) - reference(*batch)).transpose(0, 1).flatten(1).mean(1)
    assert shift.abs().max() < 0.01


def test_compiled_networks() -> None:
    quantized, x = calibrated(CORRECTED), images()[0][0]
    with torch.no_grad():
        eager = quantized.model(x)
        compiled = torch.compile(quantized.model, backend="eager")(x)
    torch.testing.assert_close(compiled, eager)
