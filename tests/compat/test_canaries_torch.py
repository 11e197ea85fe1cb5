"""Each private API of PyTorch that is asked at a torch call is there, and does what we take it to do."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from canary import tries
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_cco.compat import autograd, torch_modes


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@tries(
    "torch._C._len_torch_function_stack",
    "torch._C._get_function_stack_at",
    "torch._C._pop_torch_function_stack",
    "torch._C._push_on_torch_function_stack",
)
def test_the_stack_of_function_modes() -> None:
    outer, inner = Mode(), Mode()
    with outer, inner:
        assert torch_modes.function_mode_count() == 2
        assert [torch_modes.function_mode_at(depth) for depth in range(2)] == [outer, inner]
        torch_modes.pop_function_mode()
        assert torch_modes.function_mode_count() == 1
        torch_modes.push_function_mode(inner)
        assert torch_modes.function_mode_at(1) is inner
    assert torch_modes.function_mode_count() == 0


@tries("torch._C._is_tracing")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_jit_tracing() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch_modes.is_jit_tracing())
        return x + 1

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert seen == [True]
    assert not torch_modes.is_jit_tracing()


@tries(
    "torch._C._len_torch_dispatch_stack",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "torch.utils._python_dispatch.TorchDispatchMode._mode_key",
)
def test_dispatch_modes_and_which_of_them_trace() -> None:
    assert torch_modes.dispatch_mode_count() == 0
    with FlopCounterMode(display=False):
        assert torch_modes.dispatch_mode_count() == len(torch_modes.dispatch_modes()) == 1
        assert not torch_modes.values_are_traced()
    with FakeTensorMode():
        assert torch_modes.values_are_traced()
    seen: list[bool] = []
    make_fx(lambda x: seen.append(torch_modes.values_are_traced()) or x + 1)(torch.ones(2))
    assert seen == [True]
    assert not torch_modes.values_are_traced()


@tries("torch._C._dispatch_tls_is_dispatch_key_included", "torch._C.DispatchKey.PreDispatch", "torch._C._dispatch_key_parse")
def test_dispatch_keys() -> None:
    seen: list[bool] = []
    make_fx(lambda x: seen.append(torch_modes.dispatch_key_included(torch_modes.PRE_DISPATCH)) or x + 1, pre_dispatch=True)(torch.ones(2))
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(torch_modes.dispatch_key_included(torch_modes.VMAP_MODE)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [True, True]
    assert not torch_modes.dispatch_key_included(torch_modes.PRE_DISPATCH)
    assert not torch_modes.dispatch_key_included(torch_modes.VMAP_MODE)


@tries(
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.get_unwrapped",
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack",
)
def test_transforms() -> None:
    seen: list[Any] = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch_modes.functorch_level() is not None)
        seen.append(torch_modes.is_functorch_wrapped(x))
        values = torch_modes.functorch_value(x)
        seen.append(torch_modes.is_functorch_wrapped(values))
        with torch_modes.without_transforms():
            seen.append(torch_modes.functorch_level() is None and values.tolist() == [[0.0, 1.0], [2.0, 3.0]])
        return x + 1

    result = torch.vmap(function)(torch.arange(4.0).view(2, 2))
    assert seen == [True, True, False, True]
    assert result.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert torch_modes.functorch_level() is None
    assert not torch_modes.is_functorch_wrapped(result)


@tries("torch._C._current_graph_task_id")
def test_the_backward_that_runs() -> None:
    seen: list[int] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(autograd.graph_task()))
    (x * 2).sum().backward()
    assert autograd.graph_task() == -1
    assert seen[0] != -1


@tries("torch._C._autograd._top_saved_tensors_default_hooks", "torch._C._autograd._saved_tensors_hooks_is_enabled")
def test_hooks_for_saved_tensors() -> None:
    def pack(tensor: Tensor) -> Tensor:
        return tensor

    assert autograd.saved_hooks_on_top(False) is None
    assert autograd.saved_hooks_enabled()
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert autograd.saved_hooks_on_top(False)[0] is pack
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not autograd.saved_hooks_enabled()


@tries("torch._C._storage_Use_Count", "torch.UntypedStorage._cdata", "torch.Tensor._use_count")
def test_who_holds_memory() -> None:
    storage = torch.UntypedStorage(16, device="cpu")
    assert autograd.storage_holders(storage._cdata) == 1
    tensor = torch.empty(0).set_(storage, 0, (4,))
    assert autograd.storage_holders(storage._cdata) == 2
    before = autograd.tensor_holders(tensor)
    product = torch.ones(4, requires_grad=True) * tensor  # autograd saves it
    assert autograd.tensor_holders(tensor) > before
    del product
    assert autograd.tensor_holders(tensor) == before


@tries("torch._foreach_copy_")
@pytest.mark.parametrize("copy", [autograd.foreach_copy, autograd._copy_each])
def test_copying_lists(copy: Any) -> None:
    targets = [torch.zeros(2), torch.zeros(())]
    copy(targets, [torch.tensor([1.0, 2.0]), torch.tensor(3.0)])
    assert [target.tolist() for target in targets] == [[1.0, 2.0], 3.0]


@tries("torch.autograd.Function.forward.__code__", "torch.autograd.Function.forward.f_locals")
def test_custom_functions() -> None:
    seen: list[Any] = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            frame = sys._getframe()
            assert autograd.forwards_of_functions()[frame.f_code] is Twice
            seen.append(autograd.given_to(frame, Twice))
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    x = torch.ones(2, requires_grad=True)
    Twice.apply(x)
    Twice.forward(None, x)
    assert seen == [(x,), None]


@tries("torch.autograd.Function.__base__.apply")
def test_applying_plainly() -> None:
    calls: list[Any] = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
            calls.append(sys._getframe(1).f_code)
            return x * factor

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * 2, None

    x = torch.ones(2, requires_grad=True)
    apply = autograd.plain_apply(Twice)
    apply(x, 2.0).sum().backward()
    assert x.grad is not None
    assert (x.grad.tolist(), calls) == ([2.0, 2.0], [sys._getframe().f_code])


@tries(
    "torch.Tensor._version",
    "torch.Tensor._base",
    "torch.Tensor._is_view",
    "torch.Tensor._is_zerotensor",
    "torch.autograd.forward_ad._current_level",
)
def test_attributes_of_tensors() -> None:
    x = torch.ones(4)
    view = x.view(2, 2)
    version = x._version
    view.add_(1)
    assert x._version == version + 1
    assert view._is_view()
    assert view._base is x
    assert not x._is_view()
    assert x._base is None
    assert torch._efficientzerotensor(2)._is_zerotensor()
    assert not x._is_zerotensor()
    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0


@tries("torch.autograd.graph.Node._saved_result", "torch.autograd.graph.Node._saved_self", "torch.autograd.graph.Node._saved_dim")
def test_what_a_loss_takes_for_classes() -> None:
    scores = torch.randn(4, 5, 3, requires_grad=True)
    logs = torch.log_softmax(scores, -2)
    assert autograd.softmax_of(logs.grad_fn) == ((4, 5, 3), -2)
    assert autograd.softmax_of(torch.softmax(scores, 1).grad_fn) == ((4, 5, 3), 1)
    assert autograd.softmax_of(torch.logsumexp(scores, 1).grad_fn) == ((4, 5, 3), 1)
    picked = torch.nn.functional.nll_loss(logs[..., 0], torch.zeros(4, dtype=torch.long))
    assert autograd.softmax_of(picked.grad_fn) == ((4, 5), 1)
