"""From plain data to the sections of a recipe: the forms CLIKA writes them in, types, and keys that are not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cco._combinations import problem_with_rule, problem_with_stage, problem_with_stages
from lightning_cco._values import STAGES, converted, not_of_type, problem_with
from lightning_cco.errors import CCOError
from lightning_cco.names import Interpolated, nearest, printable, shown
from lightning_cco.sections import (
    BitsStage,
    BudgetSettings,
    DeploymentSettings,
    DistillationSettings,
    GlobalQuantizationSettings,
    LayerRule,
    MonitoringSettings,
    TrainingSettings,
)

_SECTIONS: Mapping[str, type] = {
    "global_quantization_settings": GlobalQuantizationSettings,
    "training_settings": TrainingSettings,
    "distillation_settings": DistillationSettings,
    "monitoring_settings": MonitoringSettings,
    "deployment_settings": DeploymentSettings,
    "budget_settings": BudgetSettings,
}

# What CLIKA's recipes set and Lightning's Trainer owns.
_TRAINER_OWNS = {
    "num_epochs": "Trainer(max_epochs=...)",
    "steps_per_epoch": "Trainer(limit_train_batches=...)",
    "evaluation_steps": "Trainer(limit_val_batches=...)",
    "grads_acc_steps": "Trainer(accumulate_grad_batches=...)",
    "grads_accumulation_steps": "Trainer(accumulate_grad_batches=...)",
    "amp_dtype": 'Trainer(precision="bf16-mixed")',
    "mixed_precision": 'Trainer(precision="bf16-mixed")',
    "weights_dtype": 'Trainer(precision="bf16-true")',
    "clip_grad_norm_val": "Trainer(gradient_clip_val=...)",
    "clip_grad_norm_type": 'Trainer(gradient_clip_algorithm="norm")',
    "random_seed": "lightning.pytorch.seed_everything(...)",
    "print_interval": "Trainer(log_every_n_steps=...)",
    "print_ma_window_size": "Trainer(log_every_n_steps=...)",
    "save_interval": "ModelCheckpoint(every_n_epochs=...)",
    "reset_train_data": "Trainer(reload_dataloaders_every_n_epochs=1)",
    "reset_eval_data": "Trainer(reload_dataloaders_every_n_epochs=1)",
    "lr_warmup_epochs": "a scheduler in configure_optimizers",
    "lr_warmup_steps_per_epoch": "a scheduler in configure_optimizers",
    "multi_gpu": 'Trainer(devices=..., strategy="ddp")',
    "use_sharding": 'Trainer(devices=..., strategy="ddp")',
    "is_training_from_scratch": "nothing: train float first, then compress",
    "skip_initial_eval": "training_settings.skip_initial_evaluation",
}
_DROPPED = {"distributed_training_settings", "global_lora_settings"}


def parse(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The checked sections of a recipe and its rules, from a plain dict (or from one that holds the dataclasses themselves).

    Raises:
        CCOError: A key is unknown, a value of the wrong type or out of its bounds; the message says what to write.
    """
    _check_keys(raw, [*_SECTIONS, "layer_settings"], "")
    found: dict[str, Any] = {name: _section(raw[name], kind, name) for name, kind in _SECTIONS.items() if raw.get(name) is not None}
    return {**found, "layer_settings": _rules(raw.get("layer_settings"))}


def parsed(name: str, value: Any) -> Any:
    """What a part of a recipe is: a section or a list of rules as it is if it is one, else made of plain data.

    Raises:
        CCOError: It can't be, as for `parse`.
    """
    kind: Any = _SECTIONS.get(name, list)
    if isinstance(value, kind) and (kind is not list or all(isinstance(rule, LayerRule) for rule in value)):
        return value
    return kind() if value is None else parse({name: value})[name]


def _section(values: Any, kind: type, section: str) -> Any:
    if isinstance(values, kind):
        values = vars(values)
    if not isinstance(values, Mapping):
        raise CCOError(f"{section}: expected a mapping, got {type(values).__name__}: {shown(values)}.")
    values = {"on" if key is True else key: value for key, value in values.items()}  # YAML reads the key `on` as true
    if section == "global_quantization_settings":
        if values.pop("method", "qat") != "qat":
            raise CCOError("global_quantization_settings.method: only 'qat' (quantization-aware training) is there. Remove the key.")
        # CLIKA: "keep it null if unsure".
        values = {key: value for key, value in values.items() if value is not None or key.startswith("quantization_sensitivity")}
    _check_keys(values, list(kind.__dataclass_fields__), section)  # type: ignore[attr-defined]
    # Only a rule is shown later, and needs to know that a text of it comes from an interpolation.
    return kind(**{key: str(v) if isinstance(v, Interpolated) else v for key, v in _typed(kind, values, section).items()})


def _typed(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a section or a rule, of the right types. Not by OmegaConf: its conversion cuts 7.5 bits to 7, and takes 0.3 ms a value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        expected = kind.__dataclass_fields__[key].type  # type: ignore[attr-defined]
        try:
            result[key] = _stages(value, f"{where}.{key}") if expected == STAGES else converted(value, expected)
        except (TypeError, ValueError, OverflowError) as error:
            raise CCOError(f"{where}.{key}: {not_of_type(value, expected)}") from error
    for key, value in result.items():
        if problem := problem_with(key, value):
            named = f" (match: {printable(format(result['match']), 160)})" if result.get("match") else ""
            raise CCOError(f"{where}{named}.{key}: {problem}")
    return result


def _stages(values: Any, where: str) -> list[BitsStage]:
    if values is None:
        return []
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise TypeError
    found = []
    for number, value in enumerate(values):
        place = f"{where}[{number}]"
        given = vars(value) if isinstance(value, BitsStage) else value
        if not isinstance(given, Mapping):
            raise CCOError(
                f"{place}: expected a mapping, got {type(value).__name__}: {shown(value)}. Write {{at_step: 500, weights_num_bits: 4}}."
            )
        _check_keys(given, list(BitsStage.__dataclass_fields__), place)
        typed = _typed(BitsStage, given, place)
        if problem := problem_with_stage(typed):
            raise CCOError(f"{place}{problem}")
        found.append(BitsStage(**typed))
    if problem := problem_with_stages(found):
        raise CCOError(f"{where}: {problem}")
    return found


def _check_keys(values: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    for given in values:
        key = given if isinstance(given, str) else shown(given)
        if key in fields:
            continue
        full = printable(f"{where}.{key}" if where else key, 200)
        if key in _TRAINER_OWNS:
            raise CCOError(f"{full}: that is not the recipe's to say in Lightning. Remove it and write {_TRAINER_OWNS[key]}.")
        if key in _DROPPED:
            raise CCOError(f"{full}: lightning_cco has no such settings. Remove them; devices and strategy are arguments of the Trainer.")
        raise CCOError(f"{full}: unknown key.{nearest(key, fields)} The keys here are {fields}.")


def _rules(raw: Any) -> list[LayerRule]:
    if raw is None:
        return []
    if isinstance(raw, Mapping):  # CLIKA's form: {conv: {quantization_settings: {...}}}
        raw = [
            {"match": name, **(value.get("quantization_settings", value) if isinstance(value, Mapping) else {"": value})}
            for name, value in raw.items()
        ]
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise CCOError(
            f"layer_settings: expected a list of rules, got {type(raw).__name__}. Write [{{match: conv_1, skip_quantization: true}}]."
        )
    return [parse_rule(rule, f"layer_settings[{number}]") for number, rule in enumerate(raw)]


def parse_rule(rule: Any, where: str) -> LayerRule:
    """One checked rule.

    Args:
        rule: A mapping, or a rule.
        where: Its place in the recipe, for errors.

    Raises:
        CCOError: A key is unknown, a value of the wrong type or out of its bounds, or they make no sense together.
    """
    values = vars(rule) if isinstance(rule, LayerRule) else rule
    if not isinstance(values, Mapping):
        raise CCOError(
            f"{where}: expected a mapping, got {type(rule).__name__}: {shown(rule)}. Write {{match: conv_1, skip_quantization: true}}."
        )
    values = dict(values)
    if isinstance(values.get("skip_quantization_until"), str):
        values["skip_quantization_until"] = [values["skip_quantization_until"]]
    if values.get("skip_quantization_until", ()) is None:
        del values["skip_quantization_until"]
    _check_keys(values, list(LayerRule.__dataclass_fields__), where)
    typed = _typed(LayerRule, values, where)
    if problem := problem_with_rule(typed):
        raise CCOError(f"{where}{problem}")
    return LayerRule(**typed)
