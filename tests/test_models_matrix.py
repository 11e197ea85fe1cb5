"""Every kind of model goes through the same checks: captured alike in both modes, trained, measured, drawn, saved, taken off, and right by value."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import matrix_code
import matrix_models
import matrix_transformers
import pytest
import torch
from matrix_case import Case
from matrix_expected import QUANTIZED
from matrix_values import Recorder, identities, loss_of, repeatable, same_tensors
from torch import Tensor, nn

from lightning_cco import QuantizedModel
from lightning_cco.drawing import draw_graph, render_png_bytes
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.capture import capture
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.settings import Settings

# Experts of transformers are multiplied by a function without an INT8 kernel, which is said.
pytestmark = pytest.mark.filterwarnings("ignore:.*grouped_mm:lightning_cco.errors.CCOWarning")

CASES = [*matrix_models.CASES, *matrix_code.CASES, *matrix_transformers.CASES]
ALL = [pytest.param(case, id=case.name) for case in CASES]
PICTURES = {"resnet", "transformer_encoder", "nested"}


def hooked(case: Case, model: nn.Module, batch: Any) -> QuantizedModel:
    quantized = QuantizedModel(model, capture(model, lambda: case.run(model, batch)), Settings())
    quantized.calibrate([batch], case.run)
    return quantized


def made(case: Case) -> tuple[nn.Module, Any]:
    model, batch = case.make(), case.batch()
    case.run(model, batch)  # builds lazy layers
    return model, batch


def outputs_of(case: Case, model: nn.Module, batch: Any) -> list[Tensor]:
    torch.manual_seed(5)
    with torch.no_grad():
        return [tensor.clone() for _, tensor in tensors_in(case.run(model, batch))]


@pytest.mark.parametrize("case", ALL)
def test_both_modes_give_the_same_quantized_layers(case: Case) -> None:
    model, batch = made(case)
    plans = []
    for training in (True, False):
        model.train(training)
        quantized = hooked(case, model, batch)
        plans.append((quantized.graph.names, quantized.plan.quantized, list(quantized.plan.tensors)))
        quantized.remove()
    assert plans[0] == plans[1]
    kinds = Counter(quantized.graph[name].kind for name in quantized.plan.quantized)
    for kind in [kind for kind in kinds if operation_of_kind(kind).category is Category.PRESERVE]:
        del kinds[kind]  # what only moves values follows from the others
    assert ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) == QUANTIZED[case.name]


@pytest.mark.parametrize("case", ALL)
def test_a_step_trains_what_it_trains_in_float_and_nothing_is_silent(case: Case) -> None:
    model, batch = made(case)
    model.train()
    plain = copy.deepcopy(model)
    loss_of(case.run(plain, batch)).backward()
    quantized = hooked(case, model, batch)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(case.run(model, batch))
        loss.backward()
        losses.append(float(loss.detach()))
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        assert reached == {name for name, p in plain.named_parameters() if p.grad is not None}
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
        optimizer.step()
    assert all(math.isfinite(value) for value in losses)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(p.requires_grad for name, p in model.named_parameters() if name in changed)
    model.eval()
    case.run(model, batch)
    assert quantized.drift == []


@pytest.mark.parametrize("case", [param for param in ALL if param.values[0].other_batch])
def test_another_path_than_captured_runs_in_float_and_says_so(case: Case) -> None:
    model, batch = made(case)
    quantized = hooked(case, model, batch)
    assert case.other_batch is not None
    with pytest.warns(CCOWarning, match="run in float"):
        case.run(model, case.other_batch())
    assert quantized.drift


@pytest.mark.parametrize("case", ALL)
def test_sensitivity_is_measured_and_drawn(case: Case) -> None:
    model, batch = made(case)
    quantized = hooked(case, model, batch)
    report = quantized.sensitivity([batch, batch], case.run)
    layers = quantized.measured_layers()
    assert set(report.local) == set(report.accumulated) == set(layers)
    for mode in (report.local, report.accumulated):
        assert all(math.isfinite(entry.qs) for entry in mode.values())
    assert any(entry.qs > 0 for entry in report.local.values())
    picture = draw_graph(quantized.graph, quantized.plan, {name: entry.qs for name, entry in report.main.items()})
    text = picture.to_string()
    assert all(name in text for name in quantized.plan.quantized)
    if case.name in PICTURES:
        assert (render_png_bytes(picture) or b"").startswith(b"\x89PNG")


@pytest.mark.parametrize("case", ALL)
def test_saved_and_loaded_it_computes_the_same(case: Case) -> None:
    model, batch = made(case)
    quantized = hooked(case, model, batch)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.eval()
    outputs_of(case, model, batch)  # what is kept of the weights must not outlive the next step
    model.train()
    loss_of(case.run(model, batch)).backward()
    optimizer.step()
    model.eval()
    expected = outputs_of(case, model, batch)

    twin, _ = made(case)
    other = QuantizedModel(twin, capture(twin, lambda: case.run(twin, batch)), Settings())
    twin.load_state_dict(model.state_dict(), strict=True)
    assert other.load_state_dict(quantized.state_dict()) == []
    assert other.uncalibrated == []
    twin.eval()
    assert same_tensors(outputs_of(case, twin, batch), expected)


@pytest.mark.parametrize("case", ALL)
def test_removed_it_is_the_float_model_again(case: Case) -> None:
    model, batch = made(case)
    for training in (False, True):
        model.train(training)
        state = copy.deepcopy(model.state_dict())
        expected = outputs_of(case, model, batch)
        model.load_state_dict(state)
        torch.backends.mha.set_fastpath_enabled(
            False
        )  # PyTorch leaves it where layers of a transformer have hooks, and it rounds otherwise
        expected_slow = outputs_of(case, model, batch)
        torch.backends.mha.set_fastpath_enabled(True)
        model.load_state_dict(state)
        quantized = hooked(case, model, batch)
        with quantized.disabled():
            found = outputs_of(case, model, batch)
        assert same_tensors(found, expected) or same_tensors(found, expected_slow)
        model.load_state_dict(state)
        assert not same_tensors(outputs_of(case, model, batch), expected)
        quantized.remove()
        model.load_state_dict(state)
        assert same_tensors(outputs_of(case, model, batch), expected)
        model.load_state_dict(state)


@pytest.mark.parametrize("case", ALL)
def test_each_quantizer_sees_its_own_tensor(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(case)
    repeatable(model)
    plain = copy.deepcopy(model).eval()
    recorder = Recorder(plain)
    with recorder, torch.no_grad():
        case.run(plain, copy.deepcopy(batch))
    quantized = QuantizedModel(model, capture(model, lambda: case.run(model, batch)), Settings())
    seen = identities(quantized, monkeypatch)
    quantized.calibrate([copy.deepcopy(batch)], case.run)
    observed = seen.take()
    model.eval()
    case.run(model, copy.deepcopy(batch))
    evaluated, evaluated_weights = seen.take(), seen.take_weights()
    model.train()
    case.run(model, copy.deepcopy(batch))
    trained, trained_weights = seen.take(), seen.take_weights()

    assert set(observed) == set(evaluated) == set(trained) == set(quantized.activations)
    for key, tensors in observed.items():  # a fresh result may come as the rows that it is a view of
        assert same_tensors(map(torch.flatten, evaluated[key]), map(torch.flatten, tensors), exact=False), key
        assert same_tensors(map(torch.flatten, trained[key]), map(torch.flatten, tensors), exact=False), key
    recorder.check(quantized, observed, batch, case.twice)
    assert set(evaluated_weights) == set(trained_weights) == {(name, k) for name, qs in quantized.weights.items() for k in range(len(qs))}
    for key, tensors in evaluated_weights.items():
        assert same_tensors(trained_weights[key], tensors, exact=False), key
    recorder.check_weights(quantized, evaluated_weights)
