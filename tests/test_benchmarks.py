"""The benchmarks measure what they say: the plain reference computes the same, and tables land in their place."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from export_models import MobileNetV2, ResNet18, TransformerBlock
from torch import nn

from lightning_cco import quantize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from engine_speed import NETWORKS, ratios, table
from measure import interleaved
from plain import Plain
from report import placed

STAGES = ((1, 8, 1, 1), (2, 8, 2, 2))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(lambda: ResNet18(8, 10), (4, 3, 32, 32), id="relu in place, residuals"),
        pytest.param(lambda: MobileNetV2(STAGES, 16, 10), (4, 3, 32, 32), id="relu6, depthwise"),
        pytest.param(lambda: nn.Sequential(TransformerBlock(16, 2, causal=True), nn.Linear(16, 10)), (4, 8, 16), id="attention"),
    ],
)
def test_plain_reference_computes_what_the_library_does(make: object, shape: tuple[int, ...]) -> None:
    """One step of either from the same weights: same loss, same gradients up to float rounding."""
    torch.manual_seed(0)
    start, inputs = make(), torch.randn(shape)  # type: ignore[operator]
    results = []
    for plain in (False, True):
        model = copy.deepcopy(start)
        quantized = quantize(model, None, (inputs,))
        quantized.calibrate([inputs])
        if plain:
            Plain(quantized, moving=True)
        torch.manual_seed(1)
        logits = model.train()(inputs).flatten(0, -2)
        loss = F.cross_entropy(logits, torch.arange(len(logits)) % 10)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        quantized.remove()
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_plain_ranges_follow_the_batches_as_the_librarys_do() -> None:
    torch.manual_seed(0)
    model, inputs = ResNet18(8, 10), torch.randn(4, 3, 32, 32)
    both = [copy.deepcopy(model) for _ in range(2)]
    ends = []
    for plain, network in zip((False, True), both, strict=True):
        quantized = quantize(network, None, (inputs,))
        quantized.calibrate([inputs])
        if plain:
            Plain(quantized, moving=True)
        network.train()(3.0 * inputs).square().mean().backward()
        torch.optim.SGD(network.parameters(), 1e-4).step()
        network.eval()(inputs)
        # Further in, a value between two levels may fall to either side, by float rounding.
        quantizers = list(quantized.activations.values())[:8]
        ends.append([(q.forward.low, q.forward.high) if plain else (float(q.min_val), float(q.max_val)) for q in quantizers])
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=1e-4, atol=1e-5)


def test_interleaved_takes_turns_and_compares_within_a_round() -> None:
    order: list[str] = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=4, warm_up=0)  # type: ignore[misc]
    assert order == list("abcbcacababc")
    assert found["a"].ratio == found["a"].low == found["a"].high == 1.0


def test_a_table_replaces_what_stands_in_its_place() -> None:
    page = placed("# Results\n\n<!-- one -->\nold\n<!-- /one -->\n\nend\n", "one", "new \\1")
    assert page == "# Results\n\n<!-- one -->\nnew \\1\n<!-- /one -->\n\nend\n"
    assert placed(page, "two", "second").endswith("end\n\n<!-- two -->\nsecond\n<!-- /two -->\n")


def test_speeds_of_engines_are_ratios_by_turns_and_stand_beside_the_processor() -> None:
    called: list[str] = []
    row = ratios({kind: lambda kind=kind: called.append(kind) for kind in ("float", "int8")}, turns=4)  # type: ignore[misc]
    assert row["low"] <= row["ratio"] <= row["high"]
    assert [kind for kind, before in zip(called, ["", *called], strict=False) if kind != before] == [
        "int8",
        "float",
        "int8",
        "float",
        "int8",
    ]
    assert called.count("float") == called.count("int8")
    rows = {"ResNet-18": {"ratio": 3.6, "low": 3.5, "high": 3.7, "float_ms": 36.0, "int8_ms": 10.0}, "ViT-tiny": {"refused": "no"}}
    lines = table({"ort": {"version": "1.32", "processor": "A (family 1, model 2), without VNNI", "networks": rows}})
    assert lines[-2] == (
        "| ONNX Runtime 1.32 | 3.60 (3.50–3.70), 36.0 → 10.0 ms | not measured | refused: no | A (family 1, model 2), without VNNI |"
    )
    assert len(NETWORKS) == 3
    assert table({}) == []
    # The same engine on another processor is another row; what ran anew takes the place of what stood.
    other = table({"ort": {"version": "1.33", "processor": "B, with VNNI", "networks": rows}}, "\n".join(lines))
    assert [line.split(" | ")[0] for line in other if line.startswith("| ONNX")] == ["| ONNX Runtime 1.32", "| ONNX Runtime 1.33"]
    again = table({"ort": {"version": "1.34", "processor": "B, with VNNI", "networks": {}}}, "\n".join(other))
    assert [line.split(" | ")[0] for line in again if line.startswith("| ONNX")] == ["| ONNX Runtime 1.32", "| ONNX Runtime 1.34"]
