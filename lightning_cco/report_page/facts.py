"""What is known of a model's weights without running it: how many each layer has, in how many channels, and who shares them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_cco.budget.facts import float_bytes
from lightning_cco.quantization.model import HookedModel


@dataclass(frozen=True)
class LayerFacts:
    """The weights of one layer.

    Attributes:
        elements: How many numbers they are.
        channels: How many scales they have, or would have.
        store: Number of the tensor that they lie in: layers with one number share their weights.
    """

    elements: int
    channels: int
    store: int


@dataclass(frozen=True)
class ModelFacts:
    """A model's weights.

    Attributes:
        model: Name of its class.
        float_bytes: Bytes of its parameters and buffers in float32.
        layers: By layer with weights.
    """

    model: str = ""
    float_bytes: int = 0
    layers: dict[str, LayerFacts] = field(default_factory=dict)


def model_facts(quantized: HookedModel) -> ModelFacts:
    """The facts of a hooked model.

    Of a layer's parameters those count that are multiplied: the first, and of recurrent layers all matrices.
    """
    parameters = dict(quantized.model.named_parameters(remove_duplicate=False))
    stores: dict[tuple[int, ...], int] = {}
    found = {}
    for layer in quantized.graph:
        if not layer.weighted:
            continue
        own = [parameters[name] for name in layer.parameters if name in parameters]
        read = [
            one for place, one in enumerate(own) if place == 0 or (one.dim() > 1 and layer.kind.split("_")[0] in ("lstm", "gru", "rnn"))
        ]
        if read:
            store = stores.setdefault(tuple(id(one) for one in read), len(stores))
            channels = sum(one.shape[0] if one.dim() > 1 else 1 for one in read)
            found[layer.name] = LayerFacts(sum(one.numel() for one in read), channels, store)
    return ModelFacts(type(quantized.model).__name__, float_bytes(quantized.model), found)
