"""The page in a real browser: what is clicked, found, changed and copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from browsers import OpenPage, chromium
from report_pages import HOSTILE, long_graph, quantized_net, state_of, write_page
from test_budget_speed import table_for

from lightning_cco import load_settings
from lightning_cco.budget.search import BudgetSearch
from lightning_cco.budget.units import seconds_of_plan
from lightning_cco.export.island_kinds import FloatIsland, IslandKind
from lightning_cco.export.report import ExportReport
from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.number_format import per_cent
from lightning_cco.quantization.forward_call import call_with
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.report_page.data import RunState


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def state() -> RunState:
    torch.manual_seed(0)
    return state_of(quantized_net())


@pytest.fixture
def opened(browser: Any, state: RunState, tmp_path: Path) -> Iterator[OpenPage]:
    found = OpenPage(browser, write_page(tmp_path, state))
    yield found
    found.page.close()
    assert found.wrong == []


def test_a_click_unfolds_a_module_and_shows_a_layer(opened: OpenPage) -> None:
    opened.page.click("#fold")
    assert "m:blocks" in opened.seen()
    opened.click_node("m:blocks")
    assert {"m:blocks.0", "m:blocks.1"} <= opened.seen()
    assert opened.page.inner_text("#detail h3") == "blocks"
    opened.click_node("m:blocks.0")
    opened.click_node("m:blocks.0.body")
    conv = opened.page.evaluate("cco.leaf(cco.byName.get('conv_1').index).id")
    opened.click_node(conv)
    said = opened.detail()
    for part in (
        "conv_1",
        "blocks.0.body.0",
        "INT8",
        "W8",
        "4×8×8×8 → 4×8×8×8",
        "QS",
        "255 levels from -127 to 127",
        "skip_quantization: true",
    ):
        assert part in said, part
    assert opened.page.locator("#detail canvas[role=img]").count() == 3  # weights, QS and loss over the epochs


def test_a_module_counts_its_layers_with_weights(opened: OpenPage, state: RunState) -> None:
    assert state.plan is not None
    inside = [layer for layer in state.plan.graph if layer.path.startswith("blocks.") and layer.weighted]
    opened.page.click("#fold")
    label = opened.page.evaluate("cco.graph.cy.getElementById('m:blocks').data('label')")
    assert label.splitlines()[1] == f"{sum(layer.name in state.plan.in_int8 for layer in inside)} of {len(inside)} with weights in INT8"
    whole = opened.page.evaluate("`${cco.tree.int8} of ${cco.tree.weighted} layers with weights run in INT8`")
    assert state.plan.summary.startswith(whole)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.004, 0.3, 0.994, 0.996, 0.9999, 1.0])
def test_shares_are_said_as_in_the_log(opened: OpenPage, share: float) -> None:
    assert opened.page.evaluate(f"cco.share({share})") == per_cent(share)


def test_search_unfolds_what_it_finds(opened: OpenPage) -> None:
    opened.page.click("#fold")
    opened.page.fill("#search", "blocks.1.body.3")
    assert opened.page.inner_text("#found li button") == "conv_4"
    opened.page.press("#search", "Enter")
    assert opened.page.evaluate("cco.leaf(cco.byName.get('conv_4').index).id") in opened.seen()
    assert opened.page.inner_text("#detail h3") == "conv_4"
    opened.page.fill("#search", "no such layer")
    assert "Nothing is named so" in opened.page.inner_text("#found")


def test_what_opens_above_the_graph_moves_no_click(opened: OpenPage) -> None:
    opened.page.click("#fold")
    opened.page.fill("#search", "conv")
    opened.click_node("m:blocks")
    assert "m:blocks.0" in opened.seen()


def test_the_graph_is_operated_by_keys(opened: OpenPage) -> None:
    opened.page.click("#fold")
    opened.until("cco.graph.cy.getElementById('m:blocks').nonempty()")
    opened.page.focus("#canvas")
    for _ in range(3):
        opened.page.keyboard.press("ArrowDown")
    opened.until("document.querySelector('#detail h3')?.textContent === 'blocks'")
    opened.page.keyboard.press("Enter")
    opened.until("cco.graph.cy.getElementById('m:blocks.0').nonempty()")
    opened.until("document.getElementById('say').textContent.includes('unfolded')")
    opened.page.keyboard.press("ArrowDown")
    opened.page.keyboard.press("ArrowUp")
    opened.page.evaluate("cco.before = cco.graph.cy.zoom()")
    opened.page.keyboard.press("+")
    opened.until("cco.graph.cy.zoom() > cco.before")


def test_what_is_operated_has_a_name(opened: OpenPage) -> None:
    nameless = opened.page.evaluate("""[...document.querySelectorAll(
        "button, input, select, a, canvas[role], [role=region], [role=application]")].filter((one) =>
        !(one.getAttribute("aria-label") || one.textContent.trim()
          || (one.labels && one.labels.length && one.labels[0].textContent))).map((one) => one.outerHTML)""")
    assert nameless == []
    assert opened.page.evaluate("[...document.querySelectorAll('th')].every((one) => one.scope === 'col')")
    assert opened.page.evaluate("document.documentElement.lang") == "en"
    opened.page.press("body", "Tab")
    assert opened.page.evaluate("document.activeElement.textContent").startswith("Skip the graph")


def test_the_table_is_filtered_sorted_and_says_why(opened: OpenPage) -> None:
    opened.page.select_option("#only", "float")
    assert "linear_1" in opened.page.inner_text("#table tbody")
    assert "tail" in opened.page.inner_text("#table tbody")
    opened.page.select_option("#only", "")
    opened.page.click("#table th button:text('QS')")
    qs = [
        cell
        for cell in opened.page.evaluate("[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[8].textContent)")
        if cell != "–"
    ]
    assert [float(cell) for cell in qs] == sorted(map(float, qs), reverse=True)
    opened.page.fill("#filter", "blocks.0")
    opened.until("document.querySelectorAll('#table tbody tr').length < 9")
    assert all(
        "blocks.0" in row for row in opened.page.evaluate("[...document.querySelectorAll('#table tbody tr')].map((row) => row.innerText)")
    )


def change(opened: OpenPage, layer: str, part: str, value: Any) -> None:
    """Change one control in the table, as a user does."""
    where = f'#table [data-layer="{layer}"][data-part="{part}"]'
    if part == "form":
        opened.page.set_checked(where, value == "float")
    else:
        opened.page.select_option(where, str(value))


def replanned(plan: QuantizationPlan, text: str) -> QuantizationPlan:
    """The plan of the run's recipe with a text merged over it."""
    recipe = plan.settings.to_dict()
    for section, values in yaml.safe_load(text).items():
        recipe[section] = {**recipe[section], **values} if isinstance(values, dict) else values
    return plan_quantization(plan.graph, load_settings(recipe))


def assert_changed(plan: QuantizationPlan, then: QuantizationPlan, changes: dict[str, tuple[str, Any]]) -> None:
    """The changed layers are as they were changed, the other ones with weights as before."""
    for name, (part, value) in changes.items():
        if part == "form":
            assert (name in then.quantized) == (value == "int8"), name
            assert name not in then.weight_only
        elif part == "weights":
            assert then.decisions[name].weights_num_bits == value
        else:
            assert then.output_bits()[name] == value
    for layer in plan.graph:
        if layer.weighted and layer.name not in changes:
            before, after = plan.decisions[layer.name], then.decisions[layer.name]
            assert (before.quantized, before.weights_num_bits) == (after.quantized, after.weights_num_bits), layer.name


CASES: dict[str, tuple[Any, dict[str, tuple[str, Any]]]] = {
    "nothing said": (None, {"conv": ("form", "float"), "conv_1": ("weights", 4), "relu_1": ("outputs", 4), "linear_1": ("form", "int8")}),
    "names that contradict": (
        {
            "layer_settings": [
                {"match": "conv_1", "weights_num_bits": 4, "activations_num_bits": 8},
                {"match": "conv_2", "skip_quantization": True},
            ]
        },
        {"conv_1": ("weights", 6), "conv_2": ("form", "int8")},
    ),
    "paths and globs": (
        {"layer_settings": [{"match": "blocks.*", "weights_num_bits": 4}, {"match": "stem.0", "skip_quantization": True}]},
        {"conv": ("form", "int8"), "conv_3": ("weights", 8), "conv_4": ("form", "float")},
    ),
    "everything downstream": (
        {"layer_settings": [{"match": "conv_3", "skip_quantization": True, "skip_quantization_downstream": True}]},
        {"conv_4": ("form", "int8"), "conv_1": ("form", "float")},
    ),
    "weights alone": (
        {"layer_settings": [{"match": "conv_1", "weight_only": True}]},
        {"conv_1": ("form", "float"), "conv_2": ("weights", 2)},
    ),
    "few bits": ("w4a4", {"conv_1": ("weights", 8), "relu": ("outputs", 8), "conv_2": ("form", "float")}),
    "another engine": ({"deployment_settings": {"target_framework": "tensorrt"}}, {"conv_2": ("form", "float"), "conv": ("weights", 5)}),
}


FAST = ("nothing said", "names that contradict")


@pytest.mark.parametrize("case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_the_copied_recipe_is_what_the_planner_makes_of_it(case: str, browser: Any, tmp_path: Path) -> None:
    settings, changes = CASES[case]
    quantized = quantized_net(settings)
    plan = quantized.plan
    opened = OpenPage(browser, write_page(tmp_path, state_of(quantized, losses=False)))
    for name, (part, value) in changes.items():
        change(opened, name, part, value)
    text = opened.yaml()
    opened.page.close()
    assert opened.wrong == []
    assert_changed(plan, replanned(plan, text), changes)


def test_skips_that_were_applied_can_be_taken_back(browser: Any, tmp_path: Path) -> None:
    quantized = quantized_net()
    quantized.replan(suggestions=["conv_1", "conv_2"])
    quantized.calibrate([torch.randn(4, 1, 8, 8)])
    opened = OpenPage(browser, write_page(tmp_path, state_of(quantized, losses=False)))
    change(opened, "conv_1", "form", "int8")
    then = replanned(quantized.plan, opened.yaml())
    opened.page.close()
    assert "conv_1" in then.quantized
    assert "conv_2" not in then.quantized


@pytest.mark.slow
def test_the_plan_of_a_budget_is_written_out(browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    recipe = {"budget_settings": {"average_bits": 5}, "layer_settings": [{"match": "blocks.0.*", "weights_num_bits": 8}]}
    quantized = quantized_net(recipe)
    x = torch.randn(4, 1, 8, 8)
    search = BudgetSearch(
        quantized,
        load_settings(recipe),
        lambda names: quantized.calibrate([x], only=names),
        lambda *bits: quantized.loss_sensitivity([x], None, None, *bits),
        call_with,
    )
    state = state_of(quantized)
    state.budget, state.plan = search.find(x), quantized.plan
    opened = OpenPage(browser, write_page(tmp_path, state))
    assert "chosen" in opened.page.inner_text("#budget")
    changes = {"conv_3": ("weights", 7), "linear": ("form", "float" if "linear" in quantized.plan.quantized else "int8")}
    for name, (part, value) in changes.items():
        change(opened, name, part, value)
    text = opened.yaml()
    opened.page.close()
    then = replanned(quantized.plan, text)
    assert then.settings.budget_settings.average_bits is None
    assert_changed(quantized.plan, then, changes)


@pytest.mark.slow
def test_the_speed_follows_the_changes(browser: Any, tmp_path: Path) -> None:
    """As the budget's own estimate is for the plan that the copied recipe makes."""
    pytest.importorskip("scipy")
    recipe = {"budget_settings": {"speed": 1.2, "threads": 2}}
    quantized = quantized_net({})
    x = torch.randn(4, 1, 8, 8)
    search = BudgetSearch(
        quantized,
        load_settings(recipe),
        lambda names: quantized.calibrate([x], only=names),
        lambda *bits: quantized.loss_sensitivity([x], None, None, *bits),
        call_with,
        times=table_for(quantized.graph.names, 3),
    )
    state = state_of(quantized)
    state.budget, state.plan = search.find(x), quantized.plan
    model = state.budget.model
    assert model is not None
    opened = OpenPage(browser, write_page(tmp_path, state))
    assert "One run of it is predicted to take" in opened.page.inner_text("#budget")
    assert opened.page.evaluate("cco.whatIf.planned.seconds") == pytest.approx(state.budget.seconds, rel=1e-3)
    runs = next(name for name in ("conv_1", "conv_2", "conv_3", "conv_4") if name in quantized.plan.quantized)
    change(opened, runs, "form", "float")
    assert "predicted speed" in opened.page.inner_text("#what-if")
    then = replanned(quantized.plan, opened.yaml())
    assert then.settings.budget_settings.speed is None
    assert opened.page.evaluate("cco.whatIf.expected().seconds") == pytest.approx(seconds_of_plan(model, then), rel=1e-3)
    opened.page.close()
    assert opened.wrong == []


def test_what_is_expected_follows_the_changes(opened: OpenPage, state: RunState) -> None:
    assert state.losses is not None
    assert state.plan is not None
    weights, activations = state.losses.weights, state.losses.activations
    planned = opened.page.evaluate("cco.whatIf.planned")
    now = sum(by[state.plan.decisions[name].weights_num_bits or 0] for name, by in weights.items())
    now += sum(by[spec.num_bits] for key, spec in state.plan.tensors.items() if (by := activations.get(str(key))) is not None)
    assert planned["sum"] == pytest.approx(now, rel=1e-3)
    facts = state.facts.layers
    taken = sum(one.elements + 5 * one.channels for name, one in facts.items() if name in state.plan.quantized)
    rest = state.facts.float_bytes - 4 * sum(one.elements for name, one in facts.items() if name in state.plan.quantized)
    assert planned["size"] == pytest.approx(taken + rest)
    change(opened, "conv_1", "weights", 4)
    expected = opened.page.evaluate("cco.whatIf.expected()")
    assert expected["sum"] - planned["sum"] == pytest.approx(weights["conv_1"][4] - weights["conv_1"][8], rel=1e-2)
    assert "layers changed: 1" in opened.page.inner_text("#what-if")
    change(opened, "conv_1", "form", "float")
    expected = opened.page.evaluate("cco.whatIf.expected()")
    assert expected["sum"] <= planned["sum"] - weights["conv_1"][8] * 0.99
    assert expected["size"] - planned["size"] == 3 * facts["conv_1"].elements - 5 * facts["conv_1"].channels
    opened.page.click("#yaml-details summary")
    opened.page.click("#reset")
    assert opened.page.evaluate("cco.whatIf.expected()") == planned


def test_an_exported_file_is_told_and_counted_with(browser: Any, state: RunState, tmp_path: Path) -> None:
    report = ExportReport("model_int8.onnx", 9000, 20000, sqnr_db=40.0, agreement=1.0, batches=2, integer_nodes={"QLinearConv": 5})
    report.float_islands = [
        FloatIsland("Gemm", ("linear_1",), "tail: the last layer with weights before an output, or after it", IslandKind.PLANNED)
    ]
    opened = OpenPage(browser, write_page(tmp_path, replace(state, export=report)))
    said = opened.page.inner_text("#export")
    for part in ("9 kB", "5 QLinearConv", "100 % the same arg-max", "Gemm", "linear_1"):
        assert part in said, part
    assert opened.page.evaluate("cco.whatIf.planned.size") == 9000
    assert "the file takes: 9 kB" in opened.page.inner_text("#what-if")
    opened.page.close()
    assert opened.wrong == []


def test_names_do_nothing(browser: Any, tmp_path: Path) -> None:
    names = tuple(name.replace(".", "") for name in HOSTILE)
    quantized = quantized_net(names=names, blocks=1)
    paths = [layer.path for layer in quantized.graph]
    opened = OpenPage(browser, write_page(tmp_path, state_of(quantized, losses=False)))
    for _ in range(2):
        opened.page.click("#unfold")
    for index in [layer for layer, path in enumerate(paths) if path.startswith("blocks.") and path.endswith(".body.0")]:
        opened.page.evaluate("(index) => cco.graph.find(index)", index)
    opened.page.fill("#search", "<script>")
    opened.page.wait_for_timeout(50)
    assert "<script>globalThis" in opened.page.inner_text("#found")
    assert opened.page.evaluate("globalThis.harmed") is None
    assert "\u202e" not in opened.page.inner_text("body")
    change(opened, "conv_3", "form", "float")
    then = replanned(quantized.plan, opened.yaml())
    opened.page.close()
    assert opened.wrong == []
    assert "conv_3" not in then.quantized


def test_dark_mode_and_print(browser: Any, state: RunState, tmp_path: Path) -> None:
    path = write_page(tmp_path, state)
    colours = {}
    for scheme in ("light", "dark"):
        opened = OpenPage(browser, path, color_scheme=scheme)
        look = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, cco.graph.cy.nodes()[0].style('background-color')]"
        colours[scheme] = opened.page.evaluate(look)
        if scheme == "light":
            opened.page.emulate_media(media="print")
            assert not opened.page.is_visible("nav")
            assert opened.page.is_visible("#table")
            assert len(opened.page.pdf()) > 20_000
        opened.page.close()
        assert opened.wrong == []
    assert all(light != dark for light, dark in zip(colours["light"], colours["dark"], strict=True))


def in_print(opened: OpenPage) -> None:
    """The page as it goes to paper, with its scripts for that."""
    opened.page.set_viewport_size({"width": 718, "height": 1046})  # A4 between margins of a centimetre
    opened.page.emulate_media(media="print")
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")


def test_a_printed_table_has_titles_and_all_rows_and_fits(browser: Any, tmp_path: Path) -> None:
    opened = OpenPage(browser, write_page(tmp_path, RunState(plan=plan_quantization(long_graph(150)))))
    assert "100 of" in opened.page.inner_text("#shown")
    in_print(opened)
    titles = opened.page.evaluate(
        "[...document.querySelectorAll('#table th')].map((th) => getComputedStyle(th, '::before').content + th.innerText)"
    )
    assert len(titles) >= 10
    assert all(title not in ("none", "normal") for title in titles)
    layers = opened.page.evaluate("cco.layers.length")
    assert layers > 100
    assert opened.page.evaluate("document.querySelectorAll('#table tbody tr').length") == layers
    assert opened.page.inner_text("#shown") == f"{layers} of {layers} layers"
    assert opened.page.evaluate("document.getElementById('table').getBoundingClientRect().right") <= 718
    assert not opened.page.is_visible("#more")
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert "100 of" in opened.page.inner_text("#shown")
    opened.page.close()
    assert opened.wrong == []


def test_a_tall_graph_is_printed_in_columns_that_can_be_read(browser: Any, tmp_path: Path) -> None:
    opened = OpenPage(browser, write_page(tmp_path, RunState(plan=plan_quantization(long_graph(150)))))
    opened.page.evaluate("document.getElementById('unfold').click()")
    box = opened.page.evaluate("(({w, h}) => [w, h])(cco.graph.cy.elements().boundingBox())")
    in_print(opened)
    columns = opened.page.evaluate("[...document.querySelectorAll('#picture > div')].map((part) => [part.offsetWidth, part.offsetHeight])")
    shown = sum(height for _, height in columns)
    assert len(columns) > 1
    assert shown / box[1] > 600 / box[1]  # larger than the whole of it in one column
    assert sum(width for width, _ in columns) <= 718
    assert all(height <= 601 for _, height in columns)
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.page.is_visible("#canvas")
    assert not opened.page.query_selector("#picture")
    opened.page.close()
    assert opened.wrong == []


def test_a_net_of_5000_layers_is_folded(browser: Any, tmp_path: Path) -> None:
    graph = long_graph(5000)
    opened = OpenPage(browser, write_page(tmp_path, RunState(plan=plan_quantization(graph))))
    assert opened.page.evaluate("cco.layers.length") == len(graph)
    assert len(opened.seen()) < 60
    assert opened.page.locator("#table tbody tr").count() == 100
    opened.page.fill("#search", "conv_4800")
    opened.page.press("#search", "Enter")
    assert opened.page.inner_text("#detail h3") == "conv_4800"
    assert len(opened.seen()) < 300
    opened.page.fill("#filter", "conv_4800")
    opened.until("document.querySelectorAll('#table tbody tr').length === 1")
    opened.page.close()
    assert opened.wrong == []


@pytest.mark.slow
def test_a_flat_net_is_folded_in_groups(browser: Any, tmp_path: Path) -> None:
    shape = (2, 8)
    layers = [Layer(f"linear_{i}", str(i), "linear", (shape,), (shape,), ("float32",), weighted=True) for i in range(3000)]
    edges = [Edge(f"linear_{i}", f"linear_{i + 1}") for i in range(2999)]
    opened = OpenPage(browser, write_page(tmp_path, RunState(plan=plan_quantization(LayerGraph(layers, edges)))))
    assert len(opened.seen()) <= 45
    opened.page.evaluate("cco.graph.find(2500)")
    assert "l:2500" in opened.seen()
    assert len(opened.seen()) < 300
    opened.page.close()
    assert opened.wrong == []


_CROSSED = """
cco.graph.cy.edges().flatMap((edge) => {
  const points = [edge.sourceEndpoint(), ...(edge.segmentPoints() || []), edge.targetEndpoint()];
  const others = cco.graph.cy.nodes().filter((node) => !node.isParent() && node.id() !== edge.source().id() && node.id() !== edge.target().id());
  const within = (box, x, y) => x > box.x1 && x < box.x2 && y > box.y1 && y < box.y2;
  return others.filter((node) => points.slice(1).some((end, number) => [...Array(101).keys()].some((part) => within(node.boundingBox(),
    points[number].x + (end.x - points[number].x) * part / 100, points[number].y + (end.y - points[number].y) * part / 100))))
    .map((node) => `${edge.id()} through ${node.id()}`);
})
"""


def test_a_residual_connection_runs_around_the_layers_that_it_passes(opened: OpenPage) -> None:
    opened.page.click("#unfold")
    opened.page.click("#unfold")
    shortcut = "cco.graph.cy.edges().filter((edge) => edge.source().data('label').startsWith('relu') && edge.target().data('label').startsWith('add')).length"
    assert opened.page.evaluate(shortcut) == 2
    assert opened.page.evaluate(_CROSSED) == []


_TITLES_CROSSED = """
cco.graph.cy.nodes(":parent").flatMap((node) => {
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "12px system-ui";
  const box = node.boundingBox({ includeLabels: false }), wide = pen.measureText(node.data("label")).width;
  const middle = (box.x1 + box.x2) / 2 + node.numericStyle("text-margin-x");
  const within = (x, y) => x > middle - wide / 2 && x < middle + wide / 2 && y > box.y1 - 13 && y < box.y1 - 2;
  return cco.graph.cy.edges().filter((edge) => {
    const points = [edge.sourceEndpoint(), ...(edge.segmentPoints() || []), edge.targetEndpoint()];
    return points.slice(1).some((end, number) => [...Array(201).keys()].some((part) => within(
      points[number].x + (end.x - points[number].x) * part / 200, points[number].y + (end.y - points[number].y) * part / 200)));
  }).map((edge) => `${edge.id()} through the title of ${node.id()}`);
})
"""


def test_no_arrow_runs_through_the_title_of_a_module(opened: OpenPage) -> None:
    opened.page.click("#unfold")
    opened.page.click("#unfold")
    assert opened.page.evaluate("cco.graph.cy.nodes(':parent').length") == 6
    assert opened.page.evaluate(_TITLES_CROSSED) == []


@pytest.mark.parametrize("factor", [1.05, 1.3, 2.0, 10.0, 1000.0])
def test_labels_of_a_logarithmic_axis_stand_apart(factor: float, browser: Any, state: RunState, tmp_path: Path) -> None:
    assert state.report is not None
    worst = sorted(state.report.main, key=lambda name: -state.report.main[name].qs)[:8]  # type: ignore[union-attr]
    epochs = [(epoch, {name: 3 * factor**number for number, name in enumerate(worst)}) for epoch in range(3)]
    opened = OpenPage(browser, write_page(tmp_path, replace(state, qs_epochs=epochs)))
    chart = "Chart.getChart([...document.querySelectorAll('canvas[aria-label]')].find((one) => one.getAttribute('aria-label').startsWith('QS of the most')))"
    opened.page.evaluate("document.getElementById('sensitivity').scrollIntoView()")
    opened.until(f"Boolean({chart})")
    axis = f"(({{ scales: {{ y }} }}) => y.ticks.map(({{ value }}) => y.getPixelForValue(value)))({chart})"
    places = opened.page.evaluate(axis)
    assert len(places) >= 2
    assert min(above - below for above, below in pairwise(places)) >= 14
    assert opened.wrong == []
    opened.page.close()
