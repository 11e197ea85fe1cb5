"""The layer graph says what a forward does, whatever the mode, and leaves the model as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import GuideCNN, ResidualCNN, TokenModel
from torch import Tensor, nn

from lightning_cco.errors import CCOError
from lightning_cco.graph.attention import multi_head_attention
from lightning_cco.graph.capture import capture, capture_graph


def names(model: nn.Module, *args: Tensor) -> list[str]:
    return list(capture_graph(model, *args).names)


def test_names_follow_the_guide() -> None:
    graph = capture_graph(GuideCNN(), GuideCNN.example())
    shown = [layer.name for layer in graph if layer.kind != "dropout"]
    assert shown == ["input_0", "conv", "relu", "conv_1", "relu_1", "max_pool", "flatten", "linear", "relu_2", "linear_1", "output_0"]
    assert [layer.name for layer in graph if layer.kind == "dropout"] == ["dropout", "dropout_1"]
    assert graph.tail() == {"linear_1"}
    assert graph["conv_1"].path == "conv2"
    assert graph["conv_1"].attributes["kernel_size"] == (3, 3)
    assert graph["conv_1"].input_shapes == ((2, 4, 6, 6),)
    assert graph["conv_1"].output_shapes == ((2, 8, 4, 4),)
    assert graph["conv_1"].parameters == ("conv2.weight", "conv2.bias")


def test_edges_follow_tensors_through_a_residual_block() -> None:
    graph = capture_graph(ResidualCNN(), ResidualCNN.example())
    assert set(graph.predecessors("add")) == {"batch_norm_2", "relu"}
    assert graph.successors("add") == ("relu_2",)
    assert graph.inputs == ("input_0",)
    assert graph.outputs == ("output_0",)


@pytest.mark.parametrize("model_class", [GuideCNN, ResidualCNN, TokenModel])
def test_capture_leaves_no_trace(model_class: type[nn.Module]) -> None:
    model = model_class()
    model.train()
    next(iter(model.children())).eval()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    capture_graph(model, model_class.example())
    torch.set_rng_state(state)
    assert flags == [module.training for module in model.modules()]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_random_state_is_put_back() -> None:
    model = GuideCNN()
    example = GuideCNN.example()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    capture_graph(model, example)
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)


class TrainingNoise(nn.Module):
    """Adds an addition before another one while training: indices shift."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        if self.training:
            y = y + 0.1 * torch.randn_like(y)
        return self.fc2(y + x)


def test_a_call_that_only_training_makes_shifts_no_index() -> None:
    captured = capture(model := TrainingNoise(), lambda: model(torch.ones(2, 4)))
    assert captured.graph.names == ("input_0", "linear", "add", "linear_1", "output_0")
    assert captured.sites["add"].positions == {False: 0, True: 1}
    assert [call.op.kind for call in captured.training_only] == ["add"]
    assert captured.evaluation_only == []


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)


def test_parts_called_one_after_the_other_make_one_graph() -> None:
    model = EncoderDecoder()
    captured = capture(model, lambda: model.decoder(model.encoder(torch.ones(3, 4))))
    assert captured.graph.names == ("input_0", "linear", "linear_1", "output_0")
    assert captured.graph.successors("linear") == ("linear_1",)


def test_a_part_called_twice_is_one_set_of_layers() -> None:
    model = EncoderDecoder()
    captured = capture(model, lambda: (model.encoder(torch.ones(3, 4)), model.encoder(torch.zeros(3, 4))))
    assert [layer.kind for layer in captured.graph].count("linear") == 1


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.classes = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, image: Tensor) -> dict[str, object]:
        x = F.relu(self.body(image))
        return {"boxes": self.boxes(x).sigmoid(), "scores": (self.classes(x).softmax(-1),)}


def test_each_output_of_a_dictionary_ends_its_own_branch() -> None:
    graph = capture_graph(Dictionary(), image=torch.ones(2, 4))
    assert graph.tail() == {"linear_1", "sigmoid", "linear_2", "softmax"}
    assert [graph[name].attributes["key"] for name in graph.outputs] == ["boxes", "scores.0"]
    assert graph["input_0"].attributes["argument"] == "image"


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad


class WithCustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(Double.apply(self.fc1(x)) + x)


def test_a_custom_autograd_function_is_a_layer_with_a_reason() -> None:
    captured = capture(model := WithCustomFunction(), lambda: model(torch.ones(2, 4)))
    assert captured.graph.names == ("input_0", "linear", "custom_function", "add", "linear_1", "output_0")
    assert "Double" in captured.graph["custom_function"].note
    # The addition inside the function is seen at run time, so it counts.
    assert captured.sites["add"].positions[False] == 1


def doubled(ctx: object, x: Tensor, *more: object, scale: float = 2.0) -> Tensor:
    return x * scale


def logged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: object, **kwargs: object) -> Tensor:  # no functools.wraps
        return function(*args, **kwargs)

    return run


def custom_function(forward: Callable[..., Tensor], **methods: Callable[..., None]) -> type[torch.autograd.Function]:
    members = {"forward": staticmethod(forward), "backward": staticmethod(lambda ctx, grad: 2 * grad)}
    return type("Made", (torch.autograd.Function,), members | {name: staticmethod(method) for name, method in methods.items()})


CUSTOM_FUNCTIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "plain": lambda: custom_function(doubled).apply,
    "mixed precision": lambda: custom_function(torch.amp.custom_fwd(doubled, device_type="cpu")).apply,
    "decorated": lambda: custom_function(logged(doubled)).apply,
    "partial": lambda: custom_function(functools.partial(doubled, scale=2.0)).apply,
    "inherited": lambda: type("Heir", (custom_function(doubled),), {}).apply,
    "context apart": lambda: custom_function(lambda x: x * 2, setup_context=lambda ctx, inputs, output: None).apply,
    "helper": lambda: custom_function(lambda ctx, x: doubled(ctx, x)).apply,
    "made by the forward": lambda: lambda x: custom_function(lambda ctx, x: x * 2).apply(x),
}


@pytest.mark.parametrize("kind", CUSTOM_FUNCTIONS)
def test_what_a_custom_function_calls_is_no_layer_however_it_is_written(kind: str) -> None:
    class Model(WithCustomFunction):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(function(self.fc1(x)) + x)

    function, model = CUSTOM_FUNCTIONS[kind](), Model()
    captured = capture(model, lambda: model(torch.ones(2, 4)))
    assert captured.graph.names == ("input_0", "linear", "custom_function", "add", "linear_1", "output_0")
    assert [(edge.source, edge.destination) for edge in captured.graph.edges][:2] == [("input_0", "linear"), ("linear", "custom_function")]


def test_the_forward_of_a_custom_function_called_as_an_ordinary_one_is_the_users_code() -> None:
    class Model(WithCustomFunction):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(function.forward(None, self.fc1(x)) + x)

    function, model = custom_function(doubled), Model()
    assert capture(model, lambda: model(torch.ones(2, 4))).graph.names == ("input_0", "linear", "mul", "add", "linear_1", "output_0")


def test_masks_and_integers_are_told_apart_from_activations() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            scores = self.fc(x) + torch.zeros(4).masked_fill(mask, torch.finfo(torch.float32).min)
            return self.fc(scores.softmax(-1))

    graph = capture_graph(Masked(), torch.ones(2, 4), torch.tensor([False, True, False, False]))
    assert graph["input_1"].note == "integer"
    assert "mask" in graph["add"].note
    assert graph["softmax"].note == ""


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="self"),
        pytest.param({"kdim": 6, "vdim": 5}, id="cross"),
        pytest.param({"add_bias_kv": True}, id="bias_kv"),
        pytest.param({"add_zero_attn": True, "bias": False}, id="zero_attn"),
    ],
)
def test_attention_in_the_open_equals_pytorchs(
    need_weights: bool, causal: bool, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    query = torch.randn(3, 5, 8)
    key = torch.randn(3, 7, attention.kdim) if options.get("kdim") else query
    value = torch.randn(3, 7, attention.vdim) if options.get("vdim") else query
    length = key.shape[1]
    mask = torch.ones(5, length).triu(1).bool() if causal else None
    padding = torch.zeros(3, length, dtype=torch.bool)
    padding[:, -1] = True
    call = {"need_weights": need_weights, "attn_mask": mask, "key_padding_mask": padding}
    expected, expected_weights = attention(query, key, value, **call)
    monkeypatch.setattr(F, "multi_head_attention_forward", multi_head_attention)
    output, weights = attention(query, key, value, **call)
    torch.testing.assert_close(output, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)


def test_a_forward_that_fails_says_what_to_write() -> None:
    with pytest.raises(CCOError, match=r"GuideCNN.*forward failed.*forward_fn"):
        capture_graph(GuideCNN(), torch.ones(1, 3, 8, 8))


def test_a_model_without_layers_is_an_error() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(CCOError, match="no layer was captured"):
        capture_graph(Nothing(), torch.ones(2))


def test_a_tensor_that_the_module_keeps_is_an_input_where_the_model_is_called_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model.example_input_array = torch.randn(3, 4)
    expected = capture_graph(model, torch.randn(3, 4))
    captured = capture_graph(model, model.example_input_array)
    assert [*captured] == [*expected]
    assert captured.edges == expected.edges


@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("part", [False, True])
def test_a_compiled_model_is_captured_as_it_is(part: bool, run_before: bool) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), torch.randn(2, 3, 8, 8)
    kinds = [layer.kind for layer in capture_graph(model, x)]
    if part:
        compiled = nn.Sequential(torch.compile(model[:2], backend="eager"), *model[2:])
    else:
        compiled = torch.compile(model, backend="eager")
    if run_before:
        compiled(x)
    assert [layer.kind for layer in capture_graph(compiled, x)] == kinds
    torch.compiler.reset()
