"""Lengths of sequences and sizes of images vary in a file where the model takes others, and the file then computes what the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from export_case import MODELS, calibrated
from torch import Tensor, nn

import lightning_cco as cc
from lightning_cco import CCOError
from lightning_cco.export.engines import ENGINES
from lightning_cco.export.ort_session import engine_session

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def agrees(quantized: cc.QuantizedModel, path: Path, *tensors: Tensor) -> None:
    session = engine_session(str(path), graph_optimization_level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    (found, *_) = session.run(None, {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), tensors, strict=True)})
    with torch.no_grad():
        expected = quantized.model(*tensors).numpy()
    assert found.shape == expected.shape
    error = float(np.square(found - expected).sum())
    assert 10 * np.log10(float(np.square(expected).sum()) / max(error, 1e-20)) > 25


def test_images_of_any_size(tmp_path: Path) -> None:
    make, example, _ = MODELS["unet"]
    quantized, x = calibrated(make(), example)
    report = quantized.export(tmp_path / "model.onnx", batches=[(x,)])
    assert report.inputs == {"x": ["batch", 3, "height", "width"]}
    for height, width in ((16, 16), (24, 40), (8, 16)):
        agrees(quantized, tmp_path / "model.onnx", torch.rand(3, 3, height, width))


def test_texts_of_any_length_up_to_the_table_of_positions(tmp_path: Path) -> None:
    make, example, _ = MODELS["tokens"]
    quantized, x = calibrated(make(), example)
    report = quantized.export(tmp_path / "model.onnx", batches=[(x,)])
    assert report.inputs == {"tokens": ["batch", "sequence"]}
    assert any(note.endswith("axis 1 of 'tokens' 12 at most") for note in report.notes)
    for length in (2, 5, 12):
        agrees(quantized, tmp_path / "model.onnx", x[:, :length])


class Heard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru, self.head = nn.Conv1d(4, 8, 3, padding=1), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, sound: Tensor) -> Tensor:
        return self.head(self.gru(self.conv(sound).relu().transpose(1, 2))[0].mean(1))


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 8, 9, stride=4), nn.Linear(8, 5)

    def forward(self, wave: Tensor) -> Tensor:
        return self.head(self.conv(wave.unsqueeze(1)).relu().amax(-1))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.first(self.table(ids)).relu() * mask.unsqueeze(-1)
        return self.head(hidden.sum(1) / mask.sum(1, keepdim=True))


def test_the_length_is_the_axis_that_the_model_lets_vary(tmp_path: Path) -> None:
    x = torch.randn(3, 4, 20)
    quantized = cc.quantize(Heard().eval(), None, (x,))
    quantized.calibrate([(x,)])
    assert quantized.export(tmp_path / "model.onnx", batches=[(x,)]).inputs == {"sound": ["batch", 4, "sequence"]}
    agrees(quantized, tmp_path / "model.onnx", torch.randn(2, 4, 33))
    wave = torch.randn(3, 200)
    quantized = cc.quantize(Waves().eval(), None, (wave,))
    quantized.calibrate([(wave,)])
    assert quantized.export(tmp_path / "model.onnx", batches=[(wave,)]).inputs == {"wave": ["batch", "sequence"]}
    agrees(quantized, tmp_path / "model.onnx", torch.randn(2, 333))


def test_inputs_that_go_together_share_a_length(tmp_path: Path) -> None:
    ids, mask = torch.randint(30, (3, 10)), torch.ones(3, 10)
    quantized = cc.quantize(Masked().eval(), None, (ids, mask))
    quantized.calibrate([(ids, mask)])
    report = quantized.export(tmp_path / "model.onnx", batches=[(ids, mask)])
    assert report.inputs == {"ids": ["batch", "sequence"], "mask": ["batch", "sequence"]}
    agrees(quantized, tmp_path / "model.onnx", torch.randint(30, (2, 17)), torch.ones(2, 17))


class Described(nn.Module):
    """A picture of one size, or a text of one length, beside what may have others."""

    def __init__(self, one_size: bool) -> None:
        super().__init__()
        self.one_size, self.table = one_size, nn.Embedding(9, 8)
        self.conv, self.flat, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8 * (16 if one_size else 5), 8), nn.Linear(8, 4)

    def forward(self, words: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
        seen, read = torch.relu(self.conv(image)), self.table(words)
        if self.one_size:
            read = torch.relu(read + boxes)
            return self.head(read + self.flat(seen.flatten(1))[:, None]).mean(1)
        return self.head(self.flat(torch.relu(read + boxes).flatten(1)) + seen.mean((2, 3)))


@pytest.mark.parametrize("one_size", [True, False], ids=["pictures of one size", "texts of one length"])
def test_what_has_one_size_does_not_fix_the_sizes_of_the_rest(one_size: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    words, image, boxes = torch.randint(0, 9, (3, 5)), torch.rand(3, 3, 8, 8), torch.rand(3, 5, 8)
    quantized = cc.quantize(Described(one_size).eval(), None, (words, image, boxes))
    quantized.calibrate([(words, image, boxes)])
    report = quantized.export(tmp_path / "model.onnx", batches=[(words, image, boxes)], dynamic_sizes=True)
    expected = {
        "words": ["batch", "sequence" if one_size else 5],
        "image": ["batch", 3, *([8, 8] if one_size else ["height", "width"])],
        "boxes": ["batch", "sequence" if one_size else 5, 8],
    }
    assert report.inputs == expected
    fixed = "height and width [8, 8] of 'image'" if one_size else "sequence [5] of 'words'"
    assert f"fixed, since the model took no other sizes that were tried: {fixed}" in report.notes
    length, size = (4, 8) if one_size else (5, 6)
    agrees(quantized, tmp_path / "model.onnx", words[:, :length], torch.rand(3, 3, size, size), boxes[:, :length])


class Downsampled(nn.Module):
    """Another way from a size on: no file of one trace holds both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.more, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        if x.shape[-1] > 12:
            x = nn.functional.max_pool2d(self.more(x), 2)
        return self.head(x.mean((2, 3)))


def test_a_branch_on_a_size_is_said(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 24, 24)
    quantized = cc.quantize(Downsampled().eval(), None, (x,))
    quantized.calibrate([(x,)])
    report = quantized.export(tmp_path / "model.onnx", batches=[(x,)])
    assert report.inputs["x"][3] in ("width", 24)
    if report.inputs["x"][3] == "width":
        assert any("axis 3 of 'x' 15 at least" in note for note in report.notes)
        agrees(quantized, tmp_path / "model.onnx", torch.randn(2, 3, 24, 30))
    assert quantized.drift == []  # of trials nothing is left


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({}, {"dynamic_sizes": False}, ""),
        ({}, {"dynamic_batch": False}, ""),
        ({"deployment_settings": {"target_framework": "tensorrt"}}, {}, "TensorRT"),
    ],
    ids=["asked", "batch", "tensorrt"],
)
def test_sizes_stay_fixed(settings: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    make, example, _ = MODELS["residual"]
    quantized, x = calibrated(make(), example, settings)
    report = quantized.export(tmp_path / "model.onnx", batches=[(x,)], **options)
    assert report.inputs["x"][2:] == list(x.shape[2:])
    assert any("the sizes of the example are fixed" in note and said in note for note in report.notes) is bool(said)


def test_sizes_vary_in_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    make, example, _ = MODELS["unet"]
    quantized, x = calibrated(make(), example, {"deployment_settings": {"target_framework": "openvino", "vnni": False}})
    report = quantized.export(tmp_path / "model.onnx", batches=[(x,)])
    assert report.inputs["x"] == ["batch", 3, "height", "width"]
    load = ENGINES["openvino"].load
    assert load is not None
    loaded, other = load(tmp_path / "model.onnx"), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = quantized.model(other).numpy()
    assert np.square(loaded.run({"x": other.numpy()})[0] - expected).sum() < 0.001 * np.square(expected).sum()


def test_blocks_of_pixels_are_given_up_where_sizes_are_asked_to_vary(tmp_path: Path) -> None:
    make, example, _ = MODELS["mobilenet"]
    quantized, x = calibrated(make(), example)
    fixed = quantized.export(tmp_path / "fixed.onnx", batches=[(x,)])
    assert fixed.inputs["x"] == ["batch", *x.shape[1:]]
    assert any("dynamic_sizes=True" in note for note in fixed.notes)
    free = quantized.export(tmp_path / "model.onnx", batches=[(x,)], dynamic_sizes=True)
    assert free.inputs["x"] == ["batch", 3, "height", "width"]
    agrees(quantized, tmp_path / "model.onnx", torch.rand(2, 3, 48, 40))


def test_sizes_that_the_model_ties_are_named(tmp_path: Path) -> None:
    make, example, _ = MODELS["vit"]
    quantized, x = calibrated(make(), example)
    report = quantized.export(tmp_path / "model.onnx", batches=[(x,)])
    assert report.inputs["x"][0] == "batch"
    assert any(
        note.startswith("fixed, since the model took no other sizes") and note.endswith(f": height and width {list(x.shape[2:])} of 'x'")
        for note in report.notes
    )
    with pytest.raises(CCOError, match="took no other sizes"):
        quantized.export(tmp_path / "model.onnx", dynamic_sizes=True)


class Same(nn.Module):
    """Pads as TensorFlow does, by what is missing at the size that comes."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if number == 0 else 8, 8, 3, 2) for number in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            missing = max((-(-x.shape[-1] // 2) - 1) * 2 + 3 - x.shape[-1], 0)
            x = F.relu(conv(F.pad(x, (missing // 2, missing - missing // 2) * 2)))
        return self.head(x.mean((2, 3)))


def test_sizes_that_become_long_formulas_stay_fixed_and_it_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Same().eval(), torch.randn(1, 3, 64, 64)
    quantized = cc.quantize(model, None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "same.onnx")
    assert report.inputs["x"] == ["batch", 3, 64, 64]
    assert any("formulas of more than 100 operations" in note for note in report.notes)
    assert report.varying_sqnr_db != report.varying_sqnr_db  # nothing differs within one sample
    assert "between samples" not in str(report)


class Cached(nn.Module):
    """Keys of the steps before are put before those of this one."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat([keys, torch.relu(self.key(x))], 1)
        return self.out(keys), keys


@pytest.mark.parametrize("length", [0, 3])
def test_a_file_that_takes_an_empty_cache_alone_is_a_warning(length: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    x, keys = torch.randn(2, 3, 4), torch.randn(2, length, 4)
    quantized = cc.quantize(Cached().eval(), None, (x, keys))
    quantized.calibrate([(x, keys)])
    recwarn.clear()
    quantized.export(tmp_path / "model.onnx")
    said = [str(warning.message) for warning in recwarn if issubclass(warning.category, cc.CCOWarning)]
    assert [message for message in said if "nothing but empty tensors for 'keys' (keys [batch, 0, 4])" in message] == said
    assert bool(said) == (length == 0)
