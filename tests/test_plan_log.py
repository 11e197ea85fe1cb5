"""What the log says before a training: few lines for any model, none of which says what is not so."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import capture_graph, plan_quantization
from lightning_cco.monitoring.plan_log import folded, layers_text, plan_lines, rounded_to, start_lines
from lightning_cco.monitoring.resolved import resolved_yaml
from lightning_cco.quantization.plan import QuantizationPlan


class Block(nn.Module):
    """Attention by hand, a norm and a gelu: layers of every kind of reason."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.odd = nn.ModuleDict({f"own_{number}": nn.Linear(width, width)})  # no two blocks have the same names

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(query @ key.transpose(-1, -2), -1) @ value)
        (own,) = self.odd.values()
        return x + nn.functional.gelu(own(x))


def planned(blocks: int, settings: object = None) -> QuantizationPlan:
    model = nn.Sequential(nn.Linear(4, 8), *(Block(8, number) for number in range(blocks)), nn.Linear(8, 2))
    return plan_quantization(capture_graph(model, torch.randn(2, 5, 4)), settings)


@pytest.mark.parametrize("target", ["ort", "openvino", "tensorrt"])
@pytest.mark.parametrize("blocks", [1, 3, 60])
def test_at_most_forty_lines(blocks: int, target: str) -> None:
    plan = planned(blocks, {"deployment_settings": {"target_framework": target}})
    assert len("\n".join(start_lines(plan.graph, plan)).splitlines()) <= 37
    assert max(map(len, plan_lines(plan))) <= 260


def test_it_begins_with_the_layers_that_run_in_int8() -> None:
    plan = planned(1)
    weighted = [layer for layer in plan.graph if layer.weighted]
    in_int8 = [layer for layer in weighted if layer.name in plan.quantized]
    first = plan_lines(plan)[0]
    assert first.startswith(f"{len(in_int8)} of {len(weighted)} layers with weights run in INT8 in ort")
    # By hand, for 2 samples of 5 tokens: 4 × 8, 8 × 24, two products of 5 × 5 × 8, 8 × 8, 8 × 8, 8 × 2
    multiplied = {"linear": 320, "linear_1": 1920, "matmul": 400, "matmul_1": 400, "linear_2": 640, "linear_3": 640, "linear_4": 160}
    assert {layer.name: layer.multiplications for layer in plan.graph if layer.multiplications} == multiplied
    share = sum(count for name, count in multiplied.items() if name in plan.quantized) / sum(multiplied.values())
    assert f"({100 * share:.0f} % of the multiplications)" in first
    assert start_lines(plan.graph, plan)[0] == first


def test_as_many_layers_are_parsed_as_the_map_has() -> None:
    plan = planned(60)
    rows = layers_text(plan).split("\n\n", 1)[1].strip().splitlines()[2:]
    assert f"Parsed layers: {len(rows)};" in start_lines(plan.graph, plan)[1]


def test_repeated_modules_are_one() -> None:
    plan = planned(12)
    names = [layer.name for layer in plan.graph if layer.path.endswith(".qkv") and layer.kind == "linear"]
    assert folded(plan.graph, names) == "[1-12].qkv × 12"
    assert folded(plan.graph, names[:3]) == ", ".join(names[:3])
    assert folded(plan.graph, [*names[::2], names[1]]) == "[1…11].qkv × 7"
    assert folded(plan.graph, [layer.name for layer in plan.graph if layer.kind == "add"]) == "add in [1-12] × 24"


def test_no_two_groups_have_one_name() -> None:
    plan = planned(12)
    by_kind: dict[str, list[str]] = {}
    for layer in plan.graph:
        by_kind.setdefault(layer.kind, []).append(layer.name)
    several = [names for names in by_kind.values() if len(names) >= 12]
    assert len(several) > 3
    for one, other in itertools.combinations(several, 2):
        shown = folded(plan.graph, [*one, *other]).split(", ")
        assert len(set(shown)) == len(shown)


def test_every_layer_is_in_the_file_as_it_runs() -> None:
    plan = planned(12)
    rows = {re.split(r"\s{2,}", line)[1]: line for line in layers_text(plan).splitlines()[4:]}
    for layer in plan.graph:
        if layer.kind != "output":
            assert rows[layer.name].endswith("INT8") == (layer.name in plan.quantized)
            assert layer.path in rows[layer.name]


def test_a_float_layer_whose_result_is_rounded_is_said_to_be() -> None:
    plan = planned(1)
    (norm,) = (layer.name for layer in plan.graph if layer.kind == "layer_norm")
    assert rounded_to(plan, norm) == 8
    said = "omputed in float, result rounded to 8 bits for INT8 layers"
    assert any(said in line and line.endswith(norm) for line in plan_lines(plan))
    assert any(said in line and f"match: {norm}," in line for line in resolved_yaml(plan).splitlines())
    assert all(rounded_to(plan, name) is None for name in plan.quantized)


def test_weight_only_layers_are_said_apart() -> None:
    plan = plan_quantization(
        capture_graph(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), torch.randn(1, 3, 5, 5))
    )
    lines = plan_lines(plan)
    assert lines[0].startswith("0 of 2 layers with weights run in INT8 in ort (0 % of the multiplications); 1 more have integer weights")
    assert any(line.startswith("Integer weights, computed in float") and line.endswith("conv_transpose") for line in lines)


def test_lines_are_short_where_paths_are_long() -> None:
    names = (
        "self_attention_projection",
        "cross_attention_projection",
        "first_feed_forward",
        "second_feed_forward",
        "gating_layer",
        "output_dense",
    )
    block = lambda: nn.Sequential(OrderedDict((name, nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())) for name in names))  # noqa: E731
    body = nn.Sequential(
        OrderedDict(transformer_decoder_layers=nn.Sequential(*(block() for _ in range(3))), classification_head=nn.Linear(8, 2))
    )
    plan = plan_quantization(capture_graph(nn.Sequential(OrderedDict(pretrained_model=body)), torch.randn(2, 8)))
    lines = plan_lines(plan)
    assert max(map(len, lines)) <= 260
    (bits,) = (line for line in lines if line.startswith("Using 8 bits"))
    shown = sum(int(found) for found in re.findall(r"× (\d+)", bits))
    (more,) = re.findall(r"… and (\d+) more layers", bits)
    assert shown + int(more) == sum(decision.weights_num_bits is not None for decision in plan.decisions.values())
