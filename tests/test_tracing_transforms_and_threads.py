"""A hooked model under somebody else's tracing, transforms, threads and interrupts: the values of the quantized model, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_cco import CCOError, QuantizedModel, quantize
from lightning_cco.export.step_network import network_of_the_step


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 160), nn.Tanh(), nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 3)).eval()


def prepared() -> tuple[nn.Module, torch.Tensor, QuantizedModel, torch.Tensor]:
    model = network()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    with torch.no_grad():
        expected = model(x)
    return model, x, quantized, expected


TRACERS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "jit.trace": lambda m, x: torch.jit.trace(m, (x,))(x),
    "make_fx": lambda m, x: make_fx(m)(x)(x),
    "make_fx_fake": lambda m, x: make_fx(m, tracing_mode="fake", _allow_non_fake_inputs=True)(x)(x),
    "make_fx_symbolic": lambda m, x: make_fx(m, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)(x),
    "make_fx_pre_dispatch": lambda m, x: make_fx(m, pre_dispatch=True)(x)(x),
    "fx": lambda m, x: torch.fx.symbolic_trace(m)(x),
    "export": lambda m, x: torch.export.export(m, (x,), strict=False).module()(x),
    "export, decomposed": lambda m, x: torch.export.export(m, (x,), strict=False).run_decompositions({}).module()(x),
    "vmap": lambda m, x: vmap(m)(x),
    "functional_call": lambda m, x: functional_call(m, dict(m.named_parameters()), (x,)),
    "jvp": lambda m, x: jvp(m, (x,), (x,))[0],
}


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_grad"])
@pytest.mark.parametrize("name", TRACERS)
def test_tracers_see_the_quantized_values(name: str, gradients: bool) -> None:
    model, x, _, expected = prepared()
    with torch.set_grad_enabled(gradients):
        got = TRACERS[name](model, x)
        assert torch.equal(got.detach(), expected)
        assert torch.equal(model(x).detach(), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_pytorchs_own_onnx_exporters_write_the_quantized_values(dynamo: bool, tmp_path: Path) -> None:
    model, x, _, expected = prepared()
    torch.onnx.export(model, (x,), str(tmp_path / "a.onnx"), dynamo=dynamo, **({"verbose": False} if dynamo else {"opset_version": 17}))
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(got), expected, atol=1e-4)


class Functional(nn.Module):
    """Rounds what it computes between its modules, which a graph of `torch.fx` that calls these modules does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)) + x)


@pytest.mark.parametrize("inside", [False, True])
def test_a_graph_that_leaves_out_what_is_between_modules_is_refused(inside: bool) -> None:
    model, x = nn.Sequential(Functional(), nn.Linear(6, 3)) if inside else Functional(), torch.randn(8, 6)
    before = torch.fx.symbolic_trace(model)
    quantized = quantize(model.eval(), None, (x,))
    quantized.calibrate([x])
    with pytest.raises(CCOError, match=r"torch\.fx.*make_fx"):
        torch.fx.symbolic_trace(model)(x)
    graph = before
    with pytest.raises(CCOError, match=r"graph of torch\.fx.*make_fx"):
        graph(x)
    expected = model(x)
    quantized.remove()
    assert torch.allclose(graph(x), expected, atol=0.1)


WEIGHTS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "4 bits": {"global_quantization_settings": {"weights_num_bits": 4, "activations_num_bits": 4}},
    "learned": {"training_settings": {"weight_estimator": "learned", "range_estimator": "learned"}},
    "groups": {"global_quantization_settings": {"weights_num_bits": 4, "weights_group_size": 32, "weights_symmetric": False}},
    "dynamic": {"global_quantization_settings": {"weights_num_bits": 4, "weights_group_size": 32, "activations_dynamic": True}},
}


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("settings", WEIGHTS)
def test_a_graph_follows_the_weights_and_has_their_gradients(settings: str, pre_dispatch: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(8, 32)
    quantized = quantize(model, WEIGHTS[settings], (x,))
    quantized.calibrate([x])
    graph = make_fx(lambda parameters, x: functional_call(model, parameters, (x,)), pre_dispatch=pre_dispatch)(
        dict(model.named_parameters()), x
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(model(x).sum(), list(parameters.values()))
    found = torch.autograd.grad(graph(parameters, x).sum(), list(parameters.values()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_transforms_differentiate_as_autograd_does() -> None:
    model, x, _, _ = prepared()
    parameters = dict(model.named_parameters())
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    jacobian = torch.stack([torch.autograd.grad(y[:, k].sum(), leaf, retain_graph=True)[0] for k in range(3)], 1)
    samples = []
    for sample in x.split(1):
        samples.append(torch.autograd.grad(model(sample).sum(), model[0].weight)[0])

    def total(weights: Any, sample: torch.Tensor) -> torch.Tensor:
        return functional_call(model, weights, (sample,)).sum()

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    for got, expected in (
        (vmap(grad(total), (None, 0))(parameters, x)["0.weight"], torch.stack(samples)),
        (grad(total)(parameters, x)["0.weight"], torch.stack(samples).sum(0)),
        (jacrev(model)(x[0]), jacobian[0]),
        (torch.autograd.functional.jacobian(model, x[:1], vectorize=True)[0, :, 0], jacobian[0]),
        (jvp(model, (x,), (torch.ones_like(x),))[1], jacobian.sum(-1)),
        (tangent, jacobian.sum(-1)),
    ):
        assert torch.allclose(got, expected, atol=1e-5)


def test_ranges_follow_per_sample_gradients() -> None:
    ranges = []
    for per_sample in (False, True):
        model, x, quantized, _ = prepared()
        model.train()
        parameters = dict(model.named_parameters())
        if per_sample:
            vmap(grad(lambda w, z: functional_call(model, w, (z,)).sum()), (None, 0))(parameters, 3.0 * x)  # noqa: B023
        else:
            model(3.0 * x)
        quantized.update_ranges()
        ranges.append([float(q.scale) for q in quantized.activations.values()])
    assert ranges[0] == ranges[1]


def test_tracing_moves_no_range() -> None:
    model, x, quantized, expected = prepared()
    model.train()
    make_fx(model)(10.0 * x)
    quantized.update_ranges()
    assert torch.equal(model(x).detach(), expected)


def test_counting_operations_changes_nothing() -> None:
    model, x, _, expected = prepared()
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        y.sum().backward()
    assert torch.equal(y.detach(), expected)
    assert counter.get_total_flops() > 0


def test_scripting_is_refused() -> None:
    with pytest.raises(CCOError, match=r"can't be scripted.*remove\(\) first"):
        torch.jit.script(prepared()[0])


def test_quantizing_twice_is_refused_until_removed() -> None:
    model, x, quantized, _ = prepared()
    for target in (model, nn.Sequential(model)):
        with pytest.raises(CCOError, match=r"quantized already.*\.remove\(\)"):
            quantize(target, None, (x,))
    quantize(copy.deepcopy(model), None, (x,))
    quantized.remove()
    quantize(model, None, (x,)).remove()


class Interrupted(nn.Module):
    """Two blocks, of which the second may be interrupted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = network(1), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        self.error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError])
@pytest.mark.parametrize("place", ["second.1", "second", "first.3"])
@pytest.mark.parametrize("what", ["forward", "calibrate", "sensitivity", "disabled"])
def test_interrupts_leave_nothing(error: type[BaseException], place: str, what: str) -> None:
    torch.manual_seed(0)
    model, x = Interrupted().eval(), torch.randn(8, 6)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    with torch.no_grad():
        expected = model(x)

    def interrupt(*_: Any) -> None:
        raise error

    handle = model.get_submodule(place).register_forward_pre_hook(interrupt)
    caught = None
    try:
        {"forward": lambda: model(x), "calibrate": lambda: quantized.calibrate([x]), "sensitivity": lambda: quantized.sensitivity([x])}.get(
            what, lambda: floats(quantized, model, x)
        )()
    except error as raised:
        caught = raised  # keeps the Python frames alive, as an interactive session does
    handle.remove()
    with torch.no_grad():
        inner = model.second[0](torch.ones(1, 3))  # a part of it by itself, from within no module
        assert torch.equal(model(x), expected)
        assert torch.equal(model.second[0](torch.ones(1, 3)), inner)
    assert torch._C._len_torch_function_stack() == 0
    assert caught is not None
    assert quantized.drift == []
    assert not model.training


def floats(quantized: QuantizedModel, model: nn.Module, x: torch.Tensor) -> None:
    with quantized.disabled():
        model(x)


def test_no_mode_is_left_when_the_interrupt_is_over() -> None:
    model, x, _, _ = prepared()
    handle = model[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with contextlib.suppress(KeyboardInterrupt):
        model(x)
    handle.remove()
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("what", ["capture", "step of the export"])
def test_no_mode_is_left_of_an_interrupt_under_a_mode_of_our_own(what: str) -> None:
    """PyTorch's modes take off the topmost one when they end, which is not theirs then."""
    model, x, quantized, _ = prepared()
    if what == "capture":
        quantized.remove()
    handle = model[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(model, None, (x,)) if what == "capture" else network_of_the_step(quantized, lambda part, batch: part(batch + 1).sum(), x)
    handle.remove()
    assert torch._C._len_torch_function_stack() == 0


class Other(TorchFunctionMode):
    """A function mode of the user's own."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return func(*args, **kwargs or {})


def modes() -> list[Any]:
    return [torch._C._get_function_stack_at(number) for number in range(torch._C._len_torch_function_stack())]


AROUND: dict[str, Callable[[], list[Any]]] = {
    "device": lambda: [torch.device("meta")],
    "mode": lambda: [Other()],
    "two": lambda: [torch.device("meta"), Other()],
    "twice": lambda: [one := Other(), one],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", AROUND)
def test_an_interrupt_leaves_no_mode_of_a_block_around_the_call(kind: str, training: bool) -> None:
    """PyTorch takes off the innermost mode at the end of such a block: after Ctrl-C that was ours, and the block's own stayed for good."""
    model, x, _, expected = prepared()
    handle = model[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with torch.set_grad_enabled(training), contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as blocks:
        for block in AROUND[kind]():
            blocks.enter_context(block)
        model(x)
    assert modes() == []
    assert torch.zeros(1).device.type == "cpu"
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_blocks_that_go_on_after_an_interrupt_keep_their_modes() -> None:
    model, x, _, expected = prepared()
    handle = model[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    outer, inner, kept = Other(), Other(), None
    with outer:
        try:
            with inner:
                model(x)
        except KeyboardInterrupt as error:
            kept = error  # as a notebook does, so that nothing of the call ends
        handle.remove()
        with Other() as later, torch.no_grad():
            assert torch.equal(model(x), expected)
            assert modes() == [outer, later]
        assert modes() == [outer]
    assert modes() == []
    assert kept is not None


def test_an_interrupt_of_a_module_that_runs_without_the_mode_leaves_the_block_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(8, 6)
    quantize(model, None, (x,)).calibrate([x])
    for module in model:
        handle = module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with Other() as mode:
            with contextlib.suppress(KeyboardInterrupt):
                model(x)
            assert modes() == [mode]
        assert modes() == []
        handle.remove()


def test_disabled_in_overlapping_threads() -> None:
    model, x, quantized, expected = prepared()
    inside, leave = threading.Event(), threading.Event()
    seen: dict[str, torch.Tensor] = {}

    def work() -> None:
        with torch.no_grad(), quantized.disabled():
            inside.set()
            leave.wait()
            seen["inside"] = model(x)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    with torch.no_grad():
        outside = model(x)
        with quantized.disabled():
            leave.set()
            thread.join()
            ours = model(x)
        after = model(x)
    quantized.remove()
    with torch.no_grad():
        float_output = model(x)
    assert all(torch.equal(got, expected) for got in (outside, after))
    assert all(torch.equal(got, float_output) for got in (seen["inside"], ours))


def test_disabled_in_overlapping_tasks_and_generators() -> None:
    """Blocks that end in another order than they began, or in another thread, leave nothing behind."""
    model, x, quantized, expected = prepared()

    def is_rounded() -> bool:
        with torch.no_grad():
            return torch.equal(model(x), expected)

    async def inside(seconds: float) -> bool:
        with quantized.disabled():
            await asyncio.sleep(seconds)
            return is_rounded()

    async def outside() -> bool:
        await asyncio.sleep(0.001)
        return is_rounded()

    async def tasks() -> list[bool]:
        return await asyncio.gather(inside(0.002), outside(), inside(0.02))

    def generator() -> Iterator[None]:
        with quantized.disabled():
            yield

    assert asyncio.run(tasks()) == [False, True, False]
    assert is_rounded()
    first, second = generator(), generator()
    next(first), next(second)
    first.close()
    assert not is_rounded()
    thread = threading.Thread(target=second.close)
    thread.start()
    thread.join()
    assert is_rounded()
    quantized.remove()
