"""What a forward leaves in a model for the next one: values to go on from, and constants that are made once, in the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_cco.compat.modules import CONTENTS
from lightning_cco.graph.call import Call
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.ops import RANDOM
from lightning_cco.graph.saved_values import is_same


@dataclass(frozen=True)
class KeptConstant:
    """A tensor that the first forward has made, and that later ones read: a weight that is normalized once, a table of positions.

    Attributes:
        tensor: The tensor.
        parameters: Names of the parameters that it was made of; none of the model's inputs.
    """

    tensor: Tensor
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Carried:
    """What earlier forwards have left in a model.

    Attributes:
        values: Tensors that depend on inputs, or change from forward to forward: values, though the model holds them.
        constants: Those that don't.
    """

    values: Sequence[Tensor] = ()
    constants: Sequence[KeptConstant] = ()


NOTHING = Carried()


def carried_now(constants: Sequence[KeptConstant], held: Sequence[Tensor]) -> Carried:
    """What the next forward goes on from.

    Args:
        constants: What is known to be constant.
        held: What the model holds that it did not hold before any forward.
    """
    still, known = set(map(id, held)), {id(kept.tensor) for kept in constants}
    return Carried([tensor for tensor in held if id(tensor) not in known], [kept for kept in constants if id(kept.tensor) in still])


def unchanged(constants: Sequence[KeptConstant], before: Sequence[Tensor], held: Sequence[Tensor]) -> list[KeptConstant]:
    """Those that a forward has neither changed nor replaced.

    Args:
        constants: What was taken for constants.
        before: Their values before that forward.
        held: What the model holds after it.
    """
    still = set(map(id, held))
    return [kept for kept, value in zip(constants, before, strict=True) if id(kept.tensor) in still and is_same(kept.tensor, value)]


def drawn_apart(calls: Sequence[Call]) -> dict[int, tuple[str, ...]]:
    """Numbers of the calls that depend on random numbers of the forward's own, but on no input; with the names of the parameters that they depend on."""
    found: dict[int, tuple[str, ...]] = {}
    for number, call in enumerate(calls):
        sources = [read.source for read in call.reads]
        drawn = call.layer.attributes.get("function") in RANDOM
        if (drawn or sources) and all(source in found for source in sources):
            found[number] = tuple(dict.fromkeys((*(name for source in sources for name in found[source]), *call.layer.parameters)))
    return found


def where_held(model: nn.Module, tensor: Tensor) -> str:
    """The attribute of a model in which a tensor is."""
    for path, module in model.named_modules():
        contents = {
            **{name: value for name, value in vars(module).items() if name not in CONTENTS},
            **dict(module.named_buffers(recurse=False)),
        }
        for way, held in tensors_in(contents):
            if held is tensor:
                return ".".join(str(part) for part in (path, way[0]) if part != "")
    return "a tensor"
