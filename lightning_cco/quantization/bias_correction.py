"""Bias correction: what rounding shifts the mean of each output channel by is measured in the calibration, and taken off the layer's bias.

Rounded weights multiply inputs whose mean is not 0 (all that comes out of a ReLU), so their errors shift a channel as a whole. They average out least in
depthwise convolutions, which have few weights in each channel (Nagel et al. 2019, *Data-free quantization through weight equalization and bias correction*).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_cco.compat.torch_modes import is_functorch_wrapped
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.captured import Capture
from lightning_cco.names import list_names
from lightning_cco.quantization.range_updates import world_size


class BiasCorrection(nn.Module):
    """What is added to the bias of one layer's call. It belongs to the quantizers: the user's bias stays as it is.

    Args:
        value: For each output channel, (channels,) float32.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        with torch.inference_mode(False):  # what is made inside of it could never be trained with
            self.register_buffer("value", value.detach().clone().float())

    def forward(self, bias: Tensor | None, like: Tensor) -> Tensor:
        """The corrected bias.

        Args:
            bias: The layer's own, (channels,), if it has one.
            like: A tensor of the type that it needs.
        """
        return self.value.to(like.dtype) if bias is None else bias + self.value.to(bias.dtype)

    def applied(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a convolution or a linear layer with the bias corrected."""
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if len(args) > 2:
            return (*args[:2], self(args[2], weight), *args[3:]), kwargs
        return args, {**kwargs, "bias": self(kwargs.get("bias"), weight)}

    def extra_repr(self) -> str:
        """How many channels, and the largest correction."""
        return f"channels={self.value.numel()}, largest={float(self.value.abs().max()) if self.value.numel() else 0.0:.3g}"


def corrected_channels(capture: Capture, weights: Mapping[str, Sequence[nn.Module]]) -> dict[str, int]:
    """The layers whose bias can be corrected, with their number of output channels: convolutions and linear layers with rounded weights."""
    found = {}
    for name in weights:
        site, layer = capture.sites[name], capture.graph[name]
        stands = site.op.biased and not layer.attributes.get("made_bias")
        if stands and site.visible and len(site.weights) == 1 and len(site.weights[0].shape) > 1 and layer.output_shapes:
            found[name] = layer.output_shapes[0][_channel_axis(len(site.weights[0].shape))]
    return found


def _channel_axis(weight_dimensions: int) -> int:
    """Axis of the channels in the result of a layer, counted from its end, so that a batch may be there or not."""
    return 1 - weight_dimensions


class Shifts:
    """Measures by how much each layer's mean is off, batch by batch: first the batch in float, then with everything before the layer rounded and corrected.

    Args:
        capture: Where the layers are.
        channels: The layers that are corrected, with their number of output channels.
    """

    def __init__(self, capture: Capture, channels: Mapping[str, int]) -> None:
        self._channels = channels
        self._axes = {name: _channel_axis(len(capture.sites[name].weights[0].shape)) for name in channels}
        self._means: dict[str, list[Tensor]] = {}
        self._totals: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(channels, 0)

    def note(self, name: str, output: Any, _: Any) -> None:
        """A layer's output in float; the recorder of `Phase.RECORD_FLOAT`."""
        if name in self._channels:
            self._means.setdefault(name, []).append(self._mean(name, output))

    def corrected(self, name: str, func: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's function, whose result is moved to the mean that it has in float; the recorder of `Phase.CORRECT`."""
        means = self._means.get(name)
        if not means:
            return func
        wanted = means.pop(0)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = func(*args, **kwargs)
            found = self._mean(name, result)
            if not wanted.numel() == found.numel() == self._channels[name]:
                return result
            shift = wanted - found
            if not bool(torch.isfinite(shift).all()):
                return result
            self._totals[name] = self._totals[name] + shift if name in self._totals else shift
            self._counts[name] += 1
            return result + shift.to(result.dtype).view(-1, *[1] * (-1 - self._axes[name]))

        return call

    def end_batch(self) -> None:
        """Forget the means of the batch that was seen."""
        self._means.clear()

    def _mean(self, name: str, output: Tensor) -> Tensor:
        if type(output) is not Tensor or is_functorch_wrapped(output) or output.dim() < -self._axes[name] or not output.numel():
            # A part of a tensor that several processes hold: its channels are not this layer's. Under a vmap each of the calls has a mean of its own.
            return torch.empty(0)
        return output.detach().movedim(self._axes[name], 0).flatten(1).float().mean(1)

    def corrections(self, device: torch.device) -> dict[str, BiasCorrection]:
        """The mean shift of each layer over the batches; under DDP equally on all ranks."""
        names = list(self._channels)
        zeros = {name: torch.zeros(size, dtype=torch.float32, device=device) for name, size in self._channels.items()}
        totals = [self._totals.get(name, zeros[name]) for name in names]
        counts = torch.tensor([self._counts[name] for name in names], dtype=torch.float32, device=device)
        if world_size() > 1 and names:
            flat = torch.cat([*totals, counts])
            dist.all_reduce(flat)
            counts, at = flat[-len(names) :], 0
            for number, size in enumerate(self._channels.values()):
                totals[number], at = flat[at : at + size], at + size
        found = {
            name: BiasCorrection(total / count)
            for name, total, count in zip(names, totals, counts.tolist(), strict=True)
            if count and bool(total.any())
        }
        unseen = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
        if unseen:
            warnings.warn(
                f"bias_correction: the mean of {list_names(unseen)} is not known, so the bias there stays as it is: no batch of the calibration came there, "
                "the layer runs inside of a vmap, or its result is spread over several processes.",
                CCOWarning,
                stacklevel=4,
            )
        return found
