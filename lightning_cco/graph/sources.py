"""Where a tensor comes from: a pair of call and output number, or the names of the parameters that a constant is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_cco.compat.modules import CONTENTS
from lightning_cco.errors import CCOError
from lightning_cco.graph.call import Call, Read
from lightning_cco.graph.call_node import CallNode, ModuleCall
from lightning_cco.graph.carried_state import Carried, KeptConstant
from lightning_cco.graph.constant_contents import ConstantContents
from lightning_cco.graph.constant_slices import Cuts
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.custom_functions import CustomCall
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.operands import MASK_NOTE, dtype_name, is_quantizable
from lightning_cco.graph.ops import Category, Op
from lightning_cco.graph.origins import DRAWN, Origin, Origins, is_constant


class Sources:
    """Knows the tensors of a forward, and adds layers for those that no call was seen to make.

    Args:
        model: The model.
        root: The tree of calls.
        calls: What was seen so far.
        between: The frame of what the step calls outside of any module.
        carried: What earlier forwards have left in the model.

    Attributes:
        origins: What is known of each tensor.
        cuts: Which constants are cut from one parameter or buffer.
        contents: What constants held that the forward has made of none.
        kept_read: Those of `Carried.constants` that were read as they were.
    """

    def __init__(self, model: nn.Module, root: CallNode, calls: list[Call], between: ModuleCall, carried: Carried) -> None:
        self.model, self.calls = model, calls
        self.origins = Origins()
        self.cuts = Cuts(model)
        self.contents = ConstantContents()
        self._root, self._between = root, between
        self._inputs = 0
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        lazy = [name for name, parameter in self._parameters.items() if is_lazy(parameter)]
        if lazy:
            raise CCOError(
                f"{type(model).__name__}: the parameters {lazy} of lazy modules have no shape yet. Run a forward on one batch before, at the end of "
                "__init__ or in configure_model (their optimizer needs them, too)."
            )
        values = set(map(id, carried.values))
        self.kept_read: list[KeptConstant] = []
        self._constants = {id(kept.tensor): kept for kept in carried.constants}
        for kept in carried.constants:
            self.origins.remember(kept.tensor, kept.parameters)
        for name, tensor in [*self._parameters.items(), *model.named_buffers(remove_duplicate=False)]:
            if self.origins.of(tensor) is None and id(tensor) not in values:
                self.remember(tensor, (name,) if isinstance(tensor, nn.Parameter) else ())
        self._attributes: dict[int, Tensor] = {}
        for module in self._modules.values():
            for _, tensor in tensors_in({k: v for k, v in vars(module).items() if k not in CONTENTS}):
                if self.origins.of(tensor) is None and id(tensor) not in values:
                    self.remember(tensor, ())
                    self._attributes[id(tensor)] = tensor

    def is_attribute(self, tensor: Tensor) -> bool:
        """Whether it is a plain attribute of a module, such as ``example_input_array``: a constant, unless the model itself is called with it."""
        return id(tensor) in self._attributes

    def remember_input(self, tensor: Tensor, argument: str = "") -> Origin:
        """Make a tensor an input of the model."""
        attribute = {"argument": argument} if argument else {}
        origin = self.add("input", tensor, self._root, attributes=attribute, index=self._inputs)
        self.origins.remember(tensor, origin)
        self._inputs += 1
        return origin

    def remember(self, tensor: Tensor, origin: Origin) -> None:
        """Note where a tensor comes from; of a constant that no parameter is in, also what it holds."""
        self.origins.remember(tensor, origin)
        if origin == ():
            self.contents.note(tensor)

    def has_changed(self, tensor: Tensor) -> bool:
        """Whether a constant that no parameter is in holds something else than when a call was last seen to write to it."""
        return self.origins.of(tensor) == () and self.contents.has_changed(tensor)

    def find(self, tensor: Tensor, frame: ModuleCall) -> Origin:
        """The origin of a tensor as it is now. Values that no call was seen to make, or in more than one, are a source of their own."""
        origin = self.origins.of(tensor)
        if origin is None:
            origin = self._find_unknown(tensor, frame)
        kept = self._constants.get(id(tensor))
        if kept is not None and origin is kept.parameters and kept not in self.kept_read:
            self.kept_read.append(kept)
        writes = self.origins.writes_since(tensor)
        if not writes and not isinstance(origin, CustomCall):
            return self._as_it_is(tensor, origin, frame)
        origins = [self.resolved(o, tensor) for o in self.origins.all_of(tensor)]
        origin = origins[0]
        self.cuts.forget(tensor)
        if writes and all(is_constant(o) for o in origins):
            origin = names_of(origins)
        elif writes:
            origin = self.add("written", tensor, frame.node, origins)
        self.remember(tensor, origin)
        return self.origins.of(tensor)

    def _as_it_is(self, tensor: Tensor, origin: Origin, frame: ModuleCall) -> Origin:
        """The origin of a tensor that no call was seen to write to: a constant that has changed all the same holds values."""
        if origin != () or not self.has_changed(tensor):
            return origin
        origin = self.add("unseen", tensor, frame.node)
        self.origins.remember(tensor, origin)
        return origin

    def _find_unknown(self, tensor: Tensor, frame: ModuleCall) -> Origin:
        """A tensor that no call was seen to make is a value, unless it is a parameter, or shares the memory of what is known."""
        origin: Origin = self._name_of_parameter(tensor, frame)
        if origin is None:
            other = self.origins.sharing_memory(tensor)
            origin = self.find(other, frame) if other is not None else None
            if origin is None and isinstance(tensor, nn.Parameter):
                origin = ()  # of a module that the forward makes, or that the model does not know
            if origin is None and frame is self._between:
                return self.remember_input(tensor)
            if origin is None or not is_constant(origin):
                origin = self.add("unseen", tensor, frame.node, [] if origin is None else [origin])
        self.origins.remember(tensor, origin)
        return origin

    def _name_of_parameter(self, tensor: Tensor, frame: ModuleCall) -> tuple[str, ...] | None:
        """The name of a parameter that came into the model after the hooks: sharded ones are put together just for their module's forward."""
        if isinstance(tensor, nn.Parameter):
            return next(((name,) for name, parameter in self.model.named_parameters() if parameter is tensor), None)
        path = frame.node.path
        for name, value in vars(self._modules[path]).items() if path in self._modules else ():
            full = f"{path}.{name}" if path else name
            if value is tensor and full in self._parameters:
                return (full,)
        return None

    def resolved(self, origin: Origin, tensor: Tensor) -> Origin:
        """Of what a custom function made: one of the outputs of its layer."""
        if not isinstance(origin, CustomCall):
            return origin
        if all(is_constant(o) for o in origin.operands):
            return names_of(origin.operands)
        if origin.number is None:
            made = self.add("custom_function", tensor, origin.node, origin.operands, {"function": origin.name})
            origin.number = made[0]
            note = f"{origin.name} is a custom autograd.Function: what it computes can't be seen"
            self.calls[made[0]].layer = replace(self.calls[made[0]].layer, quantizable_outputs=(tensor.is_floating_point(),), note=note)
            return made
        layer = self.calls[origin.number].layer
        self.calls[origin.number].layer = replace(
            layer,
            output_shapes=(*layer.output_shapes, tuple(tensor.shape)),
            output_dtypes=(*layer.output_dtypes, dtype_name(tensor)),
            quantizable_outputs=(*layer.quantizable_outputs, tensor.is_floating_point()),
        )
        return origin.number, len(layer.output_shapes)

    def add(
        self,
        kind: str,
        tensor: Tensor,
        node: CallNode,
        origins: list[Origin] | None = None,
        attributes: Mapping[str, object] | None = None,
        index: int = 0,
    ) -> tuple[int, int]:
        """Add a layer that no function mode sees at run time: what reads it quantizes it."""
        ok = is_quantizable(tensor)
        note = (
            ""
            if ok
            else "integer"
            if not (tensor.is_floating_point() or tensor.is_complex())
            else MASK_NOTE
            if tensor.is_floating_point()
            else ""
        )
        sources = [(o[0], o[1]) for o in origins or [] if not is_constant(o)]
        shapes = tuple(self.calls[number].layer.output_shapes[output] for number, output in sources)
        layer = Layer("", node.path, kind, shapes, (tuple(tensor.shape),), (dtype_name(tensor),), (ok,), attributes or {}, note=note)
        call = Call(replace(layer, parameters=parameters_of(origins or [])), node, "", Op(kind, Category.COMPUTE), index, visible=False)
        call.reads = [Read((k,), number, output, self.quantizable((number, output))) for k, (number, output) in enumerate(sources)]
        self.calls.append(call)
        return len(self.calls) - 1, 0

    def quantizable(self, origin: tuple[int, int]) -> bool:
        """Whether an output of a call can be quantized."""
        return self.calls[origin[0]].layer.quantizable_outputs[origin[1]]


def names_of(origins: list[Origin]) -> tuple[str, ...]:
    """What constants are made of, each once: parameters, and what is drawn at random."""
    return tuple(dict.fromkeys(name for origin in origins if is_constant(origin) for name in origin))


def parameters_of(origins: list[Origin]) -> tuple[str, ...]:
    """The parameters that constants are made of, each once."""
    return tuple(name for name in names_of(origins) if name != DRAWN)
