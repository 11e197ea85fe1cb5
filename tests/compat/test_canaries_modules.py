"""Each private API of PyTorch about modules, checkpoints, the compiler and who calls is there, and does what we take it to do."""

from __future__ import annotations

import importlib.util
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from canary import tries
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_cco.compat import autograd, callers, checkpointing, dynamo, modules, operators, recurrent


def frame_of(code: Any) -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


class Seeing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.frame: FrameType | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.frame = frame_of(modules.MODULE_CALL)
        return self.norm(x)


@tries(
    "torch.nn.Module._call_impl.__code__",
    "torch.nn.Module._call_impl.f_locals",
    "torch.nn.Module._forward_pre_hooks",
    "torch.nn.Module._forward_hooks",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch.nn.Module._parameters",
    "torch.nn.Module._buffers",
    "torch.nn.Module._modules",
    "torch.nn.modules.batchnorm._BatchNorm",
)
def test_modules() -> None:
    module = Seeing()
    module(torch.randn(3, 2))
    assert module.frame is not None
    assert modules.called_module(module.frame) is module

    def hook(module: nn.Module, args: Any) -> None:
        return None

    module.register_forward_pre_hook(hook)
    assert list(modules.forward_pre_hooks(module)) == [hook]
    assert hook in modules.hooks_of(module)

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        return None

    module.register_forward_hook(behind)
    assert list(modules.forward_hooks(module)) == [behind]
    everywhere = nn.modules.module.register_module_forward_hook(behind), nn.modules.module.register_module_forward_pre_hook(hook)
    assert list(modules.global_forward_hooks()) == [behind, hook]
    for handle in everywhere:
        handle.remove()
    assert not list(modules.global_forward_hooks())
    assert "running_mean" in modules.buffers_of(module.norm)
    held = [vars(module.norm)[name] for name in modules.CONTENTS]
    assert list(held[0]) == ["weight", "bias"]
    assert "running_mean" in held[1]
    assert vars(module)[modules.CONTENTS[2]] == {"norm": module.norm}
    norms = (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2))
    assert all(isinstance(norm, modules.BatchNormBase) for norm in norms)
    assert not isinstance(nn.GroupNorm(1, 2), modules.BatchNormBase)


@tries("torch.utils.checkpoint._checkpoint_hook", "torch.utils.checkpoint._checkpoint_hook.__init__.frame.recompute_fn")
def test_a_checkpoint_keeps_the_function_that_it_runs_again() -> None:
    replaced: list[str] = []

    def part(x: Tensor) -> Tensor:
        hooks = autograd.saved_hooks_on_top(False)
        if not replaced:
            assert hooks[0].__qualname__ == checkpointing.PACK_HOOK
            owner, attribute = checkpointing.pack_hook_frame(hooks[0])
            inner = getattr(owner, attribute)
            setattr(owner, attribute, lambda *args: replaced.append("again") or inner(*args))
        replaced.append("run")
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(part, x, use_reentrant=False).sum().backward()
    assert replaced == ["run", "again", "run"]


@tries("torch.utils.checkpoint.CheckpointFunction.forward.__code__", "torch.utils.checkpoint.CheckpointFunction.forward.ctx.run_function")
def test_a_reentrant_checkpoint_does_as_well() -> None:
    replaced: list[str] = []

    def part(x: Tensor) -> Tensor:
        frame = frame_of(checkpointing.REENTRANT_FORWARD)
        if frame is not None:
            found = checkpointing.reentrant_context(frame)
            assert found is not None
            inner = getattr(*found)
            setattr(*found, lambda *args: replaced.append("again") or inner(*args))
        replaced.append("run")
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(part, x, use_reentrant=True).sum().backward()
    assert replaced == ["run", "again", "run"]


@tries(
    "torch._tensor",
    "torch._jit_internal",
    "torch._ops",
    "torch._library.custom_ops",
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "torch._subclasses",
    "torch._higher_order_ops",
    "torch._decomp",
    "torch.fx.GraphModule.<eval_with_key>",
    "torch.fx.GraphModule.forward.f_locals",
    "torch._inductor.torchinductor",
)
def test_who_calls() -> None:
    assert all(importlib.util.find_spec(name) for name in (*callers.LOOK_FURTHER, *callers.MACHINERY))
    seen: list[FrameType] = []

    def leaf(x: Tensor) -> Tensor:
        seen.append(sys._getframe(1))
        return x

    graph = torch.fx.Graph()
    graph.output(graph.call_function(leaf, (graph.placeholder("x"),)))
    module = torch.fx.GraphModule(nn.Module(), graph)
    module(torch.ones(2))
    assert seen[0].f_code.co_filename.startswith(callers.FX_FILE)
    assert seen[0].f_locals["self"] is module
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert callers.INDUCTOR_FILE in default_cache_dir()


found_graphs: list[Any] = []


@torch.compiler.assume_constant_result
def note_graph() -> bool:
    found_graphs.append(dynamo.graph_being_traced())
    return True


@tries(
    "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx",
    "torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer",
)
def test_the_graph_that_is_compiled() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        return graph.forward

    @torch.compile(backend=backend)
    def function(x: Tensor) -> Tensor:
        return x + 1 if note_graph() else x

    assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    assert callable(found_graphs[0].compiler_fn)
    assert dynamo.graph_being_traced() is None
    assert dynamo.without_side_effect_checks is not None
    assert dynamo.without_side_effect_checks(lambda x: x + 1, 1) == 2


@tries("torch._guards.TracingContext.extract_stack")
def test_the_line_that_is_compiled() -> None:
    def function(x: Tensor) -> Tensor:
        x = x + 1 if dynamo.traced_line() == first else x
        return x + 10 if dynamo.traced_line() == second else x

    first, second = (f"{__file__}:{function.__code__.co_firstlineno + number}" for number in (1, 2))
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [12.0, 12.0]
    assert dynamo.traced_line() == ""


@tries(
    "torch._ops.OpOverload",
    "torch._ops.OpOverloadPacket",
    "torch._ops.OpOverload._schema",
    "torch._ops.OpOverloadPacket._qualified_op_name",
    "torch.ops.aten._linalg_check_errors.default",
)
def test_operators() -> None:
    inverse = make_fx(torch.linalg.inv)(torch.eye(2))
    assert operators.check_of_inverses in [node.target for node in inverse.graph.nodes]
    assert isinstance(torch.ops.aten.add.Tensor, operators.OpOverload)
    assert isinstance(torch.ops.aten.add, operators.OpOverloadPacket)
    assert torch.ops.aten.add.Tensor._schema.name == torch.ops.aten.add._qualified_op_name == "aten::add"


@tries(
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._decomp.decomposition_table",
    "torch._ops.OpOverload.py_kernels",
    "torch._ops.OpOverload._dispatch_cache",
)
@pytest.mark.parametrize(
    "layer", [nn.LSTM(3, 4, 2, bidirectional=True), nn.LSTM(3, 4, proj_size=2), nn.GRU(3, 4, batch_first=True), nn.RNN(3, 4)]
)
@pytest.mark.filterwarnings("ignore:.*assigned during export", "ignore:.*oneDNN")
def test_recurrent_layers_are_traced_by_their_shapes(layer: nn.Module) -> None:
    """As PyTorch has them, in one operation, of sequences whose steps would take an hour."""
    before = {overload: dict(overload.py_kernels) for overload in recurrent._OVERLOADS}
    with recurrent.shapes_of_sequences():
        program = torch.export.export(layer, (torch.zeros(500_000, 2, 3),))
    assert [node.target for node in program.graph.nodes if node.target in recurrent._OVERLOADS]
    assert before == {overload: dict(overload.py_kernels) for overload in recurrent._OVERLOADS}
    x = torch.randn(5, 2, 3)
    with recurrent.shapes_of_sequences(), FakeTensorMode(allow_non_fake_inputs=True) as mode, enable_python_dispatcher():
        seen = layer(mode.from_tensor(x))
        assert all(
            tuple(found.shape) == tuple(wanted.shape) and found.stride() == wanted.stride()
            for found, wanted in zip(tree_leaves(seen), tree_leaves(layer(x)), strict=True)
        )
    with recurrent.shapes_of_sequences():
        torch.testing.assert_close(layer(x), layer(x))
        assert bool(layer(x)[0].any())
