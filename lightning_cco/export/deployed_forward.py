"""The forward that a file holds: tensors in, tensors out. Everything else of a call is fixed as in the example."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from lightning_cco.errors import CCOError
from lightning_cco.export.errors import BatchDoesNotVary, ExportError
from lightning_cco.export.forward_signature import ForwardSignature
from lightning_cco.export.labels import find_labels
from lightning_cco.export.nested_tensors import ArgPath, follow, items_of, leaves, mapped, name_of
from lightning_cco.export.step_network import StepNetwork
from lightning_cco.graph.containers import tensors_held
from lightning_cco.graph.error_location import failing_module
from lightning_cco.names import list_names
from lightning_cco.quantization.model import HookedModel

PREFIX = "model"
"""Name of the model in `Deployed`, and so the beginning of all paths that the exporter sees."""
_NARROW = ("BFloat16", "Half", "Double", "double", "bfloat16", "float16", "float64")
"""Types that a model may be of, and its own conversions may be to, as PyTorch's errors spell them."""


class Deployed(nn.Module):
    """A model behind a signature of tensors alone.

    Arguments by keyword, ``**inputs``, an unused ``*rest``, defaults, dictionaries and dataclasses are bound as in the example; labels, without which
    the model gives the same outputs but no loss, are left out; so is a loss that is returned with other outputs.

    Args:
        model: The model, in evaluation mode.
        args: Positional arguments of one forward.
        kwargs: Keyword arguments of it.
        cast: Whether floating-point inputs become float32.
        network: What to call in the place of the model's forward.
        trial: Entered where arguments are left out to find labels: the model may then run other calls, of which nothing is said.

    Attributes:
        names: Name of each input.
        outputs: Name of each output.
        dropped: Arguments that are labels.
        fixed: Numbers, strings and flags of the example that are constants in the file, in words.
        lost: Outputs that are not in the file, in words.

    Raises:
        CCOError: The forward does not take the example, or gives no tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cast: bool = False,
        network: StepNetwork | None = None,
        trial: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.model, self._network = model, network
        called = inspect.signature(model.forward) if network is None else network.signature
        self._cast = cast
        self._signature = ForwardSignature(called, type(model).__name__, cast)
        self.dropped: list[str] = []
        self.training = model.training
        example = self._signature.bind(args, kwargs)
        with trial():
            self.dropped = find_labels(example, self._signature, self._call)
        self._example = self._without_labels(example)
        found = leaves(self._example)
        self._slots = [slot for slot, value in found if isinstance(value, Tensor)]
        self._refuse_objects(found)
        self.names = _unique([self._signature.input_name(slot) for slot in self._slots])
        self.fixed = [
            f"{self._signature.input_name(slot)}={value!r}"
            for slot, value in found
            if isinstance(value, (int, float, str)) and not self._signature.is_default(slot, self._example)
        ]
        result = self._called_on_example()
        kept = [(slot, value) for slot, value in leaves(result) if isinstance(value, Tensor)]
        losses = [slot for slot, value in kept if slot and slot[-1] == "loss" and value.dim() == 0]
        self._kept = [slot for slot, _ in kept if slot not in losses or len(kept) == len(losses)]
        self._given = {slot for slot, _ in kept}
        self.lost = [name_of(slot) for slot in losses if slot not in self._kept] + _others(result)
        if not self._kept:
            raise ExportError(
                f"{type(model).__name__}.forward returned {type(result).__name__} without a tensor in it: expected a tensor, or a tuple, mapping or "
                f"dataclass of tensors.{_instead_of(result)}"
            )
        names = [name_of(slot) for slot in self._kept]
        names = [name if name and not name[0].isdigit() else f"output_{number}" for number, name in enumerate(names)]
        # A file has one name for one tensor: what goes in and comes out under the same key are two.
        self.outputs = _unique([f"{name}_output" if name in self.names else name for name in names], self.names)

    def _refuse_objects(self, found: Sequence[tuple[ArgPath, Any]]) -> None:
        """A tensor inside of an object would stay that of the example in the file; nor does a file take one that leaves zeros out."""
        for slot, value in found:
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                raise ExportError(
                    f"the argument '{self._signature.input_name(slot)}' has the layout {value.layout}, but a file takes dense tensors alone. "
                    "Let the forward that is exported take it as x.to_dense(), or, of a graph, the pairs of nodes that are connected (index_add)."
                )
            ways = [] if isinstance(value, (Tensor, nn.Module)) else [way for way, _ in tensors_held(value)]
            if ways:
                names = [re.sub(r"\W", "_", "_".join(map(str, way))).lstrip("_") for way in ways]
                raise ExportError(
                    f"the argument '{self._signature.input_name(slot)}' is a {type(value).__name__} that holds the tensors {list_names(names)}, "
                    "but a file takes tensors, and dictionaries, dataclasses and tuples of them. Let forward take the tensors themselves, "
                    f"`def forward(self, {', '.join(names)})`, and call it so in the steps: `self(batch.{names[0]}, ...)`."
                )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the model with the tensors in the places of the example's."""
        args, kwargs = self.call(tensors)
        return self.kept(self._run(*args, **kwargs))

    def kept(self, result: Any) -> tuple[Tensor, ...]:
        """Of what the model gives, the tensors that are outputs.

        Raises:
            BatchDoesNotVary: One of the example's is missing, or there is one more.
        """
        found = {slot: value for slot, value in leaves(result) if isinstance(value, Tensor)}
        missing = [slot for slot in self._kept if slot not in found]
        more = [slot for slot in found if slot not in self._given]
        if missing or more:
            name, which = type(self.model).__name__, name_of((missing or more)[0])
            said = f"gave no '{which}' on these inputs, but did" if missing else f"gave '{which}' on these inputs, but did not"
            raise BatchDoesNotVary(
                f"{name} {said} on the example. If the model gives another number of tensors in evaluation, export it in that mode; "
                "if it depends on the size of the batch, pass dynamic_batch=False."
            )
        return tuple(found[slot] for slot in self._kept)

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """The inputs of a call, in order; `None` if it is not of the example's form (other keys, other numbers), so that the file does not compute it."""
        try:
            bound = self._without_labels(self._signature.bind(args, kwargs))
        except CCOError:
            return None
        theirs, ours = leaves(bound), leaves(self._example)
        if [slot for slot, _ in theirs] != [slot for slot, _ in ours]:
            return None
        for (_, value), (_, wanted) in zip(theirs, ours, strict=True):
            if isinstance(value, Tensor) != isinstance(wanted, Tensor) or (
                not isinstance(value, Tensor) and value is not wanted and value != wanted
            ):
                return None
        return tuple(value for _, value in theirs if isinstance(value, Tensor))

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The example's tensors."""
        return tuple(value for _, value in leaves(self._example) if isinstance(value, Tensor))

    def spread(self, shapes: Any, used: str) -> list[Any]:
        """What the user said of each argument, for each tensor in it.

        Args:
            shapes: A mapping by the arguments' names, or a tuple in their order, nested as the arguments are.
            used: Name of the option, for errors.
        """
        arguments = {name: self._example.get(name) for name in self._signature.parameters}
        if not isinstance(shapes, Mapping):
            if not isinstance(shapes, (tuple, list)):
                raise ExportError(
                    f"{used} expects a mapping by argument or a tuple in the order of the arguments, got {type(shapes).__name__}."
                )
            shapes = self._signature.by_name(shapes)
        flat = {name: value for name, value in shapes.items() if name not in arguments}
        for name, parameter in self._signature.parameters.items():
            inside = self._example.get(name)
            if parameter.kind is parameter.VAR_KEYWORD and isinstance(inside, dict):
                shapes = {
                    **shapes,
                    name: {**{key: flat.pop(key) for key in list(flat) if key in inside or key in self.dropped}, **shapes.get(name, {})},
                }
        unknown = [name for name in flat if name not in self.dropped]
        if unknown:
            raise ExportError(f"{used} names {unknown}, but the forward's arguments are {list(arguments)}.")
        return [follow(shapes, slot) for slot in self._slots]

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return (self.model if self._network is None else self._network)(*args, **kwargs)

    def call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model's own forward with these tensors in them."""
        given = dict(zip(self._slots, tensors, strict=True))
        return self._signature.unbind(mapped(self._example, lambda slot, _: given[slot]))

    def nested(self, specifications: Sequence[Any]) -> dict[str, Any]:
        """One entry for each tensor in the form of the arguments, as `torch.export` wants its dynamic shapes."""
        given = dict(zip(self._slots, specifications, strict=True))

        def of(value: Any, slot: ArgPath) -> Any:
            if isinstance(value, Tensor):
                return given[slot]
            items = items_of(value)
            if items is None:
                return None
            inside = {key: of(item, (*slot, key)) for key, item in items}
            return (
                inside
                if isinstance(value, Mapping)
                else type(value)(inside.values())
                if type(value) in (tuple, list)
                else list(inside.values())
            )

        return {name: of(value, (name,)) for name, value in self._example.items()}

    def _called_on_example(self) -> Any:
        try:
            return self._call(self._example)
        except CCOError:
            raise
        except Exception as error:
            given = ", ".join(
                f"{self._signature.input_name(slot)} {list(value.shape)}"
                for slot, value in leaves(self._example)
                if isinstance(value, Tensor)
            )
            raise ExportError(
                f"the forward of {type(self.model).__name__} failed on the example ({given or 'no tensor'}){failing_module(self.model, error)}: "
                f"{type(error).__name__}: {error}. {self._instead_of_failing(error)}"
            ) from error

    def _instead_of_failing(self, error: Exception) -> str:
        if self._cast and any(name in str(error) for name in _NARROW):
            return (
                "While it is exported its parameters are float32, since no INT8 kernel takes another type; its forward converts to a type of its own. "
                "Convert to that of the parameters instead, as in x.to(self.layer.weight.dtype)."
            )
        return "Give an example that it takes: example_args=(tensor, ...) or example_kwargs={...}."

    def _call(self, arguments: dict[str, Any]) -> Any:
        args, kwargs = self._signature.unbind(arguments)
        return self._run(*args, **kwargs)

    def _without_labels(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._signature.without(arguments, self.dropped) if self.dropped else arguments


def deployed_forward(
    quantized: HookedModel, args: tuple[Any, ...], kwargs: dict[str, Any], types: Sequence[str], network: StepNetwork | None
) -> Deployed:
    """What the file of a quantized model holds.

    Args:
        quantized: The model, in evaluation mode.
        args: Positional arguments of one forward.
        kwargs: Keyword arguments of it.
        types: What `in_float32` found: inputs are cast where the model's own types were others.
        network: What to call in the place of the model's forward.
    """
    return Deployed(quantized.model, args, kwargs, cast=bool(types), network=network, trial=quantized.runtime.mismatches.trial)


def _unique(names: list[str], others: Sequence[str] = ()) -> list[str]:
    """Names that a file takes for inputs, or beside those of others for outputs."""
    taken = dict.fromkeys(others, 1)
    found = []
    for name in names:
        name = re.sub(r"\W+", "_", name).strip("_") or "input"
        name = f"input_{name}" if name[0].isdigit() else name
        count = taken[name] = taken.get(name, 0) + 1
        found.append(name if count == 1 else f"{name}_{count}")
    return found


def _others(result: Any) -> list[str]:
    """Outputs that are neither tensors nor numbers, such as a cache of keys and values."""
    return [
        f"{name_of(slot)} ({type(value).__name__})" for slot, value in leaves(result) if not isinstance(value, (Tensor, int, float, str))
    ]


def _instead_of(result: Any) -> str:
    """What to return in the place of a distribution; empty if it is none."""
    if not isinstance(result, Distribution):
        return ""
    names = [name for name in result.arg_constraints if name in vars(result)] or ["mean", "stddev"]
    names = names[:1] if names[0] == "logits" else names  # the others follow from them
    returned = ", ".join(f"distribution.{name}" for name in names)
    return f" Return its parameters ({returned}), and make the distribution in the steps of the training."
