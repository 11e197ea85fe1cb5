"""From a model and an example to its layer graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.call_node import CallNode
from lightning_cco.graph.capture_coverage import (
    in_other_threads,
    only_asked,
    out_of_sight,
    partly_in_other_threads,
    used_unseen,
    without_int8_form,
)
from lightning_cco.graph.captured import Capture, assemble
from lightning_cco.graph.carried_state import NOTHING, Carried, KeptConstant, carried_now, unchanged
from lightning_cco.graph.compiled import eager
from lightning_cco.graph.containers import LOOKED_INTO
from lightning_cco.graph.error_location import failing_module
from lightning_cco.graph.generated_weights import warn_of_weights_kept, warn_of_weights_made
from lightning_cco.graph.idle_calls import note_idle
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.modes import as_now, switch_training, uncollected
from lightning_cco.graph.saved_caches import clear_cache
from lightning_cco.graph.snapshot import Snapshot
from lightning_cco.graph.trace import Tracer
from lightning_cco.names import is_within, list_names


def capture_graph(model: nn.Module, /, *args: Any, **kwargs: Any) -> LayerGraph:
    """Run the model in evaluation and in training mode and return its layer graph.

    That is at least two forwards; more where a module keeps state from one to the next, or parameters were read where no function was seen.

    Parameters, buffers, gradients, random state and each module's training flag are as before when it returns.

    Args:
        model: Any module.
        *args: Positional arguments of its ``forward``; one example of any batch size.
        **kwargs: Keyword arguments of its ``forward``.

    Raises:
        CCOError: If the forward fails, or makes no layer.

    Example:
        >>> import torch
        >>> graph = capture_graph(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4))
        >>> graph.names
        ('input_0', 'linear', 'relu', 'linear_1', 'output_0')
    """
    return capture(model, lambda: model(*args, **kwargs)).graph


def capture(model: nn.Module, forward: Callable[[], Any]) -> Capture:
    """Run ``forward``, which must call the model or parts of it, and write down what happens.

    Args:
        model: The module whose submodules are watched.
        forward: Runs one example through it.

    Raises:
        CCOError: If the forward fails, or makes no layer.
    """
    with eager(), uncollected():  # compiled code would be traced with the capture in it
        try:
            return _capture(model, forward, gradients=False)
        except CCOError as error:
            if not wants_gradients(error.__cause__):
                raise
        return _capture(model, forward, gradients=True)


def wants_gradients(error: BaseException | None) -> bool:
    """Whether code failed because it differentiates (`torch.autograd.grad`, ``backward``) where no gradients are recorded."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _WITHOUT_GRADIENTS)


_WITHOUT_GRADIENTS = ("does not require grad", "appears to not have been used in the graph", "does not have a grad_fn")


def _capture(model: nn.Module, forward: Callable[[], Any], gradients: bool) -> Capture:
    with Snapshot(model, parameters=True) as kept:
        parts, forward = _parts(model), _with_empty_caches(kept, forward)
        first = evaluation = _trace_evaluation(model, forward, gradients)
        constants: list[KeptConstant] = []
        changed, appeared = kept.changed(), kept.appeared()
        late = [path for path, part in _parts(model).items() if parts.get(path) is not part]
        if changed or appeared or late:  # the first forward is not what all others are
            evaluation, constants = _trace_later(model, forward, gradients, kept, evaluation)
            # A run without us makes what is made once, too.
            kept.stay = frozenset(place for place, value in kept.appeared().items() if appeared.get(place) is value)
            kept.constants = [constant.tensor for constant in constants]
        with as_now(model, gradients):
            switch_training(model, False)
            hidden = used_unseen(model, evaluation, forward)
        _check(model, evaluation, hidden)
        _warn_of_weights_without_kernel(model, evaluation)
        warn_of_weights_made(model, evaluation, late)
        evaluation.find_loops()
        training = _trace_training(model, forward, evaluation.frames.root, carried_now(constants, kept.changed()))
        warn_of_weights_kept(model, training or evaluation)
    note_idle(
        evaluation.frames.root, [(tracer.frames.root, tracer.calls) for tracer in (first, evaluation, training) if tracer is not None]
    )
    teachers = only_asked(model, evaluation, training)
    captured = assemble(evaluation.frames.root, evaluation, training, teachers)
    captured.called = tuple(path for path in evaluation.called if not is_within(path, teachers))
    captured.needs_gradients = gradients
    captured.hooked = evaluation.hooked
    captured.apart, captured.partly_apart = tuple(in_other_threads(evaluation)), tuple(partly_in_other_threads(evaluation))
    captured.left_out = evaluation.left_out
    if not _warn_of_two_networks(model, captured):
        _warn_of_further_calls(model, captured)
    return captured


def _with_empty_caches(kept: Snapshot, forward: Callable[[], Any]) -> Callable[[], Any]:
    """A forward that computes what `functools.lru_cache` keeps, as a compiler has it in each forward."""

    def run() -> Any:
        for cache in kept.caches:
            clear_cache(cache)
        return forward()

    return run


def _trace_evaluation(
    model: nn.Module, forward: Callable[[], Any], gradients: bool, carried: Carried = NOTHING, before: Tracer | None = None
) -> Tracer:
    """What a forward in evaluation mode calls.

    Args:
        model: The model.
        forward: Runs the example through it.
        gradients: Whether to record gradients.
        carried: See `Sources`.
        before: What the forward before has called; it is returned if this one fails.
    """
    tracer = Tracer(model, CallNode(""), carried)
    with as_now(model, gradients):
        switch_training(model, False)
        try:
            with tracer.watching():
                forward()
        except Exception as error:
            if before is not None:
                return before
            if isinstance(error, CCOError):
                raise
            raise CCOError(
                f"{type(model).__name__}: its forward failed{failing_module(model, error)} on the example that the layer graph is captured from: "
                f"{type(error).__name__}: {error}. "
                "Give an example that its forward takes: `example_args`; with a Trainer pass `forward_fn=lambda module, batch: module(...)`."
            ) from error
    return tracer


def _trace_later(
    model: nn.Module, forward: Callable[[], Any], gradients: bool, kept: Snapshot, first: Tracer
) -> tuple[Tracer, list[KeptConstant]]:
    """What a forward after the first one calls, and the constants that the first one has made for it.

    What the first one has made of parameters and constants alone is a constant, unless the next forward changes it.
    """
    made = [(tensor, first.made_of(tensor)) for tensor in kept.changed()]
    constants = [KeptConstant(tensor, names) for tensor, names in made if names is not None]
    before = [constant.tensor.detach().clone() for constant in constants]
    evaluation = _trace_evaluation(model, forward, gradients, carried_now(constants, kept.changed()), first)
    steady = unchanged(constants, before, kept.changed())
    if len(steady) < len(constants):
        evaluation = _trace_evaluation(model, forward, gradients, carried_now(steady, kept.changed()), first)
    return evaluation, steady


def _parts(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """The modules and the parameters of a model, by path."""
    return {**dict(model.named_modules()), **dict(model.named_parameters())}


def _check(model: nn.Module, evaluation: Tracer, hidden: Sequence[str]) -> None:
    """Say what was not seen.

    Raises:
        CCOError: Nothing was.
    """
    unseen = out_of_sight(model, evaluation)
    unseen += [f"'{name}' (what is returned depends on it, but no torch function was seen to read it)" for name in hidden]
    if not any(call.visible for call in evaluation.calls):
        inside = f" Not visible to the capture: {', '.join(unseen)}." if unseen else ""
        raise CCOError(
            f"{type(model).__name__}: no layer was captured: its forward called no torch function on the example's tensors.{inside} "
            "Check that the example reaches the layers (`forward_fn`), and that they exist when the capture runs. "
            f"Tensors were looked for in {LOOKED_INTO}."
        )
    if unseen:
        warnings.warn(
            f"{type(model).__name__}: modules with parameters are not in the layer graph, so they stay in float: {'; '.join(unseen)}. "
            "Write them with torch functions in Python, unscripted and in the forward's own thread, to have them quantized.",
            CCOWarning,
            stacklevel=4,
        )


def _warn_of_weights_without_kernel(model: nn.Module, evaluation: Tracer) -> None:
    """Say which weights are in the layer graph, and have no INT8 kernel by what reads them."""
    found = without_int8_form(model, evaluation)
    if found:
        warnings.warn(
            f"{type(model).__name__}: weights stay in float, since what reads them has no INT8 kernel: {'; '.join(found)}. "
            "Multiply by them with torch's functions on real numbers (linear, matmul, conv2d) to have them quantized; squared distances are "
            "products, too: x.square().sum(1, keepdim=True) - 2 * F.linear(x, w) + w.square().sum(1).",
            CCOWarning,
            stacklevel=4,
        )


def _warn_of_two_networks(model: nn.Module, captured: Capture) -> bool:
    """Say where training runs other weights than evaluation does: those are in float, and what is exported is not what was trained. Returns whether it does.

    Auxiliary heads, which training alone has, and what evaluation alone adds at the end are no such network by themselves.
    """
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    apart = [
        list(dict.fromkeys(call.layer.path or "the model itself" for call in calls))
        for calls in (
            [call for call in captured.evaluation_only if call.layer.weighted],
            [call for call in captured.training_only if call.layer.weighted and trained.intersection(call.layer.parameters)],
        )
    ]
    if not all(apart):
        return False
    deployed, others = map(list_names, apart)
    warnings.warn(
        f"{type(model).__name__}: layers with weights in {deployed} run in evaluation mode alone, those in {others} in training mode alone. The layer graph "
        "and the file are those of evaluation: what runs in training alone is trained in float, and what runs in evaluation alone is not trained with "
        "rounded values. A layer of both modes is to be called in one place, outside of `if self.training`. If the copy for evaluation has averaged weights "
        "(EMA), leave it out: the callback EMAWeightAveraging of Lightning puts them into the module that is quantized. Otherwise capture what is trained: "
        "`forward_fn=lambda module, batch: ...`.",
        CCOWarning,
        stacklevel=4,
    )
    return True


def _warn_of_further_calls(model: nn.Module, captured: Capture) -> None:
    """Say which weights of the layer graph training multiplies by more often than evaluation: the further products are in float."""
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    shared = trained.intersection(name for layer in captured.graph if layer.weighted for name in layer.parameters)
    calls = [call for call in captured.training_only if call.layer.weighted and shared.intersection(call.layer.parameters)]
    if not calls:
        return
    where = list_names(list(dict.fromkeys(call.layer.path or "the model itself" for call in calls)))
    warnings.warn(
        f"{type(model).__name__}: layers with weights in {where} are called more often by a forward in training mode than in evaluation mode. Only as many "
        "calls as evaluation makes are trained with rounded values, the others in float. Call them equally often in both modes; several views of a sample "
        "(crops, pairs) are to be put into one batch, or the whole model is to be called for each of them in training_step.",
        CCOWarning,
        stacklevel=4,
    )


def _trace_training(model: nn.Module, forward: Callable[[], Any], root: CallNode, carried: Carried) -> Tracer | None:
    training = Tracer(model, root, carried)
    with as_now(model, gradients=True):  # as in training: what the user's code runs without gradients shows
        switch_training(model, True)
        try:
            with training.watching():
                forward()
            return training
        except Exception:
            # A batch of one sample under batch norm, a detector that wants targets: training calls are then taken to be those of evaluation,
            # and the runtime reports where they are not.
            for node in root.walk():
                node.forget_training()
    return None
