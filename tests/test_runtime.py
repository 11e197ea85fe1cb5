"""A hooked model computes what the plan says, sees its own tensors only, and comes back bit for bit."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GuideCNN, ResidualCNN, TokenModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cco import QuantizedModel, quantize
from lightning_cco.errors import CCOError, CCOWarning

MODELS = [GuideCNN, ResidualCNN, TokenModel]


def hooked(model: nn.Module, example: Tensor, settings: object = None) -> QuantizedModel:
    model.eval()
    quantized = quantize(model, settings, (example,))
    quantized.calibrate([(example,)])
    return quantized


def fake_quantized(x: Tensor, quantizer: object) -> Tensor:
    """The reference: torch's own fake-quantization with the quantizer's scale and zero point."""
    return torch.fake_quantize_per_tensor_affine(x, float(quantizer.scale), int(quantizer.zero_point), 0, 2**quantizer.num_bits - 1)


def fake_quantized_weight(w: Tensor, num_bits: int = 8) -> Tensor:
    limit = 2 ** (num_bits - 1) - 1
    scale = w.flatten(1).abs().amax(1) / limit
    return torch.fake_quantize_per_channel_affine(w, scale, torch.zeros_like(scale), 0, -limit, limit)


def test_the_quantized_forward_is_torchs_own_fake_quantization() -> None:
    model, x = GuideCNN(), GuideCNN.example()
    quantized = hooked(model, x)
    q = quantized.activations
    with torch.no_grad():
        h = fake_quantized(x, q["input_0"])
        h = fake_quantized(F.relu(F.conv2d(h, fake_quantized_weight(model.conv1.weight), model.conv1.bias)), q["relu"])
        h = fake_quantized(F.relu(F.conv2d(h, fake_quantized_weight(model.conv2.weight), model.conv2.bias)), q["relu_1"])
        h = F.max_pool2d(h, 2).flatten(1)
        h = fake_quantized(F.relu(F.linear(h, fake_quantized_weight(model.fc1.weight), model.fc1.bias)), q["relu_2"])
        expected = F.linear(h, model.fc2.weight, model.fc2.bias)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_off_means_off_and_remove_leaves_nothing(model_class: type[nn.Module], training: bool) -> None:
    model, x = model_class(), model_class.example()
    plain = copy.deepcopy(model)
    quantized = hooked(model, x)
    model.train(training)
    plain.train(training)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    with quantized.disabled():
        assert torch.equal(model(x), expected)
    torch.manual_seed(1)
    assert not torch.equal(model(x), expected)
    quantized.remove()
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model_class", MODELS)
def test_parameter_names_never_change(model_class: type[nn.Module]) -> None:
    model = model_class()
    before = list(model.state_dict())
    hooked(model, model_class.example())
    assert list(model.state_dict()) == before
    model_class().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("model_class", MODELS)
def test_gradients_reach_every_parameter(model_class: type[nn.Module]) -> None:
    model, x = model_class(), model_class.example()
    hooked(model, x)
    model.train()
    model(x).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []


def record_what_quantizers_see(quantized: QuantizedModel) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}
    for key, quantizer in quantized.activations.items():

        def keep(module: nn.Module, args: tuple[Tensor, ...], key: str = key) -> None:
            seen.setdefault(key, []).append(args[0].detach().clone())

        quantizer.register_forward_pre_hook(keep)
    return seen


class Shifting(nn.Module):
    """Training adds operations of the same kinds before the ones that evaluation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 100.0
            x = x - 100.0
        y = self.fc1(x)
        if self.training:
            y = y * 1.0
        y = y + x
        y = y * 0.5
        return self.fc2(y)


def test_operations_that_only_training_makes_never_shift_a_quantizer() -> None:
    model, x = Shifting(), torch.randn(8, 4)
    quantized = hooked(model, x)
    seen = record_what_quantizers_see(quantized)
    model(x)
    evaluated = {key: values.pop() for key, values in seen.items()}
    model.train()
    model(x)
    assert set(evaluated) == set(quantized.activations)
    for key, value in evaluated.items():
        torch.testing.assert_close(seen[key][0], value, rtol=0, atol=1e-2)


def test_two_forwards_before_one_backward() -> None:
    model, x = ResidualCNN(), ResidualCNN.example()
    hooked(model, x)
    model.train()
    (model(x) - model(2 * x)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        y = y + x if x.sum() > 0 else y + 1000.0
        return self.fc2(y)


def test_another_branch_in_the_place_of_a_layer_runs_in_float_and_says_so() -> None:
    model, x = Branching(), torch.ones(2, 4)
    quantized = hooked(model, x, {"global_quantization_settings": {"skip_tail_quantization": False}})
    seen = record_what_quantizers_see(quantized)
    with pytest.warns(CCOWarning, match=r"layer 'add'.*branch"):
        model(-x)
    assert "add" not in seen
    assert len(quantized.drift) == 1


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for _ in range(times):
            x = torch.tanh(self.cell(x))
        return self.head(x)


def test_a_longer_loop_than_captured_runs_in_float_and_says_so() -> None:
    model, x = Looping(), torch.randn(2, 4)
    quantized = hooked(model, x)
    assert {"linear", "linear_1"} <= quantized.plan.quantized
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, times=1)
    with pytest.warns(CCOWarning) as caught:
        model(x, times=3)
    messages = [str(warning.message) for warning in caught]
    assert any("'linear'" in message and "'cell#2'" in message for message in messages)
    assert len(messages) == len(quantized.drift)


def test_dropped_results_of_in_place_operations_stay_quantized() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3, self.head = (nn.Linear(4, 4) for _ in range(4))
            self.keeps = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc1(x)
            z = self.fc2(x)
            y.add_(z)
            torch.sigmoid_(y)
            if self.keeps:  # what the capture sees kept is not rounded where it is made
                self.last = y
            return self.head(self.fc3(y))

    model, x = InPlace(), torch.randn(5, 4)
    quantized = hooked(model, x)
    model.keeps = True
    model(x)
    grid = model.last / quantized.activations["sigmoid"].scale
    torch.testing.assert_close(grid, grid.round(), rtol=0, atol=1e-3)
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
            self.head = nn.Linear(4, 2)
            self.checkpointing = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = checkpoint(self.body, x, use_reentrant=use_reentrant) if self.checkpointing else self.body(x)
            return self.head(x)

    model, x = Checkpointed(), torch.randn(6, 4)
    quantized = hooked(model, x)
    model.train()
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        ranges = {key: quantizer.get_ranges() for key, quantizer in quantized.activations.items()}
        model(x).square().sum().backward()
        for key, quantizer in quantized.activations.items():
            quantizer.set_ranges(ranges[key])
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


LEARNED = {"range_estimator": "learned", "weight_estimator": "learned"}


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param({}, id="w8a8"),
        pytest.param({"global_quantization_settings": {"weights_num_bits": 4}}, id="w4a8"),
        pytest.param({"global_quantization_settings": {"weights_num_bits": 4}, "training_settings": LEARNED}, id="learned"),
        pytest.param(
            {"global_quantization_settings": {"weights_num_bits": 4, "weights_group_size": 16, "weights_symmetric": False}}, id="groups"
        ),
        pytest.param({"global_quantization_settings": {"activations_dynamic": True}}, id="dynamic activations"),
    ],
)
def test_compiled_for_sizes_that_vary(recipe: dict[str, Any]) -> None:
    """``dynamic=True`` makes an input of the graph of each number that is not written in the code."""
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)), torch.randn(8, 16)
    quantized = hooked(model, x, recipe)
    quantized.freeze_ranges()
    gradients: list[list[Tensor]] = []
    torch._dynamo.reset()
    for forward in (model, torch.compile(model, backend="eager", dynamic=True, fullgraph=True)):
        model.zero_grad()
        for rows in (8, 5):
            forward(x[:rows]).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("model_class", MODELS)
def test_compiled_in_one_graph_with_the_same_result(model_class: type[nn.Module], backend: str) -> None:
    model, x = model_class(), model_class.example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(model, backend=backend)(x)  # code compiled before the hooks came must not run on without them
        quantized = hooked(model, x)
        expected = model(x)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected)
    with quantized.disabled():
        assert not torch.equal(model(x), expected)
    assert quantized.drift == []
    torch._dynamo.reset()


def test_compiled_graphs_run_without_the_mode_and_what_is_between_them_with_it() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x) + 1.0
            torch._dynamo.graph_break()
            return self.head(self.second(self.eagerly(y)))

        @torch._dynamo.disable
        def eagerly(self, y: Tensor) -> Tensor:
            return F.linear(y, self.second.weight)

    modes = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            modes.append(torch._C._len_torch_function_stack())
            return graph(*args)

        return run

    model, x = Broken(), torch.randn(3, 4)
    quantized = hooked(model, x)
    expected = model(x)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)
    assert len(modes) >= 4
    assert set(modes) == {0}
    assert quantized.drift == []
    torch._dynamo.reset()


def test_compiled_submodule_inside_an_eager_model() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x + 1.0
            y = self.body(y) + y
            return self.head(torch.relu(y + x))

    model, x = Outer(), torch.randn(3, 4)
    quantized = hooked(model, x)
    expected = model(x)
    model.body.compile(backend="eager")
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)
    assert quantized.drift == []
    torch._dynamo.reset()


def test_copies_and_pickles_of_a_hooked_model_are_plain() -> None:
    model, x = ResidualCNN(), ResidualCNN.example()
    plain = copy.deepcopy(model).eval()
    hooked(model, x)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(x), plain(x))


def test_a_users_hook_that_raises_leaves_a_working_model() -> None:
    model, x = ResidualCNN(), ResidualCNN.example()
    quantized = hooked(model, x)
    expected = model(x)

    def fail(*args: object) -> None:
        raise ValueError("mine")

    for register in (model.blocks[0].register_forward_hook, model.blocks[1].register_forward_pre_hook):
        handle = register(fail)
        with pytest.raises(ValueError, match="mine"):
            model(x)
        handle.remove()
        assert torch._C._len_torch_function_stack() == 0
        assert torch.equal(model(x), expected)
    handle = model.blocks[0].register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(ValueError, match="mine"):
        model(x)
    handle.remove()
    assert torch.equal(model(x), expected)
    assert quantized.drift == []


def test_keyboard_interrupt_is_cleaned_up_by_reset() -> None:
    model, x = ResidualCNN(), ResidualCNN.example()
    quantized = hooked(model, x)
    expected = model(x)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[0].conv2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    quantized.runtime.frames.reset()
    assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(model(x), expected)


class FactorAndMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.factor, self.mask = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.exp(torch.relu(self.first(x)) * self.factor + self.mask))


@pytest.mark.parametrize(("name", "value"), [("factor", math.inf), ("factor", -math.inf), ("mask", math.inf), ("mask", math.nan)])
def test_infinite_parameters_that_no_mask_has_are_named(name: str, value: float) -> None:
    """Also in the tail, where nothing is rounded."""
    model, x = FactorAndMask().eval(), torch.randn(4, 8)
    quantized = quantize(model, None, (x,))
    getattr(model, name).data[2] = value
    with pytest.raises(CCOError, match=f"parameter '{name}'"):
        quantized.calibrate([x])


class Normed(nn.Module):
    """A norm, and a buffer of which some values are not there and none is read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("table", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.nan_to_num(self.table, 1.0) - 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("running_mean", math.nan, "NaN or infinite"),
        ("running_var", math.nan, "NaN or infinite"),
        ("running_var", math.inf, "NaN or infinite"),
        ("running_var", -1.0, "negative"),
    ],
)
def test_running_statistics_that_can_not_be_are_named(name: str, value: float, said: str, training: bool) -> None:
    model, x = Normed().train(training), torch.randn(4, 8)
    getattr(model.body[1], name)[2] = value
    with pytest.raises(CCOError, match=rf"buffer 'body\.1\.{name}' of layer 'batch_norm' holds {said}"):
        quantize(model, None, (x,)).calibrate([x])


def test_a_buffer_that_is_not_a_number_is_the_same_after_a_forward() -> None:
    """It equals nothing, not even itself, and was taken for what a forward goes on from in the next one."""
    model, x = Normed().eval(), torch.randn(4, 8)
    expected = quantize(model, None, (x,))
    layers = [layer.kind for layer in expected.graph]
    expected.remove()
    model.table[2] = math.nan
    quantized = quantize(model, None, (x,))
    assert [layer.kind for layer in quantized.graph] == layers
    quantized.calibrate([x])


def test_a_buffer_that_is_not_a_number_is_named_where_a_layer_makes_more_of_it() -> None:
    model, x = FactorAndMask().eval(), torch.randn(4, 8)
    del model.factor
    model.register_buffer("factor", torch.full((8,), math.nan))
    quantized = quantize(model, None, (x,))
    with pytest.raises(CCOError, match=r"gave NaN .* buffers of the model 'factor'"):
        quantized.calibrate([x])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_name_the_layer(value: float) -> None:
    model, x = GuideCNN().eval(), GuideCNN.example()
    quantized = quantize(model, None, (x,))
    model.conv2.bias.data[0] = value
    with pytest.raises(CCOError, match=r"conv_1|relu_1"):
        quantized.calibrate([(x,)])


def test_bad_weights_name_the_parameter() -> None:
    model, x = GuideCNN().eval(), GuideCNN.example()
    quantized = quantize(model, None, (x,))
    model.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(CCOError, match=r"fc1\.weight.*linear"):
        quantized.calibrate([(x,)])


def test_no_batch_is_an_error() -> None:
    with pytest.raises(CCOError, match="no batch"):
        quantize(GuideCNN().eval(), None, (GuideCNN.example(),)).calibrate([])


def test_all_zero_input_is_quantized_to_zero() -> None:
    model, x = GuideCNN().eval(), torch.zeros(2, 1, 8, 8)
    with pytest.warns(CCOWarning, match="nothing but zeros came out of 'input_0'"):
        quantized = hooked(model, x)
    assert torch.isfinite(model(x)).all()
    assert quantized.activations["input_0"](x).eq(0).all()


def test_no_float_parameters() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    with pytest.raises(CCOError, match="no floating-point parameter"):
        quantize(Sum(), None, (torch.ones(2),))


def test_sensitivity_needs_calibration() -> None:
    with pytest.raises(CCOError, match="calibrate"):
        quantize(GuideCNN().eval(), None, (GuideCNN.example(),)).sensitivity([])


def test_replanning_keeps_the_ranges_of_what_stays() -> None:
    model, x = GuideCNN(), GuideCNN.example()
    quantized = hooked(model, x)
    before = float(quantized.activations["relu"].scale)
    new = quantized.replan({"layer_settings": [{"match": "linear", "skip_quantization": True}]})
    assert "linear" not in quantized.plan.quantized
    assert float(quantized.activations["relu"].scale) == before
    assert new == []  # the relu after the float linear is computed in float
    new = quantized.replan({"layer_settings": [{"match": "relu_1", "activations_num_bits": 4}]})
    assert new == ["relu_1", "relu_2"]  # of other bits, and back again
    quantized.calibrate([(x,)], only=new)
    assert float(quantized.activations["relu"].scale) == before
    assert torch.isfinite(model(x)).all()


def test_state_moves_to_another_process_and_refuses_another_architecture() -> None:
    model, x = ResidualCNN(), ResidualCNN.example()
    quantized = hooked(model, x)
    state = quantized.state_dict()
    twin = ResidualCNN()
    twin.load_state_dict(model.state_dict())
    other = quantize(twin.eval(), None, (x,))
    assert other.load_state_dict(state) == []
    assert torch.equal(twin(x), model(x))
    with pytest.raises(CCOError, match="another architecture"):
        quantize(GuideCNN().eval(), None, (GuideCNN.example(),)).load_state_dict(state)


def test_changed_settings_are_reported_on_loading() -> None:
    model, x = GuideCNN(), GuideCNN.example()
    state = hooked(model, x).state_dict()
    other = quantize(GuideCNN().eval(), {"layer_settings": [{"match": "conv_1", "skip_quantization": True}]}, (x,))
    assert any("conv_1" in difference for difference in other.load_state_dict(state))


def test_rounding_fresh_results_in_place_changes_no_value_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model, x = TokenModel(), TokenModel.example()
        quantized = quantize(model, None, (x,))
        quantized.calibrate([(x,)])
        if not in_place:
            for node in quantized.capture.root.walk():
                for table in node.tables.values():
                    for entry in table.values():
                        for site in entry.sites.values():
                            site.fresh = False
        output = model(x)
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_ranges_move_once_the_weights_have_changed_and_are_saved_moved() -> None:
    torch.manual_seed(0)
    model, x = GuideCNN(), GuideCNN.example()
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    start = quantized.activations["relu"].max_val.clone()
    (model(3 * x).sum() + model(3 * x).sum()).backward()
    assert quantized.activations["relu"].max_val == start  # two forwards of one step
    optimizer.step()
    with torch.no_grad():
        model(x)
    moved = quantized.activations["relu"].max_val.clone()
    assert moved > start
    model.train()(9 * x)
    assert float(quantized.state_dict()["ranges"]["relu"]["max_val"]) > float(moved)


def test_a_computation_called_more_often_is_reported_and_what_only_moves_values_is_not() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.times = nn.Linear(4, 4), nn.Linear(4, 4), 1

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(self.times):
                x = F.gelu(torch.tanh(x.reshape(-1, 4).softmax(-1)))
            return self.second(x)

    model, x = Loop().eval(), torch.randn(2, 4)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    model.times = 3
    with pytest.warns(CCOWarning, match="more often"):
        model(x)
    told = " ".join(quantized.drift)
    assert all(kind in told for kind in ("softmax", "tanh", "gelu"))
    assert "reshape" not in told
