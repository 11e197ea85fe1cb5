"""Settings of the whole model that change nothing, since another setting or the model leaves them no part: said, as it is of rules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from lightning_cco.errors import CCOWarning
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.residual_stream import ResidualStream
from lightning_cco.sections import DistillationSettings, TrainingSettings

INT4_BITS = 4


def warn_of_settings_without_effect(plan: QuantizationPlan, stream: ResidualStream) -> None:
    """Warn of each setting that differs from its default and has no effect, with the reason and what to write instead.

    Args:
        plan: The plan, with the settings.
        stream: The residual additions of the model.
    """
    for key, why in [*_of_training(plan), *_of_distillation(plan), *_of_the_rest(plan, stream)]:
        warnings.warn(f"{key} changes nothing: {why}.", CCOWarning, stacklevel=4)


def _of_training(plan: QuantizationPlan) -> Iterator[tuple[str, str]]:
    training, default = plan.settings.training_settings, TrainingSettings()
    estimator = training.range_estimator
    if training.percentile != default.percentile and estimator != "percentile":
        yield f"training_settings.percentile: {training.percentile:g}", f"range_estimator is {estimator}. Add range_estimator: percentile"
    if training.averaging_constant != default.averaging_constant and estimator == "min_max":
        key = f"training_settings.averaging_constant: {training.averaging_constant:g}"
        yield key, "with range_estimator: min_max ranges only widen. Choose another one, or leave it out"
    if training.scale_learning_rate != default.scale_learning_rate and "learned" not in (estimator, training.weight_estimator):
        key = f"training_settings.scale_learning_rate: {training.scale_learning_rate:g}"
        yield key, "no scale is learned. Add range_estimator: learned or weight_estimator: learned"
    if training.freeze_batch_norm_at_step is not None and not any(layer.kind == "batch_norm" for layer in plan.graph):
        key = f"training_settings.freeze_batch_norm_at_step: {training.freeze_batch_norm_at_step}"
        yield key, "the model has no batch norm. Leave it out"
    if training.bias_correction and not any(layer.kind in ("conv", "conv_transpose", "linear") for layer in plan.graph):
        yield "training_settings.bias_correction: true", "the model has no convolution and no linear layer. Leave it out"


def _of_distillation(plan: QuantizationPlan) -> Iterator[tuple[str, str]]:
    distillation, default = plan.settings.distillation_settings, DistillationSettings()
    if distillation.weight:
        of_logits = distillation.on == "outputs" and distillation.loss != "mse"
        if distillation.temperature != default.temperature and not of_logits:
            key = f"distillation_settings.temperature: {distillation.temperature:g}"
            yield key, "it divides logits, and squared errors are compared. Leave it out"
        return
    for name in ("temperature", "on", "loss", "teacher"):
        if getattr(distillation, name) != getattr(default, name):
            yield f"distillation_settings.{name}", "there is no distillation. Add distillation_settings.weight, such as 0.7"


def _of_the_rest(plan: QuantizationPlan, stream: ResidualStream) -> Iterator[tuple[str, str]]:
    residual = plan.settings.global_quantization_settings.residual_stream
    if residual in ("int8", "float") and not stream.additions:
        key = f"global_quantization_settings.residual_stream: {residual}"
        yield key, "the model has no residual addition (of two activations of one shape). Leave it out"
    stages = [stage.weights_num_bits for stage in plan.settings.training_settings.stages]
    bits = [*stages, *(decision.weights_num_bits for decision in plan.decisions.values())]
    few = any(number is not None and number <= INT4_BITS for number in bits)
    budget = plan.settings.budget_settings
    chosen = any(goal is not None for goal in (budget.size, budget.average_bits, budget.bops, budget.accuracy_drop, budget.speed))
    if plan.settings.deployment_settings.int4 and not few and not chosen:
        yield "deployment_settings.int4: true", "no layer has weights of at most 4 bits. Add weights_num_bits: 4, or leave it out"
