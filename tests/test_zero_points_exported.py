"""Files of weights with zero points: what ONNX Runtime and OpenVINO make of them, their sizes, and wrong values in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_weight_groups import IDS, Decoder
from test_weight_groups_exported import ALONE, exported, in_float, integers, needs_openvino
from test_weights_with_zero_points import AFFINE

from lightning_cco import CCOError, quantize
from lightning_cco.export import weight_blocks
from lightning_cco.export.weight_blocks import Block

ZEROS = {"global_quantization_settings": ALONE | {"weights_symmetric": False}}


def with_(**settings: Any) -> dict[str, Any]:
    return {"global_quantization_settings": ZEROS["global_quantization_settings"] | settings}


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 64), (4, 32), (8, 32), (4, None), (8, None)])
def test_onnx_runtime_multiplies_every_one(bits: int, group: int | None, tmp_path: Path) -> None:
    model = Decoder()
    _, report = exported(model, IDS, tmp_path / "a.onnx", with_(weights_num_bits=bits, weights_group_size=group))
    assert report.integer_nodes == {"MatMulNBits": 4, "GatherBlockQuantized": 1}
    assert (report.in_groups, report.as_floats, report.zero_points) == (5, [], 5)
    assert "in 5 of 5 layers, in 5 of them with zero points" in str(report)
    assert report.local_difference < 1e-4
    with torch.no_grad():
        assert np.allclose(in_float(tmp_path / "a.onnx", IDS), model(IDS).numpy(), rtol=1e-3, atol=1e-3)


def test_zero_points_take_half_a_byte_a_group(tmp_path: Path) -> None:
    exported(Decoder(), IDS, tmp_path / "a.onnx", ZEROS)
    stored = integers(tmp_path / "a.onnx")
    weights, table, conv = 64 * 256 + 256 * 64 + 64 * 64, 48 * 64, 64 * 64
    assert stored["UINT4"] == (weights + weights // 32) // 2
    assert stored["UINT8"] + stored["INT8"] in range((table + table // 32) // 2 + conv, (table + 2 * table // 32) // 2 + conv + 65)


def test_beside_layers_in_int8_and_with_rounded_inputs(tmp_path: Path) -> None:
    quantized, report = exported(Decoder(), IDS, tmp_path / "a.onnx", {"global_quantization_settings": AFFINE})
    assert quantized.plan.quantized >= {"conv"}
    assert report.integer_nodes == {"MatMulNBits": 4, "GatherBlockQuantized": 1, "QLinearConv": 1}
    assert report.zero_points == 5


@needs_openvino
@pytest.mark.parametrize(("bits", "kind"), [(2, "u4"), (4, "u4"), (8, "u8")])
def test_openvino_multiplies_integers_as_they_are(bits: int, kind: str, tmp_path: Path) -> None:
    recipe = with_(weights_num_bits=bits) | {"deployment_settings": {"target_framework": "openvino"}}
    _, report = exported(Decoder(), IDS, tmp_path / "a.onnx", recipe)
    assert report.target_nodes == {f"FullyConnected with weights in {kind}": 4}
    assert report.target_sqnr_db > 80
    assert (report.in_groups, report.as_floats, report.zero_points) == (4, [], 4)
    assert any("DYNAMIC_QUANTIZATION_GROUP_SIZE" in note for note in report.notes)


def test_a_program_has_them(tmp_path: Path) -> None:
    model = Decoder()
    quantized = quantize(model, ZEROS, (IDS,))
    quantized.calibrate([IDS])
    program: Any = quantized.export(tmp_path / "a.pt2", pt2e=True)
    with torch.no_grad():
        assert torch.allclose(program.module()(IDS), model(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["addmm", "embedding"])
def test_wrong_zero_points_are_found(layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = weight_blocks.blocks_of

    def damaged(*args: Any) -> dict[str, Block]:
        found = original(*args)
        if layer == "embedding":
            found[layer].packed_zeros[3, 0] ^= 1
        else:
            found[layer].matrix[2][1, 1] ^= 1
        return found

    monkeypatch.setattr("lightning_cco.export.stored_tensors.blocks_of", damaged)
    with pytest.raises(CCOError, match="layer '(embedding|matmul_1)'" if layer == "embedding" else f"layer '{layer}'"):
        exported(Decoder(), IDS, tmp_path / "a.onnx", ZEROS)
    assert not (tmp_path / "a.onnx").exists()
