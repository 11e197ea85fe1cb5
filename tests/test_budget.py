"""A budget's plan is the best there is within it, keeps the rules of the recipe, and is the same wherever it is looked at."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from brute_force import images, trained
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Classifier, batches, make_trainer, quick
from models import GuideCNN, ResidualCNN
from torch import Tensor, nn

from lightning_cco import CCOCallback, CCOError, load_quantized, load_settings, quantize
from lightning_cco.budget.choosing import choose
from lightning_cco.budget.integer_program import Choice
from lightning_cco.budget.limits import measures
from lightning_cco.budget.options import Choices, choices
from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.budget.search import BudgetSearch
from lightning_cco.budget.solver import rise_of, taken_of
from lightning_cco.settings import load_settings as read

CALLS: Callable[[nn.Module, Any], Any] = lambda model, batch: model(*batch)  # noqa: E731


def search_for(model: nn.Module, example: Tensor, goal: dict[str, Any], **recipe: Any) -> BudgetSearch:
    settings = load_settings({**recipe, "budget_settings": goal})
    quantized = quantize(model, settings, (example,))
    quantized.calibrate([[example]])
    return BudgetSearch(
        quantized,
        settings,
        lambda names: quantized.calibrate([[example]], only=names),
        lambda *bits: quantized.loss_sensitivity([[example]], None, None, *bits),
        CALLS,
    )


def plan_for(model: nn.Module, example: Tensor, goal: dict[str, Any], **recipe: Any) -> tuple[BudgetPlan, BudgetSearch]:
    search = search_for(model, example, goal, **recipe)
    return search.find([example]), search


def test_is_the_best_of_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every combination there is, one by one."""
    torch.manual_seed(0)
    monkeypatch.setattr("lightning_cco.budget.candidates._ACTIVATIONS", (4, 6, 8))
    monkeypatch.setattr("lightning_cco.budget.candidates._COUNTED", (2, 5, 6, 8))
    made: list[Choices] = []
    monkeypatch.setattr("lightning_cco.budget.search.choices", lambda *args: made.append(choices(*args)) or made[-1])
    for goal, limit in (("average_bits", 4.5), ("size", 0.9), ("bops", 0.05)):
        plan_for(GuideCNN(), torch.randn(16, 1, 8, 8), {goal: limit})
        measure, fixed, unit = measures(made[-1], 100.0)[goal]
        found = choose(made[-1], goal, limit, 100.0)
        assert taken_of(found, measure) + fixed <= limit * unit
        bits = sorted({b for tensor in made[-1].tensors for b in tensor.rises})
        best = min(
            rise_of(made[-1], Choice(options, tensors))
            for options in itertools.product(*(group.options for group in made[-1].groups))
            if sum(map(measure, options)) + fixed <= limit * unit
            for tensors in _fitting(made[-1], options, bits)
        )
        assert rise_of(made[-1], found) <= best * 1.02 + 1e-12


def test_chooses_among_the_bits_that_its_goal_counts() -> None:
    """And no choice of equal bits is better than its own. A size and a speed are those of files, which have 4 and 8 bits."""
    torch.manual_seed(0)
    model, example = trained(GuideCNN, images()), images()[0][:64]
    found = {goal: plan_for(copy.deepcopy(model), example, {goal: limit})[0] for goal, limit in (("average_bits", 6), ("size", 0.62))}
    assert found["average_bits"].chosen.average_bits <= 6
    assert {entry.weights for entry in found["average_bits"].layers} & {5, 6, 7}
    assert {entry.weights for entry in found["size"].layers} <= {4, 8, 32}
    chosen, _ = plan_for(copy.deepcopy(model), example, {"bops": 36 / 1024})
    assert {entry.weights for entry in chosen.layers} & {5, 6, 7}
    assert set(chosen.tensors.values()) & {5, 6, 7}
    for bits in (4, 5, 6):
        plan, search = plan_for(copy.deepcopy(model), example, {"average_bits": bits})
        report = search.model.quantized.loss_sensitivity([[example]], weights_bits=(bits,))
        assert plan.chosen.average_bits <= bits
        assert sum(entry.rise for entry in plan.layers) <= sum(report.weights[entry.layer][bits] for entry in plan.layers) * 1.0001


def _fitting(made: Choices, options: Any, bits: list[int]) -> list[dict[Any, int]]:
    """The bits of tensors that options ask for: those that they read at theirs, what they make at the best of any."""
    wanted: dict[Any, set[int]] = {}
    for group, option in zip(made.groups, options, strict=True):
        for key in group.inputs if option.form == "INT8" else ():
            wanted.setdefault(key, set()).add(option.activations)
        for key in group.outputs if option.form == "INT8" else ():
            wanted.setdefault(key, set())
    if any(len(its) > 1 for its in wanted.values()):
        return []
    for tensor in made.tensors:
        if not tensor.optional:
            wanted.setdefault(tensor.key, set())
    return [{key: next(iter(its)) if its else max(bits) for key, its in wanted.items()}]


class Attention(nn.Module):
    """Projections of one tensor, as models write them that name them apart, and a head that shares its weights with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.out(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)))


def test_what_belongs_together_has_the_same_bits() -> None:
    torch.manual_seed(0)
    plan, search = plan_for(Attention(), torch.randint(0, 12, (8, 5)), {"average_bits": 3.6})
    by_layer = {entry.layer: (entry.form, entry.weights) for entry in plan.layers}
    assert by_layer["linear"] == by_layer["linear_1"] == by_layer["linear_2"]
    assert by_layer["embedding"][1] == by_layer["linear_4"][1]
    assert plan.chosen.average_bits <= 3.6
    # The model is planned so.
    decisions = search.model.quantized.plan.decisions
    assert {name: decisions[name].weights_num_bits or 32 for name in by_layer} == {name: bits for name, (_, bits) in by_layer.items()}


def test_rules_of_the_recipe_are_kept() -> None:
    torch.manual_seed(0)
    rules = [
        {"match": "stem", "weights_num_bits": 8},
        {"match": "blocks.0*", "skip_quantization": True},
        {"match": "conv_3", "skip_quantization": False, "weights_num_bits": 4},
        {"match": "relu_3", "activations_num_bits": 5},
    ]
    plan, search = plan_for(ResidualCNN(), torch.randn(8, 1, 8, 8), {"average_bits": 20}, layer_settings=rules)
    decisions = search.model.quantized.plan.decisions
    assert (decisions["conv"].quantized, decisions["conv"].weights_num_bits) == (True, 8)
    assert not decisions["conv_1"].quantized
    assert not decisions["conv_2"].quantized
    assert (decisions["conv_3"].quantized, decisions["conv_3"].weights_num_bits) == (True, 4)
    assert decisions["relu_3"].activations_num_bits == 5
    assert {entry.layer: entry.reason for entry in plan.layers}["conv_3"] == "a rule of the recipe"
    with pytest.raises(CCOError, match=r"average_bits: 2\.5 can't be reached: the least is .* take rules back"):
        plan_for(ResidualCNN(), torch.randn(8, 1, 8, 8), {"average_bits": 2.5}, layer_settings=rules)


def test_the_tail_is_chosen_for_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 100))
    plan, search = plan_for(model, torch.randn(8, 1, 8, 8), {"size": 0.5})
    tail = {entry.layer: entry for entry in plan.layers}["linear"]
    assert (tail.form, tail.weights) == ("weight-only", 8)
    assert search.model.quantized.plan.weight_only == {"linear"}
    again = load_settings(search.model.quantized.plan.resolved_settings())
    fresh = quantize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 100)), again, (torch.randn(8, 1, 8, 8),))
    assert fresh.plan.weight_only == {"linear"}
    assert fresh.plan.quantized == search.model.quantized.plan.quantized


def test_weights_alone_by_a_rule(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 8, 8)
    quantized = quantize(ResidualCNN(), {"layer_settings": [{"match": "conv_1", "weight_only": True}]}, (x,))
    quantized.calibrate([[x]])
    assert quantized.plan.weight_only == {"conv_1"}
    assert "weight_only: true from the rule 'conv_1'" in quantized.plan.skipped["conv_1"]
    quantized.export(tmp_path / "a.onnx", (x,))
    with pytest.raises(CCOError, match="can't store its weights as integers"):
        quantize(ResidualCNN(), {"layer_settings": [{"match": "relu", "weight_only": True}]}, (x,))
    with pytest.raises(CCOError, match="weight_only says"):
        load_settings({"layer_settings": [{"match": "a", "weight_only": True, "skip_quantization": True}]})


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"size": 0.2, "average_bits": 4}, "expected one goal at a time, got size and average_bits"),
        ({"size": 1.5}, r"expected a part of the float file in \(0, 1\], or null, got 1.5"),
        ({"accuracy_drop": 0.01}, "accuracy_drop is of a metric, which is missing"),
        ({"metric": "val_acc"}, "is what accuracy_drop is of"),
        ({"revise_every_n_epochs": 2}, "there is no goal"),
        ({"sise": 0.2}, "unknown key. Did you mean 'size'"),
    ],
)
def test_says_what_is_wrong_with_a_budget(goal: dict[str, Any], said: str) -> None:
    with pytest.raises(CCOError, match=f"budget_settings.*{said}"):
        read({"budget_settings": goal})


def test_says_before_the_training_that_scipy_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    trainer = make_trainer(tmp_path, quick(budget_settings={"average_bits": 4}))
    with pytest.raises(CCOError, match=r'pip install "lightning-cco\[budget\]"'):
        trainer.fit(Classifier(), batches())
    assert trainer.global_step == 0


class Wide(Classifier):
    """Of enough weights for sizes to tell."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResidualCNN(width=24)
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):  # as trained ones are: files store biases that are all zero once
                nn.init.normal_(module.bias, std=0.1)


def bits_of(callback: CCOCallback) -> dict[str, tuple[bool, int | None]]:
    assert callback.quantized is not None
    return {name: (decision.quantized, decision.weights_num_bits) for name, decision in callback.quantized.plan.decisions.items()}


def fit(folder: Path, *callbacks: pl.Callback, seed: int = 0, ckpt_path: str | None = None, **options: Any) -> pl.Trainer:
    torch.manual_seed(seed)
    model = Wide()
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.fit(model, batches(), batches(), ckpt_path=ckpt_path)
    return trainer


def test_the_file_is_as_large_as_predicted(tmp_path: Path) -> None:
    callback = quick(budget_settings={"size": 0.45})
    fit(tmp_path, callback)
    callback.export(tmp_path / "Wide_int8.onnx")
    assert callback.budget is not None
    assert callback.budget.measured
    size = (tmp_path / "Wide_int8.onnx").stat().st_size
    assert size == pytest.approx(callback.budget.size_bytes, rel=0.01)
    in_float = 4 * sum(t.numel() for t in callback.quantized.model.parameters())  # type: ignore[union-attr]
    assert in_float < callback.budget.float_bytes < in_float + 30_000
    assert size <= 0.45 * callback.budget.float_bytes
    assert callback.budget.chosen.size == pytest.approx(size / callback.budget.float_bytes, rel=0.01)
    assert len({entry.weights for entry in callback.budget.layers}) > 1


def test_is_reproducible_and_resumes(tmp_path: Path) -> None:
    goal = {"average_bits": 4.7}
    first, second = quick(budget_settings=goal), quick(budget_settings=goal)
    saving = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer = fit(tmp_path, first, saving)
    fit(tmp_path, second)
    assert bits_of(first) == bits_of(second)
    recipe = load_settings(tmp_path / "cco" / "resolved_recipe.yaml")
    assert {rule.match: rule.weights_num_bits for rule in recipe.layer_settings if rule.weights_num_bits} == {
        name: bits for name, (_, bits) in bits_of(first).items() if bits
    }
    last = str(saving.last_model_path)
    resumed = quick(budget_settings=goal)
    fit(tmp_path, resumed, seed=5, ckpt_path=last, max_epochs=2)
    assert resumed.budget is None  # no new search
    assert bits_of(resumed) == bits_of(first)
    tested = quick(budget_settings=goal)
    torch.manual_seed(6)
    make_trainer(tmp_path, tested).test(Wide(), batches(), ckpt_path=last, verbose=False)
    assert bits_of(tested) == bits_of(first)
    loaded = load_quantized(Wide(), last, (torch.zeros(2, 1, 8, 8),))
    assert loaded.plan.quantized == first.quantized.plan.quantized  # type: ignore[union-attr]
    assert not loaded.uncalibrated
    other = quick(budget_settings={"average_bits": 8})
    fit(tmp_path, other, ckpt_path=last, max_epochs=2)
    assert other.budget is not None
    assert other.budget.limit == 8
    assert trainer.global_step == 4


def test_without_a_budget_all_is_as_before(tmp_path: Path) -> None:
    callback = quick()
    fit(tmp_path, callback)
    assert callback.budget is None
    assert callback.quantized is not None
    assert callback.quantized.settings == callback.settings
    assert {bits for _, bits in bits_of(callback).values()} == {8, None}


def test_a_size_is_chosen_again_until_its_export_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file holds beside the weights depends on the plan: here each layer in float takes 3,000 bytes more than was to be expected."""
    torch.manual_seed(0)
    search = search_for(ResidualCNN(width=24), torch.randn(8, 1, 8, 8), {"size": 0.35})

    def exported() -> int:
        plan, model = search.model.quantized.plan, search.model.quantized.model
        names = [layer.name for layer in plan.graph if layer.weighted]
        own = {layer.name: model.get_parameter(layer.parameters[0]).numel() for layer in plan.graph if layer.weighted}
        sizes = [own[name] * {32: 4.0, 8: 1.0, 4: 0.5}[plan.decisions[name].weights_num_bits or 32] for name in names]
        return 5000 + int(sum(sizes)) + 3000 * sum(plan.decisions[name].weights_num_bits is None for name in names)

    search.model.export_bytes = exported
    plan = search.find([torch.randn(8, 1, 8, 8)])
    assert plan.measured
    assert plan.size_bytes == exported()  # the model is planned as the best of what was tried
    assert plan.size_bytes <= 0.35 * plan.float_bytes
    search = search_for(ResidualCNN(width=24), torch.randn(8, 1, 8, 8), {"size": 0.05})
    search.model.export_bytes = exported
    with pytest.raises(CCOError, match=r"size: 0\.05 can't be reached: the least is .* bytes are no weights"):
        search.find([torch.randn(8, 1, 8, 8)])


@pytest.mark.filterwarnings("ignore:loss sensitivity. no gradient came back")
def test_layers_that_no_gradient_reaches_are_named() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.backbone(x).relu().mean((2, 3))
            return self.head(x)

    with pytest.raises(CCOError, match=r"Not to choose: 'conv \(no gradient reaches it"):
        plan_for(Frozen(), torch.randn(8, 1, 8, 8), {"average_bits": 2})


@pytest.mark.filterwarnings("ignore:loss sensitivity. no gradient came back")
def test_tensors_that_no_gradient_reaches_keep_their_bits() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.head(torch.relu(self.third(x + torch.relu(self.second(x)).detach())))

    torch.manual_seed(0)
    _, search = plan_for(Detached(), torch.randn(16, 8), {"bops": 0.03})
    decisions = search.model.quantized.plan.decisions
    assert decisions["relu_1"].activations_num_bits == 8
    assert 4 <= (decisions["relu"].activations_num_bits or 0) < 8
