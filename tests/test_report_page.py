"""The report's data and the page that is made of it, without a browser."""

from __future__ import annotations

import hashlib
import json
import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from report_pages import HOSTILE, long_graph, quantized_net, state_of
from torch import nn

from lightning_cco import load_settings, quantize
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.report_page.choices import rules_now
from lightning_cco.report_page.data import VERSION, RunState, report_data, to_json
from lightning_cco.report_page.model_explorer import model_explorer_figures, model_explorer_graph
from lightning_cco.report_page.page import SCRIPTS, VENDOR, libraries, page
from lightning_cco.tensor_views import BINS, histogram

DOCS = Path(__file__).resolve().parent.parent / "docs" / "report.md"


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', html, flags=re.DOTALL).group(1))


def test_every_layer_is_told_as_the_plan_has_it() -> None:
    quantized = quantized_net({"layer_settings": [{"match": "conv_1", "weights_num_bits": 4}]})
    plan, data = quantized.plan, report_data(state_of(quantized))
    assert [layer["name"] for layer in data["layers"]] == list(plan.graph.names)
    for layer in data["layers"]:
        name = layer["name"]
        assert layer.get("weights_bits") == plan.decisions[name].weights_num_bits
        assert layer.get("output_bits") == plan.output_bits().get(name)
        assert (layer["runs"] in ("int8", "packed")) == (name in plan.quantized and plan.graph[name].kind != "input")
        assert layer.get("reason", "") == plan.skipped.get(name, "")
    edges = {(plan.graph.names[a], plan.graph.names[b]) for a, b in data["edges"]}
    assert edges == {(edge.source, edge.destination) for edge in plan.graph.edges}
    assert data["counts"]["quantized"] == len(plan.quantized)


def test_figures_are_what_was_measured() -> None:
    quantized = quantized_net()
    state = state_of(quantized)
    data = report_data(state)
    layers = {layer["name"]: layer for layer in data["layers"]}
    weight = quantized.model.stem[0].weight.detach()
    told = layers["conv"]["weights"]
    assert (told["elements"], told["channels"]) == (weight.numel(), weight.shape[0])
    assert told["low"] == pytest.approx(float(weight.min()), rel=1e-4)
    assert told["largest_scale"] == pytest.approx(float(weight.abs().amax((1, 2, 3)).max() / 127), rel=1e-4)
    assert sum(told["histogram"]["counts"]) == weight.numel()
    assert told["histogram"]["high"] <= 127
    quantizer = quantized.activations["relu"]
    assert layers["relu"]["output"]["scale"] == pytest.approx(float(quantizer.scale), rel=1e-4)
    assert layers["relu"]["output"]["levels"] == pytest.approx([0, 255 * float(quantizer.scale)], rel=1e-4)
    assert layers["conv"]["sensitivity"]["qs"] == pytest.approx(state.report.local["conv"].qs, rel=1e-4)
    assert data["loss"]["weights"]["conv"]["4"] == pytest.approx(state.losses.weights["conv"][4], rel=1e-4)
    assert data["metrics"]["names"]["val_acc"] == {
        "direction": "max",
        "now": 0.75,
        "original": 0.8,
        "calibrated": 0.5,
        "lowest": [0.7, 0],
        "highest": [0.75, 1],
    }


def test_numbers_that_are_not_finite_are_texts() -> None:
    state = state_of(quantized_net(), losses=False)
    state.metrics = {"val_loss": math.nan, "worst": math.inf}
    told = json.loads(to_json(report_data(state)))["metrics"]["names"]
    assert (told["val_loss"]["now"], told["worst"]["now"]) == ("nan", "inf")


def test_every_field_is_in_the_documentation() -> None:
    quantized = quantized_net()
    told = DOCS.read_text(encoding="utf-8")
    data = report_data(state_of(quantized))
    assert data["version"] == VERSION
    assert f"`version` | {VERSION}" in told.replace("**", "")
    fields = {*data, *(key for layer in data["layers"] for key in layer), *data["tensors"][0], *data["loss"], *data["counts"]}
    fields |= {key for layer in data["layers"] for part in ("weights", "output", "choices", "sensitivity") for key in layer.get(part, {})}
    assert {field for field in fields if f"`{field}`" not in told} == set()


@pytest.mark.parametrize("name", HOSTILE)
def test_names_end_no_script(name: str) -> None:
    if "." in name:
        name = name.replace(".", "")  # torch refuses dots
    data = report_data(state_of(quantized_net(names=(name,)), losses=False))
    html = page(data)
    assert data_of(html) == json.loads(to_json(data))
    assert any(name in layer.get("path", "") for layer in data_of(html)["layers"])
    assert html.count("<script") == html.count("</script>") == 1 + len(libraries()) + len(SCRIPTS)
    assert "onerror" not in html.partition('id="report">')[0]


def test_nothing_is_loaded_from_anywhere() -> None:
    html = page(report_data(state_of(quantized_net(), losses=False)))
    head = html.partition("<script")[0]
    assert "default-src 'none'" in head
    assert re.findall(r"<(?:link|img|iframe|script)\b[^>]*\b(?:src|href)=", html) == []
    assert "{{" not in html.partition("<script>")[0]


def test_libraries_are_as_they_were_published() -> None:
    for entry in libraries():
        assert hashlib.sha256((VENDOR / entry["file"]).read_bytes()).hexdigest() == entry["sha256"], entry["file"]
        assert (VENDOR / entry["license_file"]).is_file()
        assert entry["license"] == "MIT"
    listed = {name for entry in libraries() for name in (entry["file"], entry["license_file"])}
    assert {path.name for path in VENDOR.iterdir()} == {*listed, "versions.json"}
    assert (files("lightning_cco.report_page") / "assets" / "page.html").is_file()


def test_model_explorer_gets_the_graph_and_figures() -> None:
    data = report_data(state_of(quantized_net(), losses=False))
    collection = model_explorer_graph(data)
    (graph,) = collection["graphs"]
    assert {"label", "graphs"} == set(collection)
    ids = [node["id"] for node in graph["nodes"]]
    assert ids == [layer["name"] for layer in data["layers"]]
    edges = {(edge["sourceNodeId"], node["id"]) for node in graph["nodes"] for edge in node["incomingEdges"]}
    assert edges == {(ids[a], ids[b]) for a, b in data["edges"]}
    conv = next(node for node in graph["nodes"] if node["id"] == "conv_1")
    assert conv["namespace"] == "blocks/0/body/0"
    assert all(isinstance(pair["value"], str) for node in graph["nodes"] for pair in node["attrs"])
    figures = model_explorer_figures(data)
    assert set(figures) == {graph["id"]}
    assert set(figures[graph["id"]]["results"]) <= set(ids)
    assert all(isinstance(one["value"], (int, float)) for one in figures[graph["id"]]["results"].values())


def planned_by(plan: QuantizationPlan, rules: list[dict[str, str]]) -> QuantizationPlan:
    import yaml

    recipe = {"layer_settings": [{part: yaml.safe_load(value) for part, value in rule.items()} for rule in rules]}
    general = {"skip_tail_quantization": plan.settings.global_quantization_settings.skip_tail_quantization}
    return plan_quantization(plan.graph, load_settings({**recipe, "global_quantization_settings": general}))


def test_the_rules_that_are_told_make_the_plan() -> None:
    rules = [{"match": "blocks.0", "skip_quantization": True}, {"match": "blocks.1", "weights_num_bits": 4}]
    quantized = quantized_net({"layer_settings": rules})
    quantized.replan(suggestions=["linear"])
    then = planned_by(quantized.plan, rules_now(quantized.plan))
    assert then.quantized == quantized.plan.quantized
    assert {name: one.weights_num_bits for name, one in then.decisions.items()} == {
        name: one.weights_num_bits for name, one in quantized.plan.decisions.items()
    }


def test_what_can_be_changed_can_be_planned() -> None:
    quantized = quantized_net({"layer_settings": [{"match": "conv_2", "skip_quantization": True, "skip_quantization_downstream": True}]})
    plan, data = quantized.plan, report_data(state_of(quantized, losses=False))
    may = {layer["name"]: layer.get("choices", {}) for layer in data["layers"]}
    assert may["conv"] == {"float": True, "weights": [2, 3, 4, 5, 6, 7, 8]}
    assert "int8" not in may["conv_2"]  # the rule skips what is after it as well
    back = [name for name, choice in may.items() if choice.get("int8")]
    assert "conv_3" in back
    rules = [*rules_now(plan), *({"match": name, "skip_quantization": "false"} for name in back)]
    assert set(back) <= planned_by(plan, rules).quantized


def test_a_shared_weight_is_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(self.first(x)))

    quantized = quantize(Tied(), None, (torch.randn(2, 8),))
    quantized.calibrate([torch.randn(2, 8)])
    layers = {layer["name"]: layer for layer in report_data(RunState(plan=quantized.plan))["layers"]}
    assert "weights" not in layers["linear"]
    stores = [layer["weights"]["store"] for layer in report_data(state_for(quantized))["layers"] if "weights" in layer]
    assert stores == [0, 0, 1]


def state_for(quantized: object) -> RunState:
    from lightning_cco.report_page.facts import model_facts

    return RunState(plan=quantized.plan, facts=model_facts(quantized))


def test_a_histogram_counts_what_is_finite() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, math.nan, math.inf])
    found = histogram(values)
    assert (found.low, found.high, sum(found.counts), len(found.counts)) == (0.0, 2.0, 3, BINS)
    assert sum(histogram(torch.zeros(7)).counts) == 7
    assert histogram(torch.tensor([math.nan])).counts == ()


def test_a_net_of_5000_layers_is_told_whole() -> None:
    graph = long_graph(5000)
    data = report_data(RunState(plan=plan_quantization(graph)))
    assert len(data["layers"]) == len(graph) > 4990
    assert len(page(data)) < 5e6
