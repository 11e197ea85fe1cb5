"""Reading and checking recipes: where they come from, the forms CLIKA writes them in, and what can be wrong with them."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_cco._yaml import check_interpolations, marked, parse_yaml
from lightning_cco.compat.omegaconf import root_of
from lightning_cco.errors import CCOError
from lightning_cco.names import Interpolated, nearest, printable, shown
from lightning_cco.settings import (
    RANGE_ESTIMATORS,
    SENSITIVITY_MODES,
    TARGET_FRAMEWORKS,
    WEIGHT_ESTIMATORS,
    Config,
    LayerRule,
    Settings,
    out_of_bounds,
)

_ALIASES = {"ov": "openvino", "trt": "tensorrt", "onnxruntime": "ort"}

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


_LONGEST_MATCH, _MOST_STARS = 4096, 20
_LARGEST = 32 * 2**20  # bytes of a recipe


def shipped_configs_dir() -> Path:
    """The folder of the shipped Hydra configs: inside the package when installed, beside it in a source tree.

    Raises:
        CCOError: Neither is there.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "cco").is_dir():
            return folder
    raise CCOError(f"The shipped configs are missing: expected {here / 'configs'}. Install lightning_cco again.")


def shipped_recipes() -> dict[str, Path]:
    """Path of each shipped recipe by its name."""
    return {path.stem: path for path in sorted((shipped_configs_dir() / "cco").glob("*.yaml"))}


def read(cfg: Config) -> dict[str, Any]:
    """Any form of a recipe as a plain dict, not checked yet."""
    if cfg is None:
        return {}
    if isinstance(cfg, Settings):
        return copy.deepcopy(vars(cfg))
    if isinstance(cfg, DictConfig):
        return dict(_resolved(cfg, "The recipe"))
    if isinstance(cfg, Mapping):
        return {str(key): value for key, value in cfg.items()}
    if isinstance(cfg, (str, Path)):
        return _read_file(cfg)
    raise CCOError(
        f"A recipe was expected: None, Settings, a mapping, a DictConfig, the path of a YAML file or the name of a shipped recipe; "
        f"{type(cfg).__name__} came. Write CCOCallback('w8a8') or CCOCallback({{'global_quantization_settings': {{'weights_num_bits': 8}}}})."
    )


def _read_file(cfg: str | Path) -> dict[str, Any]:
    path = Path(cfg)
    if not path.is_file():
        recipes = shipped_recipes()
        if str(cfg) in recipes:
            path = recipes[str(cfg)]
        elif path.suffix in (".yaml", ".yml") or path.parent != Path("."):
            raise CCOError(
                f"The recipe '{cfg}' is not a file. Give the path of a YAML file, or the name of a shipped recipe: {sorted(recipes)}."
            )
        else:
            raise CCOError(f"There is no recipe named '{cfg}'.{nearest(str(cfg), recipes)} The shipped ones are {sorted(recipes)}.")
    what = f"The recipe '{printable(cfg, 200)}'"
    try:
        if path.stat().st_size > _LARGEST:
            raise CCOError(f"{what}: a file of at most {_LARGEST:,} bytes was expected, one of {path.stat().st_size:,} came.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CCOError(f"{what} can't be read: {printable(error, 300)}") from error
    content = parse_yaml(text, what)
    if isinstance(content, dict) and "${" in text:
        content = _resolved(content, f"{what} is not valid YAML")
    if not isinstance(content, dict):
        came = "nothing" if content is None else f"a {type(content).__name__}"
        raise CCOError(f"The recipe '{cfg}' holds {came}; a mapping with keys such as global_quantization_settings was expected.")
    return {str(key): value for key, value in content.items()}


def _resolved(cfg: Any, what: str) -> Any:
    """A recipe with its interpolations resolved, as plain data."""
    try:
        config = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(cfg)
        check_interpolations(OmegaConf.to_container(root_of(config)))
        return marked(OmegaConf.to_container(config, resolve=True), OmegaConf.to_container(config))
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        said = "they refer to themselves" if isinstance(error, RecursionError) else printable(error, 300)
        raise CCOError(f"{what}: its interpolations can't be resolved: {said}") from error


def parse(raw: Mapping[str, Any]) -> Settings:
    """Build checked settings from a plain dict (or from one that holds the dataclasses themselves)."""
    _check_keys(raw, Settings, "")
    found = Settings()
    for section in ("global_quantization_settings", "training_settings", "monitoring_settings", "deployment_settings"):
        kind = type(getattr(found, section))
        values = raw.get(section)
        if values is not None:
            setattr(found, section, _section(values, kind, section))
    found.layer_settings = _rules(raw.get("layer_settings"))
    _check(found)
    for values in (found.training_settings, found.monitoring_settings, found.deployment_settings):
        for key, value in vars(values).items():
            if isinstance(value, Interpolated):  # only a rule is shown later
                setattr(values, key, str(value))
    return found


def _section(values: Any, kind: type, section: str) -> Any:
    if isinstance(values, kind):
        values = vars(values)
    if not isinstance(values, Mapping):
        raise CCOError(f"{section}: a mapping was expected, {type(values).__name__} came: {shown(values)}.")
    values = dict(values)
    if section == "global_quantization_settings":
        if values.pop("method", "qat") != "qat":
            raise CCOError("global_quantization_settings.method: only 'qat' (quantization-aware training) is there. Remove the key.")
        # CLIKA: "keep it null if unsure".
        values = {key: value for key, value in values.items() if value is not None or key.startswith("quantization_sensitivity")}
    _check_keys(values, kind, section)
    return _typed(kind, values, section)


def _typed(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a section or a rule from values of the right types. Not by OmegaConf: its conversion cuts 7.5 bits to 7, and takes 0.3 ms a value."""
    result = {}
    for key, value in values.items():
        expected = kind.__dataclass_fields__[key].type  # type: ignore[attr-defined]
        try:
            result[key] = None if value is None and expected.endswith("| None") else _CONVERT[expected.removesuffix(" | None")](value)
        except (TypeError, ValueError, OverflowError) as error:
            words = _WORDS[expected.removesuffix(" | None")] + (" or null" if expected.endswith("| None") else "")
            came = "str" if isinstance(value, str) else type(value).__name__
            raise CCOError(f"{where}.{key}: {words} was expected, {came} came: {shown(value)}.") from error
    for key, value in result.items():
        if problem := out_of_bounds(key, value):
            named = f" (match: {printable(format(result['match']), 160)})" if result.get("match") else ""
            raise CCOError(f"{where}{named}.{key}: {problem}")
    return kind(**result)


def _boolean(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):  # from an environment variable, say
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise TypeError


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, float, str)):
        raise TypeError
    converted = int(value)
    if not isinstance(value, str) and converted != value:
        raise ValueError
    return converted


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):  # text: YAML reads 1e4 as one
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return value if isinstance(value, Interpolated) else str(value)
    raise TypeError


def _texts(value: Any) -> list[str]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, (Sequence, Set)):
        raise TypeError
    return [_text(item) for item in value]


_CONVERT: Mapping[str, Callable[[Any], Any]] = {"bool": _boolean, "int": _integer, "float": _float, "str": _text, "list[str]": _texts}
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list[str]": "a list of names"}


def _check_keys(values: Mapping[str, Any], kind: type, where: str) -> None:
    fields = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    for key in values:
        if key in fields:
            continue
        full = printable(f"{where}.{key}" if where else key, 200)
        if key in _TRAINER_OWNS:
            raise CCOError(f"{full}: that is not the recipe's to say in Lightning. Remove it and write {_TRAINER_OWNS[key]}.")
        if key in _DROPPED:
            raise CCOError(f"{full}: lightning_cco has no such settings. Remove them; devices and strategy are arguments of the Trainer.")
        raise CCOError(f"{full}: unknown key.{nearest(str(key), fields)} The keys here are {fields}.")


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
            f"layer_settings: a list of rules was expected, {type(raw).__name__} came. Write [{{match: conv_1, skip_quantization: true}}]."
        )
    rules = []
    for number, rule in enumerate(raw):
        where = f"layer_settings[{number}]"
        values = vars(rule) if isinstance(rule, LayerRule) else rule
        if not isinstance(values, Mapping):
            raise CCOError(
                f"{where}: a mapping was expected, {type(rule).__name__} came: {shown(rule)}. Write {{match: conv_1, skip_quantization: true}}."
            )
        values = dict(values)
        if isinstance(values.get("skip_quantization_until"), str):
            values["skip_quantization_until"] = [values["skip_quantization_until"]]
        if values.get("skip_quantization_until", ()) is None:
            del values["skip_quantization_until"]
        _check_keys(values, LayerRule, where)
        rules.append(_typed(LayerRule, values, where))
    return rules


def _check(settings: Settings) -> None:
    training, monitoring = settings.training_settings, settings.monitoring_settings
    _one_of("training_settings.range_estimator", training.range_estimator, RANGE_ESTIMATORS)
    _one_of("training_settings.weight_estimator", training.weight_estimator, WEIGHT_ESTIMATORS)
    if not monitoring.sensitivity_modes:
        raise CCOError(f"monitoring_settings.sensitivity_modes: at least one of {list(SENSITIVITY_MODES)} was expected, none came.")
    for mode in monitoring.sensitivity_modes:
        _one_of("monitoring_settings.sensitivity_modes", mode, SENSITIVITY_MODES)
    for where, folder in (
        ("monitoring_settings.output_dir", monitoring.output_dir),
        ("deployment_settings.export_dir", settings.deployment_settings.export_dir),
    ):
        if folder is not None and "\0" in folder:
            raise CCOError(f"{where}: the path of a folder was expected, {shown(folder)} came.")
    target = settings.deployment_settings.target_framework.lower()
    settings.deployment_settings.target_framework = _ALIASES.get(target, target)
    _one_of("deployment_settings.target_framework", settings.deployment_settings.target_framework, TARGET_FRAMEWORKS)
    for number, rule in enumerate(settings.layer_settings):
        _check_rule(rule, f"layer_settings[{number}]")


def _check_rule(rule: LayerRule, where: str) -> None:
    if not rule.match:
        raise CCOError(
            f"{where}: `match` is missing: which layers is it about? Write a layer's name, a module's path or a glob, such as {{match: conv_1, ...}}."
        )
    where = f"{where} (match: {printable(f'{rule.match}', 160)})"
    for pattern in (rule.match, *rule.skip_quantization_until):
        if len(pattern) > _LONGEST_MATCH or pattern.count("*") > _MOST_STARS:
            raise CCOError(
                f"{where}: a name or glob of at most {_LONGEST_MATCH:,} characters and {_MOST_STARS} stars was expected, one of {len(pattern):,} characters "
                f"and {pattern.count('*'):,} stars came."
            )
    reaching = (
        "skip_quantization_until"
        if rule.skip_quantization_until
        else "skip_quantization_downstream"
        if rule.skip_quantization_downstream
        else ""
    )
    if reaching and rule.skip_quantization is not True:
        raise CCOError(f"{where}: {reaching} says how far a skip goes, but skip_quantization is not true. Add skip_quantization: true.")
    if rule.skip_quantization_until and rule.skip_quantization_downstream:
        raise CCOError(f"{where}: skip_quantization_until and skip_quantization_downstream contradict each other. Keep one of them.")


def _one_of(where: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise CCOError(f"{where}: one of {list(allowed)} was expected, {shown(value)} came.{nearest(value, allowed)}")
