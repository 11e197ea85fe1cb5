"""What is said of parameters, and of weights made of them, that the forward itself makes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from lightning_cco.errors import CCOWarning
from lightning_cco.graph.carried_state import where_held
from lightning_cco.graph.trace import Tracer
from lightning_cco.names import is_within, list_names


def warn_of_weights_kept(model: nn.Module, tracer: Tracer) -> None:
    """Say which weights the forward makes of parameters once, so that training changes nothing of what is read."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for kept in tracer.kept_read:
        trained = [name for name in kept.parameters if name in parameters and parameters[name].requires_grad]
        if trained:
            warnings.warn(
                f"{type(model).__name__}: its forward made '{where_held(model, kept.tensor)}' of {list_names(trained)} in its first call, and reads what "
                "it has kept in training, too: what training changes in these parameters does not reach it. Make it in each call that trains: "
                "`if self.training or self.kept is None: self.kept = ...`.",
                CCOWarning,
                stacklevel=5,
            )


def warn_of_weights_made(model: nn.Module, evaluation: Tracer, late: Sequence[str]) -> None:
    """Say which modules the forward itself makes."""
    outermost = [path for path in late if not is_within(path, [other for other in late if other != path])]
    parameters = [name for name, _ in model.named_parameters()]
    made = [path for path in outermost if any(is_within(name, [path]) for name in parameters)]
    if made:
        warnings.warn(
            f"{type(model).__name__}: its forward makes modules with parameters: {list_names(made)}. They were made now, by the capture, and are "
            "quantized; but an optimizer made before does not train them. Make them in __init__ or configure_model, or run one forward there.",
            CCOWarning,
            stacklevel=5,
        )
    drawn = [path or "the model itself" for path in evaluation.drawn]
    if drawn:
        warnings.warn(
            f"{type(model).__name__}: the forward of {list_names(drawn)} makes modules or parameters, and draws their values at random in each call. "
            "They stay in float, are not trained, and an export would hold one draw. Make them in __init__, where parameters of the model belong.",
            CCOWarning,
            stacklevel=5,
        )
