"""The pass that measures the loss sensitivity: one forward and one backward a batch in float, and each layer with weights once more at each number of bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cco.compat.checkpointing import unrecomputed
from lightning_cco.compat.torch_modes import functorch_level
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.loss_sensitivity import ACTIVATIONS_BITS, WEIGHTS_BITS, LossSensitivities, LossSensitivityReport, roundings_of
from lightning_cco.names import list_names
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.call_arguments import renormalized, replaced
from lightning_cco.quantization.fake_quantize import fake_quantize
from lightning_cco.quantization.forward_call import Forward
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.phases import Phase
from lightning_cco.quantization.qparams import affine_qparams
from lightning_cco.quantization.ranges import batch_range, best_clip_ratio, clip_errors, range_estimator, sample
from lightning_cco.quantization.rounded_calls import with_dynamic
from lightning_cco.quantization.sites import SiteQuantizers


def measure_loss(
    quantized: HookedModel,
    batches: Iterable[Any],
    forward: Forward,
    loss: Forward | None = None,
    weights_bits: Sequence[int] = WEIGHTS_BITS,
    activations_bits: Sequence[int] = ACTIVATIONS_BITS,
) -> LossSensitivityReport:
    """Measure how much the loss is expected to rise by each rounding of a plan.

    Args:
        quantized: A calibrated model.
        batches: The held batches, on the model's device.
        forward: How a batch goes through the model; what it returns is diverged from where there is no loss.
        loss: ``(model, batch) -> Tensor``: the mean loss of a batch, one number. `None`: the divergence of the outputs from those of the float model, for
            which labels are drawn from what it predicts.
        weights_bits: Numbers of bits to try for weights.
        activations_bits: Numbers of bits to try for activations.

    Raises:
        CCOError: The loss is no number that the layers can be trained by.
    """
    bits = {key: quantizer.num_bits for key, quantizer in quantized.activations.items()}
    roundings = roundings_of(quantized.plan, quantized.weights, bits, weights_bits, activations_bits)
    with torch.device("cpu"):  # torchmetrics makes tensors of its own on the default device, which is the user's
        metric = LossSensitivities(roundings).to(quantized.device)
    with quantized.evaluating(), unrecomputed():
        for number, batch in enumerate(batches):
            metric.start_batch()
            recorder = _LossRecorder(quantized, metric, weights_bits, activations_bits)
            with quantized.forked_random(), torch.enable_grad():
                with quantized.runtime.doing(Phase.DELEGATE, recorder):
                    result = (loss or forward)(quantized.model, batch)
                torch.manual_seed(number)
                value, recorder.terms = divergence(result) if loss is None else (checked_loss(result), terms_of(batch))
                recorder.collect(value)
    unknown = dict.fromkeys(name.partition(".")[0] for _, name, _ in metric.unmeasured())
    if unknown:
        warnings.warn(
            f"loss sensitivity: no gradient came back to {list_names(list(unknown))}: what rounding costs the loss there is unknown. Sums leave it out, and a "
            "budget leaves these layers their bits. They run without gradients (torch.no_grad, detach, torch.vmap), or the loss does not depend on them.",
            CCOWarning,
            stacklevel=2,
        )
    return metric.report("divergence" if loss is None else "loss")


def checked_loss(result: Any) -> Tensor:
    """The loss in what a step returns: a number, or a mapping with one under ``loss``.

    Raises:
        CCOError: There is none, or no layer has a part in it.
    """
    value = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CCOError(f"loss sensitivity: expected the loss of a batch (one number that depends on the layers), got {what}.")
    return value.reshape(())


def terms_of(batch: Any) -> int:
    """Of how many terms the mean loss of a batch most likely is: one for each label (of a sample, a token, a pixel), else one for each sample."""
    found = [tensor for tensor in tensors_in(batch) if tensor.dim()]
    labels = [tensor.numel() for tensor in found if not tensor.is_floating_point() and not tensor.is_complex()]
    return max([1, *labels] if labels else [1, *(len(tensor) for tensor in found[:1])])


def divergence(outputs: Any) -> tuple[Tensor, int]:
    """A loss without labels, whose Fisher information is the curvature of the divergence from the model's own outputs.

    Outputs of several classes (their axis is the last one of up to three, else the second) are logits: a class is drawn from each distribution. Of others the
    error counts relative to their mean square: what is drawn is normal.

    Args:
        outputs: What a forward returned: a tensor, or a tuple, list, mapping or object with some.

    Returns:
        The mean loss, and of how many terms it is the mean.

    Raises:
        CCOError: No output depends on the layers.
    """
    found = [output for output in tensors_in(outputs) if output.is_floating_point() and output.requires_grad and output.numel()]
    if not found:
        raise CCOError(
            "loss sensitivity: the forward returns no float that depends on the layers, and there is no loss. Give one: loss=lambda module, batch: ..."
        )
    terms, total = 0, torch.zeros((), device=found[0].device)
    for output in found:
        axis = output.dim() - 1 if output.dim() <= 3 else 1
        if output.dim() >= 2 and output.shape[axis] > 1:
            logits = output.float().movedim(axis, -1).reshape(-1, output.shape[axis])
            drawn = torch.multinomial(logits.detach().softmax(-1), 1).reshape(-1)
            total = total + F.cross_entropy(logits, drawn, reduction="sum")
            terms = max(terms, len(logits))
        else:
            values = output.float()
            total = total + (values * torch.randn_like(values)).sum() / values.detach().square().mean().sqrt().clamp(min=1e-12)
            terms = max(terms, values.numel())
    return total / terms, terms


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and mappings, and those that an object has as attributes."""
    if isinstance(value, Tensor):
        return [value]
    items = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, (tuple, list))
        else vars(value).values()
        if hasattr(value, "__dict__")
        else ()
    )
    return [tensor for item in items for tensor in tensors_in(item)]


class _LossRecorder:
    """Makes the calls of one float forward, and notes at the backward what each rounding changes of the loss.

    Args:
        quantized: The model.
        metric: Takes it.
        weights_bits: Numbers of bits to try for weights.
        activations_bits: Numbers of bits to try for activations.
    """

    def __init__(
        self, quantized: HookedModel, metric: LossSensitivities, weights_bits: Sequence[int], activations_bits: Sequence[int]
    ) -> None:
        self.quantized, self.metric = quantized, metric
        self.weights_bits, self.activations_bits = weights_bits, activations_bits
        self.terms = 1
        self._leaves: list[Tensor] = []
        self._read: dict[tuple[int, int], Tensor] = {}
        self._names = {id(quantizer): str(key) for key, quantizer in quantized.activations.items()}
        self._keep: list[Tensor] = []

    def collect(self, loss: Tensor) -> None:
        """Run the backward. No gradient is left on a parameter, and none of their hooks runs."""
        trained = [parameter for parameter in self.quantized.model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss, [*self._leaves, *trained], allow_unused=True)
        self._leaves.clear()
        self._read.clear()
        self._keep.clear()

    def __call__(self, site: SiteQuantizers, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A part of the model that is not trained, a checkpoint that will run again, or a transform, inside of which nothing can be a leaf.
        if not torch.is_grad_enabled() or functorch_level() is not None:
            return func(*args, **kwargs)
        if site.renormalizes:
            args, kwargs = renormalized(args, kwargs)
        for slot, _, quantizer in site.reads:
            args, kwargs = replaced(args, kwargs, slot, partial(self._watch_read, quantizer=quantizer))
        again = self._again(site, func, args, kwargs) if site.weights else None
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            return self._watch_output(site, 0, result, again)
        if result is None or not isinstance(result, (tuple, list)):
            return result
        items = [self._watch_output(site, position, item, again) for position, item in enumerate(result)]
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)

    def _watch_read(self, value: Tensor, quantizer: ActivationQuantizer) -> Tensor:
        """A tensor that is rounded where it is read; its readers have it in common."""
        known = self._read.get((id(quantizer), id(value)))
        if known is not None:
            return known
        watched = self._with_gradient(value)
        self._keep.append(value)  # so that no other gets its identity
        self._read[id(quantizer), id(value)] = watched
        if watched.requires_grad:
            _hook(watched, partial(self._note_activation, quantizer, watched.detach()))
        return watched

    def _watch_output(self, site: SiteQuantizers, position: int, output: Any, again: _Again | None) -> Any:
        if isinstance(output, (tuple, list)) and again is not None:  # the states of a recurrent layer
            return type(output)(self._watch_output(site, -1, item, None) for item in output)
        quantizer = next((quantizer for number, quantizer in site.outputs if number == position), None)
        if not isinstance(output, Tensor) or not output.is_floating_point() or (quantizer is None and again is None):
            return output
        output = self._with_gradient(output)
        if not output.requires_grad:
            return output
        overwritten = self.quantized.capture.sites[site.layer].overwritten
        value = output.detach().clone() if overwritten and site.in_place else output.detach()
        if quantizer is not None:
            _hook(output, partial(self._note_activation, quantizer, value))
        if again is not None:
            _hook(output, partial(self._note_weights, site, position, again, value))
        # A frozen part may write over what a backward needs; nobody else wants one there.
        return output.clone() if overwritten else output

    def _with_gradient(self, value: Tensor) -> Tensor:
        """The tensor itself, or a leaf in its place if nothing before it is trained."""
        if value.requires_grad or not value.is_floating_point():
            return value
        leaf = value.detach().requires_grad_()
        self._leaves.append(leaf)
        return leaf.view_as(leaf)  # operations may write to it, which they must not to a leaf

    def _again(self, site: SiteQuantizers, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Again:
        """The call once more with weights of other bits."""
        sites = self.quantized.capture.sites
        changed = site.in_place or any(source.layer in sites and sites[source.layer].overwritten for source in sites[site.layer].sources)
        if changed:
            args = tuple(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args)

        def call(bits: int) -> Any:
            other_args, other_kwargs = args, kwargs
            for slot, quantizer in site.weights:
                same = quantizer if bits == quantizer.num_bits else quantizer.of_bits(bits, self._estimator())
                other_args, other_kwargs = replaced(other_args, other_kwargs, slot, lambda weight, same=same: same(weight.detach()))  # type: ignore[misc]
            other_args, other_kwargs = with_dynamic(site, other_args, other_kwargs)
            return func(*other_args, **other_kwargs)

        return call

    def _estimator(self) -> str:
        return self.quantized.settings.training_settings.weight_estimator

    @torch.no_grad()
    def _note_weights(self, site: SiteQuantizers, position: int, again: _Again, value: Tensor, gradient: Tensor) -> None:
        for bits in dict.fromkeys((*self.weights_bits, site.weights[0][1].num_bits)):
            other = again(bits)
            other = other if isinstance(other, Tensor) else other[position]
            self.metric.update(("weights", site.layer, bits), other - value, gradient, self.terms)

    @torch.no_grad()
    def _note_activation(self, quantizer: ActivationQuantizer, value: Tensor, gradient: Tensor) -> None:
        for bits in dict.fromkeys((*self.activations_bits, quantizer.num_bits)):
            rounded = quantizer(value) if bits == quantizer.num_bits else self._rounded(quantizer, value, bits)
            self.metric.update(("activations", self._names[id(quantizer)], bits), rounded - value, gradient, self.terms)

    def _rounded(self, quantizer: ActivationQuantizer, value: Tensor, bits: int) -> Tensor:
        """Rounded to other bits than those that are calibrated, with the range of this batch."""
        low, high = batch_range(value)
        if range_estimator(self.quantized.settings.training_settings.range_estimator, bits) == "mse":
            ratio = best_clip_ratio(clip_errors(sample(value), low, high, bits, quantizer.symmetric))
            low, high = low * ratio, high * ratio
        return fake_quantize(value, *affine_qparams(low, high, bits, quantizer.symmetric), bits, quantizer.symmetric)


def _hook(tensor: Tensor, note: Callable[[Tensor], None]) -> None:
    tensor.register_hook(note)  # type: ignore[no-untyped-call]


_Again = Callable[[int], Any]
