"""The settings of a compression: what a recipe can say.

Names follow the CLIKA CCO guide. `load_settings` is the one way in: it reads every form a recipe comes in and checks every value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lightning_cco.errors import CCOError
from lightning_cco.files import write_file
from lightning_cco.names import literal, shown

Config: TypeAlias = "Settings | Mapping[str, Any] | str | Path | None"
"""What `load_settings` takes. A DictConfig is a mapping."""

RANGE_ESTIMATORS = ("auto", "moving_average", "min_max", "percentile", "mse")
WEIGHT_ESTIMATORS = ("auto", "minmax", "mse")
TARGET_FRAMEWORKS = ("ort", "openvino", "tensorrt")
SENSITIVITY_MODES = ("local", "accumulated")


# What a number may be, wherever it comes from: whether it is right, the words for it, and what to write instead.
_BOUNDS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "weights_num_bits": (lambda bits: 2 <= bits <= 8, "2 to 8 bits were", "To leave a layer in float write skip_quantization: true."),
    "activations_num_bits": (lambda bits: 2 <= bits <= 8, "2 to 8 bits were", "To leave a layer in float write skip_quantization: true."),
    "quantization_sensitivity_threshold": (lambda value: value >= 0, "a number of at least 0, or null, was", ""),
    "quantization_sensitivity_relative_threshold": (lambda value: value >= 0, "a number of at least 0, or null, was", ""),
    "stats_steps": (lambda steps: 1 <= steps <= 10**6, "at least 1 calibration batch, and at most a million, was", "Write 20."),
    "averaging_constant": (lambda value: 0 < value <= 1, "a number in (0, 1] was", "Write 0.05."),
    "percentile": (lambda value: 50 < value <= 100, "per cent in (50, 100] was", "Write 99.99."),
    "freeze_ranges_at_step": (lambda step: step >= 0, "a step of at least 0, or null, was", ""),
    "sensitivity_batches": (lambda count: 1 <= count <= 10**6, "at least 1, and at most a million, was", "Write 2."),
}


def out_of_bounds(key: str, value: object) -> str:
    """What is wrong with the number of a setting, in words; empty if nothing is. Other types are for `load_settings` to convert."""
    if key not in _BOUNDS or isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    right, expected, instead = _BOUNDS[key]
    return "" if right(value) else f"{expected} expected, {shown(value)} came. {instead}".rstrip()


class _Checked:
    """Refuses a number that is out of bounds where it is written: in the constructor and in an assignment."""

    def __setattr__(self, key: str, value: object) -> None:
        if problem := out_of_bounds(key, value):
            raise CCOError(f"{type(self).__name__}.{key}: {problem}")
        super().__setattr__(key, value)


@dataclass
class LayerQuantizationSettings(_Checked):
    """What is said of one layer, or of the layers from it on.

    Attributes:
        skip_quantization: True: don't quantize. False: quantize, even in the model's tail. None: not said.
        skip_quantization_until: With ``skip_quantization``: skip all layers between this one and these, this one included, these not.
        skip_quantization_downstream: With ``skip_quantization``: skip everything from this layer to the outputs.
        weights_num_bits: Bits of the weights, 2 to 8; None: the global value.
        activations_num_bits: Bits of the layer's output, 2 to 8; None: the global value.
    """

    skip_quantization: bool | None = None
    skip_quantization_until: list[str] = field(default_factory=list)
    skip_quantization_downstream: bool = False
    weights_num_bits: int | None = None
    activations_num_bits: int | None = None


@dataclass
class LayerRule(LayerQuantizationSettings):
    """The settings of the layers that ``match`` selects: a layer's name, a module's path, or a glob over either."""

    match: str = ""


@dataclass
class GlobalQuantizationSettings(_Checked):
    """What holds for every layer that no rule says otherwise of.

    Attributes:
        weights_num_bits: Bits of the weights, 2 to 8.
        activations_num_bits: Bits of the activations, 2 to 8.
        skip_tail_quantization: Skip the layers from each output up to the first weighted layer of every branch.
        automatic_skip_quantization: Skip the layers above the threshold from the next epoch on, instead of suggesting it.
        quantization_sensitivity_threshold: Quantization Sensitivity (L2 norm) above which a skip is suggested; None: no such threshold.
        quantization_sensitivity_relative_threshold: The same for the norm relative to the layer's output, and to what varies of it between the samples of a
            batch. Above the default of 0.5 (6 dB) skipping brings accuracy back, below 0.25 it does not (`benchmarks/skip_threshold.py`). None: no such
            threshold.
    """

    weights_num_bits: int = 8
    activations_num_bits: int = 8
    skip_tail_quantization: bool = True
    automatic_skip_quantization: bool = False
    quantization_sensitivity_threshold: float | None = 10000.0
    quantization_sensitivity_relative_threshold: float | None = 0.5


@dataclass
class TrainingSettings(_Checked):
    """Calibration and ranges.

    Attributes:
        stats_steps: Batches of the training loader for the calibration before the first step.
        range_estimator: ``moving_average``, ``min_max``, ``percentile`` or ``mse``; ``auto``: what is best at a tensor's bits, which is ``mse`` with
            ranges that are frozen after the calibration up to 4 bits, and ``moving_average`` above (`benchmarks/fashion.py`).
        weight_estimator: ``minmax``: scales of the largest magnitudes; ``mse``: those at which rounding and clipping of a channel lose least, found anew at
            each step; ``auto``: ``mse`` up to 4 bits, ``minmax`` above.
        averaging_constant: Share of a training batch in the moving average, in (0, 1].
        percentile: Per cent of the values that the ``percentile`` estimator covers at each end, in (50, 100].
        freeze_ranges_at_step: Global step from which ranges are frozen; 0: right after the calibration; None: never.
        skip_initial_evaluation: Don't validate the float model before training.
    """

    stats_steps: int = 20
    range_estimator: str = "auto"
    weight_estimator: str = "auto"
    averaging_constant: float = 0.05
    percentile: float = 99.99
    freeze_ranges_at_step: int | None = None
    skip_initial_evaluation: bool = False


@dataclass
class MonitoringSettings(_Checked):
    """What is measured and shown each epoch.

    Attributes:
        sensitivity_batches: Batches on which Quantization Sensitivity is measured, the same ones each epoch.
        sensitivity_modes: ``local``, ``accumulated``, or both.
        draw_graph: Draw the layer graph.
        output_dir: Folder for pictures and recipes; None: ``cco`` in the Trainer's log folder.
    """

    sensitivity_batches: int = 2
    sensitivity_modes: list[str] = field(default_factory=lambda: list(SENSITIVITY_MODES))
    draw_graph: bool = True
    output_dir: str | None = None


@dataclass
class DeploymentSettings:
    """Where the model is going.

    Attributes:
        target_framework: ``ort``, ``openvino`` (or ``ov``) or ``tensorrt`` (or ``trt``): decides which kinds of layer run in INT8.
        export_dir: Folder that the best checkpoint is exported to when ``fit`` ends; None: no export.
        amx: Whether files for ``ort`` are written for processors with AMX (Intel Xeon since 2023), where large convolutions then run up to twice as
            fast, on others a third slower; None: as the processor that exports.
        vnni: Whether files for ``ort`` are written for processors that add products of 8-bit integers without overflow (ARM; x86 with VNNI: Intel since
            2019, AMD since Zen 4). On others int8 weights give wrong sums, so False stores them as uint8; None: as the processor that exports.
            OpenVINO's sums overflow there, too, and it has no other product: False gives weights for ``openvino`` 7 bits instead of 8.
    """

    target_framework: str = "ort"
    export_dir: str | None = None
    amx: bool | None = None
    vnni: bool | None = None


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
    monitoring_settings: MonitoringSettings = field(default_factory=MonitoringSettings)
    deployment_settings: DeploymentSettings = field(default_factory=DeploymentSettings)
    layer_settings: list[LayerRule] = field(default_factory=list)

    def set_quantization_settings_for_layer(self, name: str, settings: LayerQuantizationSettings) -> None:
        """Say something of a layer; what was said of the same name before is replaced.

        Args:
            name: Layer name, module path or glob.
            settings: What to do with it.

        Raises:
            CCOError: The arguments are of other types, or the settings make no sense.
        """
        if not isinstance(name, str) or not isinstance(settings, LayerQuantizationSettings):
            raise CCOError(
                "set_quantization_settings_for_layer(name, settings) expects a layer name and LayerQuantizationSettings, "
                f"but {type(name).__name__} and {type(settings).__name__} came. Write "
                'set_quantization_settings_for_layer("conv_1", LayerQuantizationSettings(skip_quantization=True)).'
            )
        values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(LayerQuantizationSettings)}
        rule = LayerRule(**values, match=name)
        load_settings(Settings(layer_settings=[rule]))  # say what is wrong where it is written
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
        """The recipe as plain dicts, lists, strings and numbers. Rules carry only what they say."""
        plain = dataclasses.asdict(self)
        empty = dataclasses.asdict(LayerRule())
        for rule in plain["layer_settings"]:
            rule["skip_quantization_until"] = [str(name) for name in rule["skip_quantization_until"]]
        plain["layer_settings"] = [
            {"match": str(rule["match"]), **{key: value for key, value in rule.items() if key != "match" and value != empty[key]}}
            for rule in plain["layer_settings"]
        ]
        return plain

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML that `load_settings` reads back to an equal one.

        Raises:
            CCOError: It can't be written.
        """
        try:
            write_file(path, yaml.safe_dump(literal(self.to_dict()), sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise CCOError(f"The recipe '{path}' can't be written: {error}. Give the path of a file in a folder that can be.") from error


def generate_default_settings() -> Settings:
    """The default recipe: 8-bit weights and activations, the tail skipped."""
    return Settings()


def load_settings(cfg: Config = None) -> Settings:
    """Read a recipe in any of its forms and check it.

    Args:
        cfg: None for the defaults; Settings (a checked copy is returned); a mapping or DictConfig; the path of a YAML file; or the name of a
            shipped recipe, such as ``w8a8``.

    Raises:
        CCOError: A key is unknown, a value of the wrong type or out of its bounds, a file missing; the message says what to write.
    """
    from lightning_cco._recipes import parse, read  # imports the dataclasses above

    return parse(read(cfg))


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
