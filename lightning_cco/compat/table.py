"""Every private API that the package relies on: what it is for, where it is read, and what happens without it.

`docs/compatibility.md` shows this table; `tests/compat` looks for private names that are not in it, and tries each one on the installed versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TESTED: dict[str, tuple[str, ...]] = {
    "torch": ("2.13.0", "2.14.1"),
    "lightning": ("2.6.6",),
    "torchmetrics": ("1.9.0",),
    "omegaconf": ("2.3.1",),
}
"""Versions, the oldest first, with which `tests/compat` has passed."""

_ERROR = "an error before a model is hooked, which names it"
_UNROLLED = "PyTorch computes the shapes step by step (export of long sequences takes hours)"
_ATTRIBUTE = "`AttributeError` at the first call, which names it"
_START = "`AttributeError` at the start of the training, which names it"
_VALUES = "outputs are distilled by their squared error, where `distillation_settings.loss` is `auto`"
_DRIFT = "calls that are not the model's are counted as its own, and reported as drift"
_COMPILER = "tells the compiler's calls", _DRIFT
_LOOKED_PAST = "looks further for who calls", "its caller is taken for the user's code"


@dataclass(frozen=True)
class PrivateApi:
    """One private API.

    Attributes:
        name: Dotted, the package first.
        read_in: The module of `compat` that reads it, and the files outside that do so in place, since they are asked at each torch call.
        purpose: What it is for.
        without: What happens with a version that lacks it.
    """

    name: str
    read_in: str
    purpose: str
    without: str

    @property
    def package(self) -> str:
        """The distribution that it belongs to."""
        return self.name.partition(".")[0]

    @property
    def in_place(self) -> tuple[str, ...]:
        """The files outside of `compat` that read it."""
        return tuple(place for place in self.read_in.split(", ") if "/" in place)


_MODES = (
    ("torch._C._len_torch_function_stack", "reads the stack of function modes", _ERROR),
    ("torch._C._get_function_stack_at", "reads the stack of function modes", _ERROR),
    ("torch._C._pop_torch_function_stack", "takes function modes off", _ERROR),
    ("torch._C._push_on_torch_function_stack", "puts function modes back", _ERROR),
    ("torch._C._is_tracing", "tells `torch.jit.trace`", "`torch.jit.is_tracing` (slower)"),
    ("torch._C._len_torch_dispatch_stack", "tells flop counters, fake tensors and `make_fx`", "kernels are never used (slower)"),
    ("torch.utils._python_dispatch._get_current_dispatch_mode_stack", "tells which dispatch modes trace", _ERROR),
    (
        "torch.utils._python_dispatch.TorchDispatchMode._mode_key",
        "the mark of modes that trace",
        "graphs of `make_fx` hold operations that nothing reads",
    ),
    ("torch._C._dispatch_tls_is_dispatch_key_included", "tells `torch.export` and vectorized autograd", _ERROR),
    ("torch._C.DispatchKey.PreDispatch", "the key of `torch.export`", _ERROR),
    ("torch._C._dispatch_key_parse", "the key of vectorized autograd", _ERROR),
    ("torch._C._functorch.peek_interpreter_stack", "tells the transforms of `torch.func`", _ERROR),
    ("torch._C._functorch.is_functorch_wrapped_tensor", "tells tensors that a transform has wrapped", _ERROR),
    ("torch._C._functorch.get_unwrapped", "the values inside of a wrapped tensor", _ERROR),
    ("torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack", "ranges follow under `torch.func`", _ERROR),
)
_AUTOGRAD = (
    ("torch._C._current_graph_task_id", "tells a backward from a forward", _ERROR),
    ("torch._C._autograd._top_saved_tensors_default_hooks", "tells a checkpoint's forward, and hooks of others", _ERROR),
    (
        "torch._C._autograd._saved_tensors_hooks_is_enabled",
        "tells where saved tensors may be replaced",
        "rounded weights are kept until the backward (memory)",
    ),
    ("torch._C._storage_Use_Count", "tells memory that may be overwritten", "new memory each time (slower)"),
    ("torch.Tensor._use_count", "tells gradients that may be overwritten", "new memory each time (slower)"),
    ("torch._foreach_copy_", "moves all ranges at once", "one by one (slower)"),
    ("torch.autograd.graph.Node._saved_result", "what a softmax in a step's loss gave", _VALUES),
    ("torch.autograd.graph.Node._saved_self", "what a step's loss has read", _VALUES),
    ("torch.autograd.graph.Node._saved_dim", "the dimension of the classes in a step's loss", "the last one"),
    ("torch.autograd.Function.forward.__code__", "tells calls inside of custom functions", "these count as layers of the model"),
    ("torch.autograd.Function.forward.f_locals", "what a custom function was called with", "these count as layers of the model"),
    ("torch.autograd.Function.__base__.apply", "quantizers skip a look for transforms", "`Function.apply` (slower)"),
)
_MODULES = (
    ("torch.nn.Module._call_impl.__code__", "finds the call of a module on the call stack", _ERROR),
    ("torch.nn.Module._call_impl.f_locals", "names the module that an error came out of", "it is not named"),
    ("torch.nn.Module._forward_hooks", "finds the user's hooks", "they see rounded tensors"),
    ("torch.nn.modules.module._global_forward_hooks", "finds hooks on all modules", "they see rounded tensors"),
    ("torch.nn.modules.module._global_forward_pre_hooks", "finds hooks on all modules", "they see rounded tensors"),
    ("torch.nn.Module._forward_pre_hooks", "finds the hooks of another quantized model", "a second `quantize` is not refused"),
    ("torch.nn.Module._parameters", "looks at other attributes alone", "what is there is looked at twice"),
    (
        "torch.nn.Module._modules",
        "puts replaced modules back; looks at other attributes alone",
        "they stay replaced; what is there is looked at twice",
    ),
    ("torch.nn.modules.batchnorm._BatchNorm", "tells batch norms", "PyTorch's four classes"),
)
_CHECKPOINTS = (
    ("torch.utils.checkpoint._checkpoint_hook", "tells a checkpoint's forward by its hook's name", _ERROR),
    (
        "torch.utils.checkpoint._checkpoint_hook.__init__.frame.recompute_fn",
        "runs a recomputation under the frames of its forward",
        "`ValueError` at it",
    ),
    ("torch.utils.checkpoint.CheckpointFunction.forward.__code__", "tells a reentrant checkpoint's forward", _ERROR),
    ("torch.utils.checkpoint.CheckpointFunction.forward.ctx.run_function", "the same as `recompute_fn`", "`KeyError` at it, or drift"),
)
_CALLERS = (
    *((name, *_LOOKED_PAST) for name in ("torch._tensor", "torch._jit_internal", "torch._ops", "torch._library.custom_ops")),
    *((f"torch._{name}", *_COMPILER) for name in ("dynamo", "inductor", "functorch", "subclasses", "higher_order_ops", "decomp")),
    ("torch.fx.GraphModule.<eval_with_key>", "tells graphs by their file's name", _DRIFT),
    ("torch._inductor.torchinductor", "tells compiled code by its file's path", _DRIFT),
    ("lightning.pytorch.strategies.strategy._ForwardRedirection.wrapped_forward", "tells a step under DDP from a forward", _DRIFT),
)
_DYNAMO = (
    (
        "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx",
        "compiled graphs run without the function mode",
        "they run under it (slower)",
    ),
    (
        "torch._guards.TracingContext.extract_stack",
        "tells compiled calls of layers from those of tables that are kept from call to call",
        "they are told apart by their order alone",
    ),
    (
        "torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer",
        "checkpoints in one graph",
        "the graph breaks at them (slower)",
    ),
)
_OPERATORS = (
    ("torch._ops.OpOverload", "tells calls of operators from those of functions", "`ImportError`"),
    ("torch._ops.OpOverloadPacket", "tells calls of operators from those of functions", "`ImportError`"),
    ("torch.ops.aten._linalg_check_errors.default", "leaves checks of inverses out of traces", "a file with an inverse is refused"),
)
_RECURRENT = (
    ("torch._subclasses.fake_tensor.FakeTensor", "tells tensors of a trace", _UNROLLED),
    ("torch._decomp.decomposition_table", "finds the shapes that an LSTM or a GRU gives without computing its steps", _UNROLLED),
    ("torch._ops.OpOverload.py_kernels", "finds the shapes that an LSTM or a GRU gives without computing its steps", _UNROLLED),
    ("torch._ops.OpOverload._dispatch_cache", "lets the same be seen", _UNROLLED),
)
_TRAINER = (
    ("lightning.pytorch.LightningModule._on_before_batch_transfer", "a batch goes through the module's hooks", _START),
    (
        "lightning.pytorch.trainer.call._call_strategy_hook",
        "a batch goes to the device",
        "the strategy is asked directly; no profiler entry",
    ),
    (
        "lightning.pytorch.core.optimizer._init_optimizers_and_lr_schedulers",
        "how many optimizers a step sees outside of fit",
        "a rehearsed step sees one",
    ),
    ("lightning.pytorch.Trainer._results", "the sanity check's metrics with several loaders", "they are not shown"),
    (
        "lightning.pytorch.loops._TrainingEpochLoop._batches_that_stepped",
        "pictures are logged at the step of the metrics",
        "with several optimizers they are logged at other steps",
    ),
    ("lightning.pytorch.Trainer._run_sanity_check", "validates the calibrated model before training", "it is not validated"),
    ("lightning.pytorch.loops._EvaluationLoop._combined_loader", "validates it on a copy of the loader", "it is not validated"),
    ("lightning.pytorch.loops._EvaluationLoop._data_fetcher", "forgets that copy", "the end of a run may fail on it"),
    ("lightning.pytorch.loops._FitLoop._results", "which end of a logged metric is better", "callbacks and names alone tell"),
)
_LOADERS = (
    ("lightning.pytorch.loops.fetchers._DataFetcher._combined_loader", "a begun iteration goes to the training", _START),
    ("lightning.pytorch.loops._FitLoop._data_fetcher", "finds the training's iterator", _START),
    ("lightning.pytorch.loops._FitLoop._combined_loader", "finds the training's loaders", _START),
    ("lightning.pytorch.loops._FitLoop._should_reload_train_dl", "loaders are created again when the training would", _START),
    ("lightning.fabric.utilities.types._Stateful", "tells loaders with a state", _ERROR),
    ("lightning.fabric.utilities.data._set_sampler_epoch", "shuffles as the training does", _ERROR),
    ("lightning.pytorch.utilities.combined_loader.CombinedLoader._state_dicts", "checkpoints keep the place of what is trained on", _START),
    ("lightning.pytorch.utilities.combined_loader.CombinedLoader._mode", "copies a loader", _START),
    ("torch.utils.data.DataLoader._get_iterator", "tells loaders that can be copied", "none is copied"),
    ("torch.utils.data.DataLoader._iterator", "a copy starts from the beginning", "it does so by its other attributes"),
)
_OTHERS = (
    ("torchmetrics.Metric._to_sync", "metrics", "tells whether sensitivities are added up over processes", "always"),
    (
        "torch.distributed.checkpoint.default_planner._EmptyStateDictLoadPlanner",
        "distributed_checkpoint",
        "reads a directory",
        "through a file (slower)",
    ),
    (
        "torch.distributed.checkpoint.state_dict_loader._load_state_dict",
        "distributed_checkpoint",
        "reads a directory",
        "through a file (slower)",
    ),
    (
        "torch.utils.tensorboard.SummaryWriter._get_file_writer",
        "tensorboard",
        "all values in one event; the graph",
        "one by one; a warning for the graph",
    ),
    ("omegaconf.Container._get_root", "omegaconf", "checks what interpolations refer to", "`AttributeError` while a recipe is read"),
    (
        "torch.ao.quantization.fx._decomposed",
        "decomposed",
        "the operators of PT2E programs",
        "those that something else has registered, else an error at the export",
    ),
    ("torch.fx.experimental.proxy_tensor.get_proxy_mode", "onnx_exporter", "notes the layer of traced nodes", "the report names no layer"),
    ("torch._export", "onnx_exporter", "quiets the exporter's logger", "its warnings are shown"),
    ("torch.fx.Node.meta.custom", "onnx_exporter", "notes the layer of traced nodes", "the report names no layer"),
    ("torch.onnx.ONNXProgram.pkg.torch.onnx.fx_node", "onnx_exporter", "finds the traced node", "the report names no layer"),
    ("torch.onnx.ONNXProgram.pkg.torch.onnx.name_scopes", "onnx_exporter", "finds the module of a node", "the report names no module"),
)
_VERSION = (
    "distillation/recorder.py, export/step_network.py, graph/snapshot.py, graph/call_tracer.py, quantization/activation_quantizer.py, "
    "quantization/moving_ranges.py, quantization/weight_quantizer.py, quantization/weight_recompute.py"
)
_BASE = "quantization/gradient_holders.py, quantization/runtime.py, quantization/weight_quantizer.py"
_IN_PLACE = (
    ("torch.nn.Module._buffers", "modules, quantization/activation_quantizer.py", "reads a quantizer's buffers at once", _ATTRIBUTE),
    ("torch.Tensor._version", _VERSION, "tells values that were written to", _ATTRIBUTE),
    ("torch.Tensor._base", _BASE, "the tensor that a view is of", _ATTRIBUTE),
    ("torch.Tensor._is_view", "quantization/runtime.py, quantization/small_tensors.py", "tells a view", _ATTRIBUTE),
    ("torch.Tensor._is_zerotensor", "quantization/tracing.py", "tells tensors without memory", _ATTRIBUTE),
    (
        "torch.UntypedStorage._cdata",
        "quantization/gradient_holders.py, quantization/weight_recompute.py",
        "memory whose holders are counted",
        _ATTRIBUTE,
    ),
    (
        "torch.autograd.forward_ad._current_level",
        "quantization/differentiable_operations.py, quantization/tracing.py",
        "tells forward-mode AD",
        _ATTRIBUTE,
    ),
    (
        "torch.fx.GraphModule.forward.f_locals",
        "graph/framework_calls.py",
        "tells which graph runs",
        "a graph in the model is taken for the compiler's",
    ),
    (
        "coremltools.models.MLModel._mil_program",
        "export/engines/coreml_process.py",
        "reads what a Core ML file holds",
        "no such file is written: `AttributeError`, which names it",
    ),
    ("torch._ops.OpOverload._schema", "graph/operator_calls.py", "the name of an operator", _ATTRIBUTE),
    ("torch._ops.OpOverloadPacket._qualified_op_name", "graph/operator_calls.py", "the name of an operator", _ATTRIBUTE),
)


def _rows() -> Iterator[PrivateApi]:
    for module, group in (
        ("torch_modes", _MODES),
        ("autograd", _AUTOGRAD),
        ("modules", _MODULES),
        ("checkpointing", _CHECKPOINTS),
        ("callers", _CALLERS),
        ("dynamo", _DYNAMO),
        ("operators", _OPERATORS),
        ("recurrent", _RECURRENT),
        ("lightning_trainer", _TRAINER),
        ("lightning_loaders", _LOADERS),
    ):
        for name, purpose, without in group:
            yield PrivateApi(name, module, purpose, without)
    for name, module, purpose, without in (*_OTHERS, *_IN_PLACE):
        yield PrivateApi(name, module, purpose, without)


TABLE: tuple[PrivateApi, ...] = tuple(_rows())
BY_NAME: dict[str, PrivateApi] = {api.name: api for api in TABLE}


def as_markdown() -> list[str]:
    """The lines of the table in the documentation."""
    versions = "; ".join(f"{package} {', '.join(found)}" for package, found in TESTED.items())
    lines = [
        "Private APIs, where no public one exists, are used only in `lightning_cco/compat`, except in files that *read in* lists with their path: "
        "there they are read at each torch call.",
        f"`tests/compat` tries each on the installed version. It has passed with {versions}.",
        "",
        "| private API | read in | for | in a version without it |",
        "| --- | --- | --- | --- |",
    ]
    return lines + [f"| `{api.name}` | {api.read_in} | {api.purpose} | {api.without} |" for api in TABLE]
