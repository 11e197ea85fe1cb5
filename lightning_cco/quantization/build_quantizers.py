"""The quantizers that a plan asks for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_cco.errors import CCOError
from lightning_cco.graph.captured import Capture
from lightning_cco.graph.constant_slices import whole_of
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.affine_weight_quantizer import AffineWeightQuantizer
from lightning_cco.quantization.learned_quantizers import LearnedActivationQuantizer, LearnedWeightQuantizer
from lightning_cco.quantization.plan import LayerDecision, QuantizationPlan, TensorSpec
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.weight_quantizer import WeightQuantizer
from lightning_cco.settings import Settings, TrainingSettings


def build_quantizers(
    model: nn.Module,
    capture: Capture,
    plan: QuantizationPlan,
    settings: Settings,
    known_activations: Mapping[TensorKey, ActivationQuantizer],
    known_weights: Mapping[str, list[WeightQuantizer]],
) -> tuple[dict[TensorKey, ActivationQuantizer], dict[str, list[WeightQuantizer]]]:
    """Make the quantizers that a plan asks for and that are not there yet.

    Args:
        model: The model.
        capture: Where the layers are.
        plan: What is quantized.
        settings: The recipe.
        known_activations: Quantizers that are there; those of the same kind stay, with their ranges.
        known_weights: Likewise, those of weights.

    Returns:
        The quantizer of each rounded tensor, and those of each layer's weights.
    """
    training = settings.training_settings
    activations: dict[TensorKey, ActivationQuantizer] = {}
    for key, spec in plan.tensors.items():
        new = _activation_quantizer(spec, training)
        known = known_activations.get(key)
        activations[key] = known if known is not None and known.kind == new.kind else new
    weights: dict[str, list[WeightQuantizer]] = {}
    learned: dict[tuple[str, int, int | None], list[WeightQuantizer]] = {}
    for name in plan.graph.names:
        site, decision = capture.sites[name], plan.decisions[name]
        if not (decision.quantized or decision.weight_only) or not site.weights or name in plan.folded:
            continue
        bits = decision.weights_num_bits
        if bits is None:  # a constant operand of an addition: an activation that never changes
            bits = decision.activations_num_bits or settings.global_quantization_settings.activations_num_bits
        made = [_weight_quantizer(name, bits, weight.axis, decision, training) for weight in site.weights]
        for quantizer, weight in zip(made, site.weights, strict=True):
            if weight.cut_from is not None:
                held, indices = whole_of(weight.cut_from)
                path, _, attribute = held.rpartition(".")
                quantizer.cut_from = model.get_submodule(path), attribute, indices
        before = known_weights.get(name)
        weights[name] = before if before is not None and before[0].kind == made[0].kind else made
        # What several layers multiply by is learned once, and stored once.
        parameters = plan.graph[name].parameters
        if isinstance(made[0], LearnedWeightQuantizer) and len(made) == 1 and parameters:
            weights[name] = learned.setdefault((parameters[0], bits, made[0].axis), weights[name])
    return activations, weights


def _activation_quantizer(spec: TensorSpec, training: TrainingSettings) -> ActivationQuantizer:
    if training.range_estimator == "learned":
        return LearnedActivationQuantizer(spec.num_bits, spec.symmetric)
    return ActivationQuantizer(
        spec.num_bits,
        symmetric=spec.symmetric,
        estimator=training.range_estimator,
        averaging_constant=training.averaging_constant,
        percentile=training.percentile,
    )


def _weight_quantizer(layer: str, bits: int, axis: int | None, decision: LayerDecision, training: TrainingSettings) -> WeightQuantizer:
    group = decision.weights_group_size
    if training.weight_estimator != "learned":
        if decision.weights_symmetric:
            return WeightQuantizer(bits, axis, training.weight_estimator, group)
        return AffineWeightQuantizer(bits, axis or 0, training.weight_estimator, group)
    if not decision.weights_symmetric:
        raise CCOError(
            f"training_settings.weight_estimator: learned scales are those of symmetric weights, but those of layer '{layer}' have zero points "
            "(weights_symmetric: false). Write weight_estimator: mse, or weights_symmetric: true for the layer."
        )
    if group is not None:
        raise CCOError(
            f"training_settings.weight_estimator: learned scales are those of channels, but the weights of layer '{layer}' have one for each group of {group} "
            "(weights_group_size). Write weight_estimator: mse, or weights_group_size: 0 for the layer."
        )
    return LearnedWeightQuantizer(bits, axis)
