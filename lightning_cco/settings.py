"""The settings of a compression: what a recipe can say.

Names follow the CLIKA CCO guide. `load_settings` is the one way in: it reads every form a recipe comes in and checks every value.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lightning_cco._parsing import parse, parse_rule, parsed
from lightning_cco._recipes import read
from lightning_cco._values import RANGE_ESTIMATORS, SENSITIVITY_MODES, TARGET_FRAMEWORKS, WEIGHT_ESTIMATORS
from lightning_cco.errors import CCOError
from lightning_cco.files import write_file
from lightning_cco.names import literal, nearest, printable
from lightning_cco.sections import (
    BitsStage,
    BudgetSettings,
    DeploymentSettings,
    DistillationSettings,
    GlobalQuantizationSettings,
    LayerQuantizationSettings,
    LayerRule,
    MonitoringSettings,
    TrainingSettings,
)

__all__ = [
    "RANGE_ESTIMATORS",
    "SENSITIVITY_MODES",
    "TARGET_FRAMEWORKS",
    "WEIGHT_ESTIMATORS",
    "BitsStage",
    "BudgetSettings",
    "Config",
    "DeploymentSettings",
    "DistillationSettings",
    "GlobalQuantizationSettings",
    "LayerQuantizationSettings",
    "LayerRule",
    "MonitoringSettings",
    "Settings",
    "TrainingSettings",
    "changed_settings",
    "generate_default_settings",
    "load_settings",
]

Config: TypeAlias = "Settings | Mapping[str, Any] | str | Path | None"
"""What `load_settings` takes. A DictConfig is a mapping."""


@dataclass
class Settings:
    """A whole recipe.

    >>> settings = generate_default_settings()
    >>> settings.set_quantization_settings_for_layer("conv", LayerQuantizationSettings(weights_num_bits=4))
    >>> settings.layer_settings[0].match, settings.layer_settings[0].weights_num_bits
    ('conv', 4)
    """

    global_quantization_settings: GlobalQuantizationSettings = field(default_factory=GlobalQuantizationSettings)
    training_settings: TrainingSettings = field(default_factory=TrainingSettings)
    distillation_settings: DistillationSettings = field(default_factory=DistillationSettings)
    monitoring_settings: MonitoringSettings = field(default_factory=MonitoringSettings)
    deployment_settings: DeploymentSettings = field(default_factory=DeploymentSettings)
    budget_settings: BudgetSettings = field(default_factory=BudgetSettings)
    layer_settings: list[LayerRule] = field(default_factory=list)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).__dataclass_fields__:
            raise CCOError(
                f"Settings.{printable(name, 80)}: there is no such section.{nearest(name, list(type(self).__dataclass_fields__))}"
            )
        super().__setattr__(name, parsed(name, value))

    def set_quantization_settings_for_layer(self, name: str, settings: LayerQuantizationSettings) -> None:
        """Say something of a layer; what was said of the same name before is replaced.

        Args:
            name: Layer name, module path or glob.
            settings: What to do with it.

        Raises:
            CCOError: The arguments are of other types, or the settings make no sense.

        Example:
            >>> settings = Settings()
            >>> settings.set_quantization_settings_for_layer("conv_1", LayerQuantizationSettings(skip_quantization=True))
            >>> settings.to_dict()["layer_settings"]
            [{'match': 'conv_1', 'skip_quantization': True}]
        """
        if not isinstance(name, str) or not isinstance(settings, LayerQuantizationSettings):
            raise CCOError(
                "set_quantization_settings_for_layer(name, settings) expected a layer name and LayerQuantizationSettings, "
                f"got {type(name).__name__} and {type(settings).__name__}. Write "
                'set_quantization_settings_for_layer("conv_1", LayerQuantizationSettings(skip_quantization=True)).'
            )
        values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(LayerQuantizationSettings)}
        rule = LayerRule(**values, match=name)
        parse_rule(rule, "layer_settings[0]")  # say what is wrong where it is written
        for position, known in enumerate(self.layer_settings):
            if known.match == name:
                self.layer_settings[position] = rule
                return
        self.layer_settings.append(rule)

    @classmethod
    def load_from_path(cls, path: str | Path) -> Settings:
        """Read a YAML file.

        Raises:
            CCOError: The file is missing, empty, or not a valid recipe.
        """
        return load_settings(Path(path))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain dicts, lists, strings and numbers. Rules carry only what they say.

        Example:
            >>> Settings().to_dict()["deployment_settings"]["target_framework"]
            'ort'
        """
        plain = dataclasses.asdict(self)
        fields = dataclasses.fields(LayerRule)
        unsaid = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}
        for rule in plain["layer_settings"]:
            rule["skip_quantization_until"] = [str(name) for name in rule["skip_quantization_until"]]
        plain["layer_settings"] = [
            {"match": str(rule["match"]), **{key: value for key, value in rule.items() if key != "match" and value != unsaid[key]}}
            for rule in plain["layer_settings"]
        ]
        return plain

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML that `load_settings` reads back to an equal one.

        Raises:
            CCOError: It can't be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Settings().save(f"{folder}/recipe.yaml")
            ...     load_settings(f"{folder}/recipe.yaml") == Settings()
            True
        """
        try:
            write_file(path, yaml.safe_dump(literal(self.to_dict()), sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise CCOError(f"The recipe '{path}' can't be written: {error}. Give the path of a file in a folder that can be.") from error


def generate_default_settings() -> Settings:
    """The default recipe: 8-bit weights and activations, the tail skipped.

    Example:
        >>> settings = generate_default_settings()
        >>> settings.global_quantization_settings.weights_num_bits
        8
    """
    return Settings()


def load_settings(cfg: Config = None) -> Settings:
    """Read a recipe in any of its forms and check it.

    Args:
        cfg: None for the defaults; Settings (a checked copy is returned); a mapping or DictConfig; the path of a YAML file; or the name of a
            shipped recipe, such as ``w8a8``.

    Raises:
        CCOError: A key is unknown, a value of the wrong type or out of its bounds, a file missing; the message says what to write.

    Example:
        >>> settings = load_settings({"global_quantization_settings": {"weights_num_bits": 4}, "layer_settings": [{"match": "conv", "weights_num_bits": 8}]})
        >>> settings.global_quantization_settings.weights_num_bits, settings.layer_settings[0].weights_num_bits
        (4, 8)
        >>> load_settings({"global_quantization_settings": {"weight_num_bits": 4}})
        Traceback (most recent call last):
            ...
        lightning_cco.errors.CCOError: ...weights_num_bits...
    """
    return Settings(**parse(copy.deepcopy(vars(cfg)) if isinstance(cfg, Settings) else read(cfg)))


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What two recipes, as `Settings.to_dict` gives them, say differently, in words.

    >>> changed_settings(Settings().to_dict(), load_settings("w4a4").to_dict())[0]
    'global_quantization_settings.weights_num_bits: 8 → 4'
    """
    found = []
    for section, values in after.items():
        old = before.get(section)
        if isinstance(values, Mapping) and isinstance(old, Mapping):
            found += [f"{section}.{key}: {old[key]} → {value}" for key, value in values.items() if key in old and old[key] != value]
        elif isinstance(values, list) and isinstance(old, list):
            found += [f"{section}: without {rule}" for rule in old if rule not in values]
            found += [f"{section}: with {rule}" for rule in values if rule not in old]
    return found
