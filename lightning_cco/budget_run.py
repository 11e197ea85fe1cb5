"""The budget's side of a run: when a plan is chosen, on which batches, by which loss, and what of it a checkpoint brings back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_cco.batches import ForwardFn, forward_through_step, model_context, on_a_copy, training_batches
from lightning_cco.budget.layer_times import LayerTimes, load_layer_times
from lightning_cco.budget.plan import BudgetPlan, budget_rules, goal_of
from lightning_cco.budget.search import BudgetSearch
from lightning_cco.budget.solver import need_scipy
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.example_batches import calls_of
from lightning_cco.export.engines import ENGINES, PROGRAMS
from lightning_cco.layer_timing import FileTimer, check_timing, engine_name
from lightning_cco.loss_sensitivity import ACTIVATIONS_BITS, WEIGHTS_BITS, LossSensitivityReport
from lightning_cco.quantization.plan import packs_weights
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.schedule import staged, stages_in
from lightning_cco.settings import BudgetSettings, Settings, load_settings
from lightning_cco.strategies import is_sharded

_BATCHES = 10
"""On how many of the batches of the calibration a plan's sensitivities are measured: two, as each epoch, are few to choose by."""


def check_budget(settings: Settings, trainer: pl.Trainer) -> None:
    """Say before a training what would keep a budget from being planned.

    Raises:
        CCOError: The solver is missing, or what is validated will not be.
    """
    budget = settings.budget_settings
    if goal_of(budget) is None:
        return
    need_scipy()
    target = settings.deployment_settings.target_framework
    if target in PROGRAMS and (budget.size is not None or (budget.accuracy_drop is not None and budget.accuracy_drop_by == "size")):
        rank_zero_warn(
            f"budget_settings: sizes are those of ONNX files, in float and compressed; those of {ENGINES[target].ending} files for {ENGINES[target].title} "
            "differ by what the engine stores beside the weights. Look at the size in the export's report; for a limit in bytes set a smaller size.",
            category=CCOWarning,
        )
    if needs_times(budget) or budget.layer_times is not None:
        check_timing(settings)
    if budget.accuracy_drop is not None and (trainer.fast_dev_run or trainer.barebones):  # type: ignore[attr-defined]
        raise CCOError(
            "budget_settings.accuracy_drop needs validations before the training, which fast_dev_run and barebones leave out. Write size instead."
        )
    if budget.accuracy_drop is not None and settings.training_settings.skip_initial_evaluation:
        raise CCOError(
            "budget_settings.accuracy_drop is against the float model's metric, but training_settings.skip_initial_evaluation: true leaves it unknown. "
            "Remove skip_initial_evaluation, or write another goal, such as size."
        )


def needs_times(budget: BudgetSettings) -> bool:
    """Whether a plan is chosen by a speed."""
    return budget.speed is not None or (budget.accuracy_drop is not None and budget.accuracy_drop_by == "speed")


def known_times(settings: Settings, kept: LayerTimes | None) -> LayerTimes | None:
    """The table of layer times that a plan is to be chosen by: the recipe's, or that of an earlier plan of this run; `None`: none yet.

    Raises:
        CCOError: The recipe's can't be read.
    """
    budget = settings.budget_settings
    if budget.layer_times is None:
        return kept
    table = load_layer_times(budget.layer_times)
    if settings.deployment_settings.target_framework == "ort":
        table.compare(engine_name(), budget.threads)
    return table


def recipe_of(settings: Settings, state: Mapping[str, Any] | None) -> Settings:
    """A recipe with the bits of the stages that had begun, and with the plan of a budget, that a checkpoint's state holds; as it is without.

    Args:
        settings: The recipe of the user.
        state: The callback's state; `None` if there is none.
    """
    settings = staged(settings, stages_in(state))
    saved = budget_rules(load_settings(state["settings"])) if state is not None else []
    if goal_of(settings.budget_settings) is None or not saved:
        return settings
    planned = load_settings(settings)
    planned.layer_settings += saved
    planned.budget_settings = load_settings(state["settings"]).budget_settings if state is not None else planned.budget_settings
    planned.global_quantization_settings.skip_tail_quantization = False
    return planned


def needs_plan(settings: Settings, planned: Settings) -> bool:
    """Whether a recipe has a budget that the one that a model runs with has no plan for."""
    return goal_of(settings.budget_settings) is not None and (
        not budget_rules(planned) or planned.budget_settings != settings.budget_settings
    )


def is_due(budget: BudgetSettings, epoch: int) -> bool:
    """Whether a budget is revised at the start of an epoch."""
    return budget.revise_every_n_epochs is not None and epoch > 0 and epoch % budget.revise_every_n_epochs == 0


def loss_of_step(trainer: pl.Trainer, quantized: QuantizedModel, batch: Any) -> ForwardFn | None:
    """The loss of the module's step, if it has one that can be differentiated; with nothing logged or optimized."""
    way = on_a_copy(lambda model, inputs: _loss_in(forward_through_step(model, inputs)))
    try:
        with model_context(trainer), quantized.evaluating(), quantized.forked_random(), torch.enable_grad():
            found = way(quantized.model, batch)
    except Exception as error:
        rank_zero_info(
            f"Loss sensitivity: the step returns no loss ({type(error).__name__}: {error}), so the outputs' divergence is measured instead."
        )
        return None
    return way if isinstance(found, Tensor) and found.numel() == 1 and found.requires_grad else None


def _loss_in(result: Any) -> Any:
    return result.get("loss") if isinstance(result, Mapping) else result


def measure_loss_sensitivity(
    trainer: pl.Trainer,
    quantized: QuantizedModel,
    forward: ForwardFn,
    batches: Iterable[Any],
    loss: ForwardFn | None,
    weights_bits: Sequence[int] = WEIGHTS_BITS,
    activations_bits: Sequence[int] = ACTIVATIONS_BITS,
) -> LossSensitivityReport:
    """The loss sensitivities on some batches, as the Trainer computes."""
    if is_sharded(quantized.model):
        raise CCOError(
            "loss sensitivity: this process holds only parts of the parameters. Measure on one process, or with a strategy such as ddp."
        )
    with model_context(trainer):
        return quantized.loss_sensitivity(batches, on_a_copy(forward), loss, weights_bits, activations_bits)


def measures_loss(settings: Settings) -> bool:
    """Whether the loss sensitivity is measured each epoch."""
    return settings.monitoring_settings.loss_sensitivity or settings.global_quantization_settings.automatic_skip_by == "loss"


def weight_counts(quantized: QuantizedModel) -> dict[str, int]:
    """How many weights each layer has that multiplies by some; what layers share counts for the first."""
    shapes = dict(quantized.model.named_parameters())
    found, seen = {}, set()
    for layer in quantized.graph:
        own = [name for name in layer.parameters[:1] if layer.weighted and name in shapes and name not in seen]
        seen.update(own)
        if own:
            found[layer.name] = sum(shapes[name].numel() for name in own)
    return found


def plan_budget(
    trainer: pl.Trainer,
    quantized: QuantizedModel,
    settings: Settings,
    forward: ForwardFn,
    held: Sequence[Any],
    validate: Callable[[], float] | None = None,
    times: LayerTimes | None = None,
) -> BudgetPlan:
    """Choose the plan of a budget, and plan the model so.

    Args:
        trainer: The Trainer.
        quantized: The module, hooked and calibrated.
        settings: The recipe of the user.
        forward: How a batch goes through the model.
        held: The held batches.
        validate: For ``accuracy_drop``: how much of the metric is lost as the model is planned then.
        times: The table of layer times of an earlier plan of this run.

    Raises:
        CCOError: No plan is within the budget.
    """
    budget = settings.budget_settings
    times = trainer.strategy.broadcast(known_times(settings, times) if trainer.is_global_zero else None)
    loss = loss_of_step(trainer, quantized, held[0])

    def calibrate(names: Any) -> None:
        batches = training_batches(trainer, max(1, settings.training_settings.stats_steps))
        with model_context(trainer):
            quantized.calibrate(batches, forward, names)
        quantized.uncalibrated = []

    def export_bytes() -> int:
        if not trainer.is_global_zero:
            return 0
        return exported_bytes(quantized, held, forward, packs_weights(settings), settings.deployment_settings.fp16)

    count = max(settings.monitoring_settings.sensitivity_batches, min(settings.training_settings.stats_steps, _BATCHES))
    timer = None
    if needs_times(budget) and times is None:
        calls, network = calls_of(quantized, held, forward)
        enabled = trainer.is_global_zero
        timer = FileTimer(quantized, *calls[0], network, packs_weights(settings), budget.threads, budget.batch_size, enabled)
    search = BudgetSearch(
        quantized,
        settings,
        calibrate,
        lambda *bits: measure_loss_sensitivity(trainer, quantized, forward, training_batches(trainer, count), loss, *bits),
        lambda model, batch: on_a_copy(forward)(model, batch),
        export_bytes,
        trainer.strategy.broadcast,
        timer,
        times,
    )
    with model_context(trainer):
        plan = search.find(held[0], None if validate is None else lambda _: validate())
    faster = (
        f" Predicted speed: {plan.chosen.speed:.3g} times that in float ({1e3 * plan.seconds:.3g} ms instead of {1e3 * plan.float_seconds:.3g} ms)."
        if plan.times is not None
        else ""
    )
    rank_zero_info(
        f"Budget ({plan.goal}: {plan.limit:g}): {plan.size_bytes:,.0f} of {plan.float_bytes:,.0f} bytes in float, "
        f"{plan.chosen.average_bits:.3g} bits per weight, expected rise of the {plan.loss} {plan.chosen.rise:.3g}.{faster}"
    )
    return plan


def lost_of(metric: str, original: Mapping[str, float], now: Mapping[str, float], directions: Mapping[str, str]) -> float:
    """How much of a metric is lost, as a positive number.

    Raises:
        CCOError: It was not validated, or it is not known whether more of it is better.
    """
    for when, values in (("of the float model", original), ("of the compressed model", now)):
        if metric not in values:
            known = f"There were: {', '.join(values)}" if values else "Nothing was logged, or there is no validation that can be repeated"
            raise CCOError(
                f"budget_settings.metric: the validation {when} logged no '{metric}'. {known}. Write one that validation_step logs."
            )
    if metric not in directions:
        raise CCOError(
            f"budget_settings.metric: whether more of '{metric}' is better is not known. Give it a name that says so (val_acc, val_loss), or monitor it: "
            f"ModelCheckpoint(monitor='{metric}', mode='max')."
        )
    return (original[metric] - now[metric]) * (1 if directions[metric] == "max" else -1)


def exported_bytes(quantized: QuantizedModel, held: Sequence[Any], forward: ForwardFn, int4: bool, fp16: bool = False) -> int:
    """Bytes of the file of a model as it is planned now.

    Raises:
        CCOError: It can't be exported.
    """
    calls, network = calls_of(quantized, held, forward)
    args, kwargs = calls[0]
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{type(quantized.model).__name__}_int8.onnx"
        return quantized.export_onnx(path, args, kwargs, check=False, network=network, int4=int4, fp16=fp16).size_bytes
