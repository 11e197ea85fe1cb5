"""Where a running model differs from the captured one: a call that the capture never saw is never quantized, and never silent.

A loss that a network computes of its outputs, when it is given targets, is no layer, and no difference: without weights in it, such a call is one only if what
it gives goes on into a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from lightning_cco.compat.autograd import graph_task
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.call_node import CallNode, ModuleCall
from lightning_cco.graph.capture_coverage import frozen_modules
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.loop_calls import segment_of
from lightning_cco.graph.ops import OPS, READS_VALUES, Category, operation
from lightning_cco.graph.outside_readers import hooked_modules
from lightning_cco.graph.python_calls import calling_position
from lightning_cco.names import is_within, list_names
from lightning_cco.quantization.followed_results import FollowedResults
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.sites import SiteQuantizers
from lightning_cco.quantization.targets import TARGETS
from lightning_cco.quantization.tensor_key import TensorKey

# Names whose appearance out of the blue means that the model has changed its ways: what some engine could run in INT8.
COMPUTES = frozenset(
    name
    for name, op in OPS.items()
    if op.category in (Category.WEIGHTED, Category.MATMUL, Category.CLAMP)
    or any(op.kind in target.int8_kinds for target in TARGETS.values())
)


class CaptureMismatches:
    """Collects and warns, once of each.

    Args:
        model: The hooked model.
        root: The tree of captured calls.
        apart: Paths of modules that have been named already, since the forward calls them in other threads.

    Attributes:
        found: What has been found, in words, by place.
        suspected: Calls that are differences if what they gave goes on into a layer.
        followed: What they gave.
    """

    def __init__(self, model: nn.Module, root: CallNode, apart: Sequence[str] = ()) -> None:
        self.found: dict[str, str] = {}
        self.suspected: dict[str, str] = {}
        self._trying = False
        self.followed = FollowedResults()
        self._model = model
        known = [*frozen_modules(model), *apart]
        self._with_parameters = {
            path for path, module in model.named_modules() if next(module.parameters(), None) is not None and not is_within(path, known)
        }
        self._captured = frozenset(node.path for node in root.walk() if node.captured)
        self._has_training_capture = any(node.seen[True] for node in root.walk())

    def unseen(self, frame: ModuleCall, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Note a call that the capture did not see, if the model computes floats by it.

        Returns:
            Its place, if it is a difference only where its result goes on into a layer; else nothing.
        """
        weighted = self._has_weights(name, args, kwargs)
        if frame.training and not self._has_training_capture and not weighted:
            return ""  # the capture in training mode has failed, as that of a detector that wants targets: a loss may come here that it never saw
        if name in READS_VALUES or name == "__len__":
            return ""  # gives no tensor
        if not is_dynamo_compiling() and calling_position() in frame.node.idle.get(operation(name).kind, ()):
            return ""  # no layer, as it was none in the capture: a table that is kept for each size is made for another one
        if not frame.node.captured and frame.node.path not in self._with_parameters:
            return ""  # a metric, a loss or a teacher, not the model
        floats = [tensor for _, tensor in tensors_in((*args, kwargs)) if tensor.is_floating_point()]
        if not floats or self._are_stored(floats):
            return ""  # weights are rounded where they are read, whatever makes them of others (pruning, a parametrization put on later)
        kind = operation(name).kind
        if kind == "concat" and sum(tensor.numel() > 0 for tensor in floats) < 2:
            return ""  # a cache of keys before its first step: nothing is put together
        if not frame.node.captured:
            self._unseen_module(frame.node, kind)
            return ""
        where = frame.node.key or "the root module"
        again = " more often" if frame.table.get(name) is not None else ""
        place, message = (
            f"{where}:{kind}{again}",
            f"'{kind}' was called{again or ''} in '{where}' {'than' if again else 'though never'} when the layer graph was captured; "
            "such calls run in float. Capture with an example that takes every path and the longest loop (`example_input_array` or `forward_fn`).",
        )
        if weighted or is_compiling():
            self._note(place, message)
            return ""
        self.suspected[place] = message
        return place if place not in self.found else ""

    def read_by_a_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note suspected calls whose results a layer reads."""
        for place in self.followed.sources([args, kwargs]):
            self._note(place, self.suspected[place])

    @contextmanager
    def trial(self) -> Iterator[Callable[[], list[str]]]:
        """Run the model on something else inside the block, of which nothing is left; what is given says where it has differed, whoever reads it."""
        before = self.found, self.suspected, self._trying
        self.found, self.suspected, self._trying = dict(self.found), dict(self.suspected), True
        known = {*self.found, *self.suspected}
        try:
            yield lambda: [place for place in (*self.found, *self.suspected) if place not in known]
        finally:
            self.found, self.suspected, self._trying = before
            self.followed = FollowedResults()

    def _unseen_module(self, node: CallNode, kind: str) -> None:
        """Note, once for all that it holds, a call of a module that the capture did not see."""
        inner = node.key
        while node.parent is not None and not node.parent.captured:
            node = node.parent
        within = "" if inner == node.key else f" (in '{inner}')"
        advice = (
            "Capture with an example that takes every path and the longest loop (`example_input_array` or `forward_fn`)."
            if node.path in self._captured
            else f"Capture a forward that runs '{node.path}' (`forward_fn`). If it is a copy with averaged weights (EMA), leave the copy out: the callback "
            "EMAWeightAveraging of Lightning puts them into the module that is quantized."
        )
        self._note(
            node.key,
            f"'{kind}' was called in '{node.key}'{within} though never when the layer graph was captured; such calls run in float. {advice}",
        )

    def moved(self, frame: ModuleCall, name: str, site: SiteQuantizers) -> None:
        """Note another call in the place of a layer's."""
        where = frame.node.key or "the root module"
        self._note(
            f"{where}:{site.layer} moved",
            f"layer '{site.layer}': in '{where}' another call of '{operation(name).kind}' came instead (a branch that depends on data); it runs in "
            "float. Move the branch into a module of its own, or skip the layer: skip_quantization: true.",
        )

    def confused(self, frame: ModuleCall, node: CallNode) -> None:
        """Note that a loop has left out a module (stochastic depth) together with what it calls before each: that was counted as the module's before.

        Args:
            frame: Of the loop.
            node: The module that it calls next.
        """
        start = node.start
        if start is None or not frame.training or graph_task() != -1:
            return
        found = []
        for kind, (segment, place) in start.before.items():
            number, entry = frame.counts.get(kind, 0) - 1, next((one for one in frame.table.values() if one.kind == kind), None)
            if entry is not None and entry.known.get(number) == place and segment_of(number) != segment:
                found += [kind] * any(site.code_position == place and (site.outputs or site.reads) for site in entry.sites.values())
        found += [path for path, count in start.calls_before.items() if frame.calls.get(path, 0) not in (0, count)]
        if found:
            where = frame.node.key or "the root module"
            self._note(
                f"{where}: left out",
                f"training went past a module before '{node.path}' (stochastic depth, LayerDrop). What '{where}' itself calls before each of its modules "
                f"({list_names(found)}) is told apart by its order alone, and was rounded with the ranges of what comes before the module that was left out. "
                "Move it into the module that is left out as a whole, or freeze the ranges: freeze_ranges_at_step: 0.",
            )

    def hooked_late(self, known: frozenset[str], plan: QuantizationPlan) -> None:
        """Note hooks that have come since the capture where a rounded tensor passes: those that it saw read the values of the float run."""
        late = hooked_modules(self._model) - known - {""}  # the model itself: what it returns is rounded in the file, too
        edges = [edge for edge in plan.graph.edges if late and plan.rounds(TensorKey(edge.source, edge.source_output))]
        passed = {plan.graph[name].path for edge in edges for name in (edge.source, edge.destination)}
        named = [path for path in sorted(late) if any(is_within(other, [path]) for other in passed)]
        if named:
            self._note(
                f"hooks {named}",
                f"forward hooks were put on {list_names(named)} after the layers were captured: they see tensors that are rounded for INT8 layers. Put them on "
                "before quantize(), or in the module's __init__ or configure_model; then they see what the float run gives.",
            )

    def _are_stored(self, tensors: list[Tensor]) -> bool:
        """Whether all are parameters or buffers of the model."""
        if is_compiling():
            return False
        stored = {id(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}
        return all(id(tensor) in stored for tensor in tensors)

    def _has_weights(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is a layer with weights, or a product with a parameter or a view of one: no loss or metric is one."""
        category = OPS[name].category if name in OPS else None
        if category is Category.MATMUL and not is_compiling():
            stored = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}
            return any(operand.untyped_storage().data_ptr() in stored for _, operand in tensors_in((*args, kwargs)))
        return category is Category.WEIGHTED

    def _note(self, key: str, message: str) -> None:
        if key in self.found:
            return
        self.found[key] = message
        if not is_compiling() and not self._trying:
            warnings.warn(f"lightning_cco: {message}", CCOWarning, stacklevel=2)
