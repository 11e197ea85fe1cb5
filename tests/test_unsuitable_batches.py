"""Batches that are not what a forward or a file takes: said, never left out in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import GuideCNN
from torch import Tensor, nn

import lightning_cco as cc
from lightning_cco.drawing.overview import share_in_int8
from lightning_cco.monitoring.plan_log import layers_text, plan_lines


@pytest.fixture
def quantized() -> cc.QuantizedModel:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    found = cc.quantize(model, None, (torch.randn(3, 4),))
    found.calibrate([torch.randn(3, 4)])
    return found


def test_inputs_and_labels_are_one_argument_too_many(quantized: cc.QuantizedModel) -> None:
    with pytest.raises(cc.CCOError, match=r"a batch has 2 items.*forward=lambda model, batch: model\(batch\[0\]\)"):
        quantized.calibrate([(torch.randn(3, 4), torch.zeros(3))])
    with pytest.raises(cc.CCOError, match=r"the keys \['image'\]"):
        quantized.calibrate([{"image": torch.randn(3, 4)}])
    with pytest.raises(cc.CCOError, match=r"expected batches, such as \[x\], got one tensor of shape \[3, 4\]"):
        quantized.calibrate(torch.randn(3, 4))
    assert quantized.calibrate([(torch.randn(3, 4), torch.zeros(3))], lambda model, batch: model(batch[0])) == 1


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_a_file_is_not_checked_on_other_batches_in_silence(quantized: cc.QuantizedModel, tmp_path: Path) -> None:
    right, wide = torch.randn(5, 4), torch.randn(5, 6)
    with pytest.raises(cc.CCOError, match=r"batches: none of the 1 is what the file takes \(input: \[3, 4\]\)"):
        quantized.export(tmp_path / "model.onnx", batches=[(right, torch.zeros(5))])
    assert not (tmp_path / "model.onnx").exists()
    report = quantized.export(tmp_path / "model.onnx", batches=[(right,), (right, torch.zeros(5)), (wide,)])
    assert report.batches == 1
    assert any("1 of 3 batches: of another structure than the example" in note for note in report.notes)
    assert any("1 of 2 batches have sizes that the file does not take" in note and "[5, 6]" in note for note in report.notes)
    assert quantized.export(tmp_path / "model.onnx", batches=[(right,)]).notes == [note for note in report.notes if "batches" not in note]


class Text(nn.Module):
    """Token ids of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.embedding(ids))).mean(1))


@pytest.mark.filterwarnings("ignore")
def test_a_length_that_is_fixed_is_said_where_batches_have_others(tmp_path: Path) -> None:
    ids = [torch.randint(0, 20, (4, length)) for length in (13, 9, 16)]
    quantized = cc.quantize(Text().eval(), None, (ids[0],))
    quantized.calibrate(ids)
    report = quantized.export(tmp_path / "model.onnx", batches=ids, dynamic_sizes=False)
    (note,) = (note for note in report.notes if "have sizes that the file does not take" in note)
    assert note.startswith("2 of 3 batches")
    assert "dynamic_shapes" in note
    for options in ({}, {"dynamic_shapes": {"ids": {0: "batch", 1: "sequence"}}}):
        free = quantized.export(tmp_path / "model.onnx", batches=ids, **options)
        assert free.batches == 3
        assert free.inputs == {"ids": ["batch", "sequence"]}
        assert not any("batches have sizes" in note for note in free.notes)


def test_weights_packed_in_four_bits_do_not_count_as_int8() -> None:
    general = {"weights_num_bits": 4}
    graph = cc.capture_graph(GuideCNN(), GuideCNN.example())
    rule = [{"match": "conv", "weights_num_bits": 4}]  # else it keeps 8 bits
    packed = cc.plan_quantization(
        graph, {"global_quantization_settings": general, "deployment_settings": {"int4": True}, "layer_settings": rule}
    )
    assert plan_lines(packed)[0].startswith(
        "0 of 4 layers with weights run in INT8 in ort (0 % of the multiplications); 3 have weights packed"
    )
    assert packed.share_of_multiplications == share_in_int8(graph, packed, graph.names) == 0
    assert layers_text(packed).count("Weights packed in 4 bits, computed in float") == 3
    stored = cc.plan_quantization(graph, {"global_quantization_settings": general})
    assert plan_lines(stored)[0].startswith("3 of 4 layers with weights run in INT8 in ort (98 %")
