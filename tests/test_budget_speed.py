"""A speed as a budget: the integer program against every choice there is, the times that it counts against the planner, and the table's file."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GuideCNN, ResidualCNN
from test_budget import CALLS, plan_for, search_for
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, load_layer_times, load_settings, measure_layer_times, quantize
from lightning_cco.budget.integer_program import Choice
from lightning_cco.budget.layer_times import LayerTimes, processor_name
from lightning_cco.budget.limits import fastest
from lightning_cco.budget.options import Choices
from lightning_cco.budget.plan import budget_rules
from lightning_cco.budget.rules import rules_of
from lightning_cco.budget.search import BudgetSearch
from lightning_cco.budget.solver import rise_of, solve
from lightning_cco.budget.units import seconds_of_plan, speed_model


class Branches(nn.Module):
    """Tensors that several layers read, an addition after another, a concatenation and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.stem, self.last, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.a(x) + x
        z = (self.b(y) + y).relu()
        return self.head(self.last(torch.cat([z, self.c(x)], 1)).mean((2, 3)))


def table_for(names: Any, seed: int, integer: tuple[float, float] = (0.2, 1.2), conversion: float = 0.4) -> LayerTimes:
    """Times of a made-up machine: of each layer in float between 0.5 and 1.5 µs, in the other forms a part of that."""
    draw = random.Random(seed)
    layers = {}
    for name in names:
        seconds = 1e-6 * draw.uniform(0.5, 1.5)
        parts = {"float": 1.0, "INT8": draw.uniform(*integer), "weight-only": draw.uniform(0.9, 1.3), "4 bits": draw.uniform(1.0, 2.0)}
        layers[name] = {form: seconds * part for form, part in parts.items()}
    entering, leaving = ({name: 1e-6 * draw.uniform(0, conversion) for name in names} for _ in range(2))
    return LayerTimes("a made-up engine", processor_name(), 1, [[1, 1, 8, 8]], layers, entering, leaving)


def choices_of(model: nn.Module, seed: int, **recipe: Any) -> tuple[Choices, BudgetSearch]:
    torch.manual_seed(seed)
    example = torch.randn(8, 1, 8, 8)
    search = search_for(model, example, {"size": 1.0}, **recipe)
    made, base, _ = search._choices([example])
    made.speed = speed_model(made, base, table_for(base.graph.names, seed))
    return made, search


def every(made: Choices) -> Iterator[tuple[Any, ...]]:
    return itertools.product(*(group.options for group in made.groups))


def rise(made: Choices, options: tuple[Any, ...]) -> float:
    """The rise of the loss with what must be rounded for these options, each tensor at its best bits."""
    wanted = {
        key for group, option in zip(made.groups, options, strict=True) if option.form == "INT8" for key in (*group.inputs, *group.outputs)
    }
    tensors = {tensor.key: 8 for tensor in made.tensors if not tensor.optional or tensor.key in wanted}
    return rise_of(made, Choice(options, tensors))


@pytest.mark.parametrize(("model", "seed"), [(GuideCNN, 0), (Branches, 1), (Branches, 2), (Branches, 3), (Branches, 4)])
def test_is_the_best_of_all_choices(model: type[nn.Module], seed: int) -> None:
    """Against every combination there is, one by one: the fastest, and what loses least at several speeds, alone and together with a size."""
    made, _ = choices_of(model(), seed, deployment_settings={"int4": False})
    assert made.speed is not None
    found = {options: made.speed.seconds(options) for options in every(made)}
    least = min(found.values())
    assert made.speed.seconds(fastest(made).options) == pytest.approx(least, rel=1e-6)
    sizes = sorted(sum(option.bytes for option in options) for options in found)
    for part in (0.02, 0.3, 0.7):
        allowed = least + part * (max(found.values()) - least)
        for size in (float("inf"), sizes[len(sizes) // 2]):
            fitting = [
                options for options, seconds in found.items() if seconds <= allowed and sum(option.bytes for option in options) <= size
            ]
            also = [] if size == float("inf") else [(lambda option: option.bytes, size)]
            chosen = solve(made, made.speed, allowed, also)
            assert (chosen is None) == (not fitting)
            if chosen is None:
                continue
            assert made.speed.seconds(chosen.options) <= allowed * (1 + 1e-6)
            assert sum(option.bytes for option in chosen.options) <= size * (1 + 1e-6)
            assert rise(made, chosen.options) <= min(rise(made, options) for options in fitting) * 1.02 + 1e-12


def test_no_choice_where_none_is_fast_enough() -> None:
    made, _ = choices_of(GuideCNN(), 0)
    assert made.speed is not None
    least = min(made.speed.seconds(options) for options in every(made))
    assert solve(made, made.speed, 0.999 * least) is None
    assert solve(made, made.speed, 1.001 * least) is not None


@pytest.mark.parametrize(("model", "seed"), [(GuideCNN, 0), (Branches, 1), (ResidualCNN, 2)])
def test_counts_what_the_planner_does(model: type[nn.Module], seed: int) -> None:
    """Who runs in integers, and what is converted, is said of a choice as the plan of its rules has it."""
    made, search = choices_of(model(), seed)
    assert made.speed is not None
    base = search.model.quantized.plan
    tail, bits = budget_rules(base.settings), {spec.layer: spec.num_bits for spec in base.tensors.values()}
    draw = random.Random(seed)
    for _ in range(25):
        options = tuple(draw.choice(group.options) for group in made.groups)
        planned = load_settings(search.settings)
        planned.layer_settings = rules_of(made, Choice(options, {}), tail, bits)
        planned.global_quantization_settings.skip_tail_quantization = False
        search.model.replan(planned)
        assert seconds_of_plan(made.speed, search.model.quantized.plan) == pytest.approx(made.speed.seconds(options), rel=1e-9)


def test_conversions_cost_what_is_between_the_layers() -> None:
    """A chain of three convolutions, by hand: switching to and fro pays twice for each change."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    torch.manual_seed(0)
    example = torch.randn(4, 1, 8, 8)
    search = search_for(net, example, {"size": 1.0}, deployment_settings={"int4": False})
    made, base, _ = search._choices([example])
    forms = {"float": 10.0, "INT8": 4.0, "weight-only": 10.0, "4 bits": 10.0}
    table = LayerTimes(
        "e", "p", 1, [], dict.fromkeys(base.graph.names, forms), dict.fromkeys(base.graph.names, 1.0), dict.fromkeys(base.graph.names, 0.5)
    )
    made.speed = speed_model(made, base, table)

    def seconds(*wanted: str) -> float:
        chosen = tuple(next(o for o in group.options if o.form == form) for group, form in zip(made.groups, wanted, strict=True))
        assert made.speed is not None
        return made.speed.seconds(chosen)

    whole = seconds("float", "float", "float", "float")
    # The input is rounded, and what the last one makes is read as floats.
    assert seconds("INT8", "INT8", "INT8", "float") == pytest.approx(whole - 18 + 1.5)
    # Each of the outer ones is converted on both of its sides.
    assert seconds("INT8", "float", "INT8", "float") == pytest.approx(whole - 12 + 3.0)
    assert seconds("float", "INT8", "float", "float") == pytest.approx(whole - 6 + 1.5)


def test_a_plan_is_a_function_of_the_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(8, 1, 8, 8)
    names = search_for(Branches(), example, {"size": 1.0}).model.quantized.graph.names
    path = tmp_path / "times.json"
    table_for(names, 5, (0.1, 0.2), 0.05).save(path)
    assert load_layer_times(path) == load_layer_times(path)
    plans = []
    for _ in range(2):
        torch.manual_seed(0)
        search = search_for(Branches(), example, {"average_bits": 8})
        search.goal, search.by, search.limit, search.speed, search.times = "speed", "speed", 2.0, 2.0, load_layer_times(path)
        plans.append(search.find([example]))
    assert plans[0].rules == plans[1].rules
    assert plans[0].chosen.speed >= 2.0
    assert plans[0].float_seconds / plans[0].seconds == pytest.approx(plans[0].chosen.speed)
    assert {entry.form for entry in plans[0].layers} >= {"INT8"}
    assert "µs" in plans[0].layers[0].reason
    curve = [point.speed for point in plans[0].speed_curve]
    assert curve == sorted(curve, reverse=True)


def test_says_the_largest_speed_that_can_be_reached() -> None:
    torch.manual_seed(0)
    example = torch.randn(8, 1, 8, 8)
    search = search_for(Branches(), example, {"average_bits": 8})
    search.goal, search.by, search.limit, search.speed = "speed", "speed", 20.0, 20.0
    search.times = table_for(search.model.quantized.graph.names, 1)
    with pytest.raises(
        CCOError, match=r"speed: 20 can't be reached: the largest is \d.*ms instead of .* in float.*Most of that time goes to.*VNNI"
    ):
        search.find([example])
    search.times = table_for(search.model.quantized.graph.names, 1)
    for forms in search.times.layers.values():
        del forms["INT8"]
    with pytest.raises(CCOError, match=r"with 0 of \d+ groups of layers in INT8\. Most of that time goes to"):
        search.find([example])
    search.times = LayerTimes("e", "p", 1, [], {"conv_9": {"float": 1.0}})
    with pytest.raises(CCOError, match=r"no times in float of .*another model"):
        search.find([example])
    with pytest.raises(CCOError, match="no times of layers are known"):
        plan_for(Branches(), example, {"speed": 2.0})


def test_says_what_is_wrong_with_a_table(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    good = table_for(["conv"], 0)
    for broken, said in [
        ("{", "can't be read"),
        ("[]", "expected a mapping with version: 1"),
        (json.dumps({**good.to_plain(), "version": 7}), "version: 1, got 7"),
        (json.dumps({**good.to_plain(), "threads": 0}), "threads: expected a whole number of at least 1, got 0"),
        (json.dumps({**good.to_plain(), "layers": {}}), "layers: expected a mapping"),
        (json.dumps({**good.to_plain(), "layers": {"conv": {"float": -1}}}), r"layers\.conv: expected seconds"),
        (json.dumps({**good.to_plain(), "layers": {"conv": {"int8": 1}}}), "by float, INT8, weight-only, 4 bits, got"),
        (json.dumps({**good.to_plain(), "entering": {"conv": None}}), "entering: expected seconds"),
    ]:
        path.write_text(broken)
        with pytest.raises(CCOError, match=said):
            load_layer_times(path)
    with pytest.raises(CCOError, match="can't be read"):
        load_layer_times(tmp_path / "nowhere.json")
    good.save(path)
    assert load_layer_times(path) == good
    with pytest.warns(CCOWarning, match="measured elsewhere .*engine: a made-up engine, here ONNX Runtime 1"):
        good.compare("ONNX Runtime 1", 1)
    replace(good, engine="x").compare("x", 1)


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"speed": 0}, r"expected a multiple of the float model's speed in \(0, 1000\], or null, got 0"),
        ({"speed": 2, "average_bits": 4}, "speed goes alone, or together with size or accuracy_drop, got average_bits"),
        ({"speed": 2, "bops": 0.1}, "speed goes alone"),
        ({"layer_times": "a.json"}, "layer_times is what a speed is predicted from, but there is no goal"),
        ({"speed": 2, "threads": 0}, "expected 1 to 1024 threads, got 0"),
        ({"speed": 2, "batch_size": 0}, "samples, got 0"),
        ({"speed": 2, "accuracy_drop_by": "speed"}, "which is missing. Write accuracy_drop"),
        ({"accuracy_drop": 0.1, "metric": "a", "accuracy_drop_by": "bits"}, r"expected one of \['size', 'speed'\]"),
    ],
)
def test_says_what_is_wrong_with_a_speed(goal: dict[str, Any], said: str) -> None:
    with pytest.raises(CCOError, match=f"budget_settings.*{said}"):
        load_settings({"budget_settings": goal})


def test_times_are_measured_in_exported_files(tmp_path: Path) -> None:
    """A real table: what the layers of a file take comes to what the file takes, and files of mixed forms take what is predicted of them in all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 24 * 24, 10))
    x = torch.randn(4, 1, 28, 28)
    quantized = quantize(net, "w8a8", (x,))
    quantized.calibrate([[x]])
    before = quantized.plan.resolved_settings()
    table = measure_layer_times(quantized, [x], batch_size=2)
    assert quantized.plan.resolved_settings() == before
    assert table.engine.startswith("ONNX Runtime ")
    assert set(table.files) == {"float", "INT8", "every other layer", "the others"}
    layers = table.layers
    assert {"float", "INT8"} <= layers["relu"].keys() & layers["relu_1"].keys()
    assert "weight-only" in layers["linear"]
    assert sum(forms["float"] for forms in layers.values()) == pytest.approx(table.files["float"], rel=1e-6)
    assert layers["relu_1"]["float"] > layers["relu"]["float"]  # 16 times as many products
    assert min(table.entering["relu"], table.leaving["relu"]) > 0
    table.save(tmp_path / "layer_times.json")
    settings = load_settings({"budget_settings": {"speed": 0.5}})
    search = BudgetSearch(
        quantized,
        settings,
        lambda names: quantized.calibrate([[x]], only=names),
        lambda *bits: quantized.loss_sensitivity([[x]], None, None, *bits),
        CALLS,
        times=load_layer_times(tmp_path / "layer_times.json"),
    )
    plan = search.find([x])
    assert plan.float_seconds == pytest.approx(table.files["float"], rel=1e-6)
