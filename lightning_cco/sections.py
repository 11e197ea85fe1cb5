"""The sections of a recipe, as dataclasses that refuse what can't be: where they are made, and where they are written to.

Values of other types are for `lightning_cco.settings.load_settings` to convert or to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lightning_cco.errors import CCOError
from lightning_cco.names import nearest, printable, shown

RANGE_ESTIMATORS = ("auto", "moving_average", "min_max", "percentile", "mse", "learned")
WEIGHT_ESTIMATORS = ("auto", "minmax", "mse", "learned")
RESIDUAL_STREAMS = ("auto", "quantized", "int8", "float")
TARGET_FRAMEWORKS = ("ort", "openvino", "tensorrt", "executorch", "litert")
SENSITIVITY_MODES = ("local", "accumulated")
DISTILLED = ("outputs", "layers")
COMPARISONS = ("auto", "kl", "mse")
_ALIASES = {"ov": "openvino", "trt": "tensorrt", "onnxruntime": "ort", "et": "executorch", "xnnpack": "executorch", "tflite": "litert"}
_LONGEST_MATCH, _MOST_STARS = 4096, 20
GROUP_SIZES = (16, 32, 64, 128, 256)
"""How many weights can have a scale together: what engines multiply."""

# What a number may be, wherever it comes from: whether it is right, the words for it, and what to write instead.
BOUNDS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "weights_num_bits": (lambda bits: 2 <= bits <= 8, "2 to 8 bits were", "To leave a layer in float write skip_quantization: true."),
    "activations_num_bits": (lambda bits: 2 <= bits <= 8, "2 to 8 bits were", "To leave a layer in float write skip_quantization: true."),
    "weights_group_size": (
        lambda size: size in (0, *GROUP_SIZES),
        "16, 32, 64, 128 or 256, or null, was",
        "Write 32.",
    ),
    "quantization_sensitivity_threshold": (lambda value: value >= 0, "a number of at least 0, or null, was", ""),
    "quantization_sensitivity_relative_threshold": (lambda value: value >= 0, "a number of at least 0, or null, was", ""),
    "loss_sensitivity_threshold": (lambda value: value >= 0, "a number of at least 0, or null, was", ""),
    "scale_learning_rate": (lambda rate: 0 < rate < float("inf"), "a number above 0 was", "Write 0.001."),
    "stats_steps": (lambda steps: 1 <= steps <= 10**6, "at least 1 calibration batch, and at most a million, was", "Write 20."),
    "averaging_constant": (lambda value: 0 < value <= 1, "a number in (0, 1] was", "Write 0.05."),
    "percentile": (lambda value: 50 < value <= 100, "per cent in (50, 100] was", "Write 99.99."),
    "freeze_ranges_at_step": (lambda step: step >= 0, "a step of at least 0, or null, was", ""),
    "weight": (lambda share: 0 <= share <= 1, "a number from 0 (no distillation) to 1 (nothing else) was", "Write 0.7."),
    "temperature": (lambda value: 0 < value < float("inf"), "a number above 0 was", "Write 2."),
    "start_at_step": (lambda step: step >= 0, "a step of at least 0, or null, was", ""),
    "at_step": (lambda step: step >= 0, "a step of at least 0 was", ""),
    "at_epoch": (lambda epoch: epoch >= 0, "an epoch of at least 0 was", ""),
    "freeze_batch_norm_at_step": (lambda step: step >= 0, "a step of at least 0, or null, was", ""),
    "size": (lambda part: 0 < part <= 1, "a part of the float file in (0, 1], or null, was", "Write 0.2."),
    "average_bits": (lambda bits: 2 <= bits <= 32, "2 to 32 bits per weight, or null, were", "Write 4."),
    "bops": (lambda part: 0 < part <= 1, "a part of the float model's operations in (0, 1], or null, was", "Write 0.1."),
    "speed": (lambda times: 0 < times <= 1000, "a multiple of the float model's speed in (0, 1000], or null, was", "Write 2."),
    "threads": (lambda count: 1 <= count <= 1024, "1 to 1024 threads were", "Write 1."),
    "batch_size": (lambda count: 1 <= count <= 10**6, "1 to a million samples were", "Write 1."),
    "accuracy_drop": (lambda drop: 0 <= drop < float("inf"), "a number of at least 0, or null, was", "Write 0.005."),
    "revise_every_n_epochs": (lambda count: 1 <= count <= 10**6, "at least 1, or null, was", "Write 5."),
    "sensitivity_batches": (lambda count: 1 <= count <= 10**6, "at least 1, and at most a million, was", "Write 2."),
}

CHOICES: Mapping[str, Sequence[str]] = {
    "range_estimator": RANGE_ESTIMATORS,
    "weight_estimator": WEIGHT_ESTIMATORS,
    "residual_stream": RESIDUAL_STREAMS,
    "on": DISTILLED,
    "loss": COMPARISONS,
    "sensitivity_modes": SENSITIVITY_MODES,
    "target_framework": TARGET_FRAMEWORKS,
    "by": ("", "budget"),
    "accuracy_drop_by": ("size", "speed"),
    "automatic_skip_by": ("qs", "loss"),
}
"""The words that a setting may be, or a list of."""


def problem_with(key: str, value: object) -> str:
    """What is wrong with the value of a setting, in words; empty if nothing is. Other types are for `load_settings` to convert."""
    if key in BOUNDS and isinstance(value, (int, float)) and not isinstance(value, bool):
        right, expected, instead = BOUNDS[key]
        return "" if right(value) else f"{expected} expected, {shown(value)} came. {instead}".rstrip()
    if key in CHOICES and isinstance(value, str):
        return _not_one_of(CHOICES[key], value, _target(value) if key == "target_framework" else value)
    if key in CHOICES and isinstance(value, list):
        if not value:
            return f"at least one of {list(CHOICES[key])} was expected, none came."
        return next((problem for word in value if isinstance(word, str) and (problem := _not_one_of(CHOICES[key], word, word))), "")
    if key in ("output_dir", "export_dir", "teacher", "layer_times") and isinstance(value, str) and "\0" in value:
        return f"the path of a {'folder' if key.endswith('_dir') else 'file'} was expected, {shown(value)} came."
    return ""


def _not_one_of(allowed: Sequence[str], written: str, meant: str) -> str:
    return "" if meant in allowed else f"one of {list(allowed)} was expected, {shown(written)} came.{nearest(written, allowed)}"


def _target(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())


def problem_with_rule(rule: Mapping[str, Any]) -> str:
    """What is wrong with the values of a rule together, in words that go on from its place in the recipe; empty if nothing is."""
    match, until = rule.get("match", ""), rule.get("skip_quantization_until") or []
    if not match:
        return (
            ": `match` is missing: which layers is it about? Write a layer's name, a module's path or a glob, such as {match: conv_1, ...}."
        )
    named = f" (match: {printable(f'{match}', 160)})"
    for pattern in (match, *until):
        if isinstance(pattern, str) and (len(pattern) > _LONGEST_MATCH or pattern.count("*") > _MOST_STARS):
            return (
                f"{named}: a name or glob of at most {_LONGEST_MATCH:,} characters and {_MOST_STARS} stars was expected, one of {len(pattern):,} characters "
                f"and {pattern.count('*'):,} stars came."
            )
    downstream = rule.get("skip_quantization_downstream")
    reaching = "skip_quantization_until" if until else "skip_quantization_downstream" if downstream else ""
    if reaching and rule.get("skip_quantization") is not True:
        return f"{named}: {reaching} says how far a skip goes, but skip_quantization is not true. Add skip_quantization: true."
    if rule.get("weight_only") and rule.get("skip_quantization") is not None:
        return f"{named}: weight_only says that the weights alone are quantized; skip_quantization says something else. Keep one of them."
    if rule.get("weights_group_size") and rule.get("weight_only") is False:
        return f"{named}: weights in groups (weights_group_size) are multiplied in float; weight_only: false says something else. Keep one of them."
    if until and downstream:
        return f"{named}: skip_quantization_until and skip_quantization_downstream contradict each other. Keep one of them."
    return ""


class _Checked:
    """Refuses a value that can't be where it is written: in the constructor and in an assignment."""

    def __setattr__(self, key: str, value: object) -> None:
        if problem := problem_with(key, value):
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
        weight_only: Quantize the weights alone: they are integers in the file, the layer is computed in float, and nothing is rounded for it. False: not, where
            it holds globally.
        weights_group_size: So many weights of an output share a scale, 16 to 256, as globally; 0: all of them; None: the global value.

    Example:
        >>> LayerQuantizationSettings(skip_quantization=True, skip_quantization_until=["add"]).skip_quantization_until
        ['add']
        >>> LayerQuantizationSettings(weights_num_bits=9)
        Traceback (most recent call last):
            ...
        lightning_cco.errors.CCOError: ...weights_num_bits...
    """

    skip_quantization: bool | None = None
    skip_quantization_until: list[str] = field(default_factory=list)
    skip_quantization_downstream: bool = False
    weights_num_bits: int | None = None
    activations_num_bits: int | None = None
    weight_only: bool | None = None
    weights_group_size: int | None = None


@dataclass
class LayerRule(LayerQuantizationSettings):
    """The settings of the layers that ``match`` selects: a layer's name, a module's path, or a glob over either.

    Attributes:
        by: ``budget`` if `budget_settings` has chosen it: then what the other rules say comes first.
    """

    match: str = ""
    by: str = ""

    def __post_init__(self) -> None:
        if problem := problem_with_rule(vars(self)):
            raise CCOError(f"LayerRule{problem}")


@dataclass
class GlobalQuantizationSettings(_Checked):
    """What holds for every layer that no rule says otherwise of.

    Attributes:
        weights_num_bits: Bits of the weights, 2 to 8.
        activations_num_bits: Bits of the activations, 2 to 8.
        weight_only: Quantize the weights alone, of every layer: they are integers in the file, and everything is computed in float.
        weights_group_size: So many weights that an output is made of share a scale: 16, 32, 64, 128 or 256, of linear layers, products with a matrix of
            weights, and embeddings, whose weights alone are then quantized (as with ``weight_only``). It must divide the number of a layer's inputs. For
            few bits: of 4, with 32 in a group, little is lost. None: all weights of an output.
        residual_stream: What residual additions make and read: ``quantized``: of ``activations_num_bits``, like all else; ``int8``: of 8 bits; ``float``: not
            rounded. Layers that multiply still read ``activations_num_bits``. ``auto``: ``int8`` up to 3 bits, ``quantized`` above (`benchmarks/fashion.py`).
        skip_tail_quantization: Skip the layers from each output up to the first weighted layer of every branch.
        automatic_skip_quantization: Skip the layers above the threshold from the next epoch on, instead of suggesting it.
        quantization_sensitivity_threshold: Quantization Sensitivity (L2 norm) above which a skip is suggested; None: no such threshold.
        quantization_sensitivity_relative_threshold: The same for the norm relative to the layer's output, and to what varies of it between the samples of a
            batch. Above the default of 0.5 (6 dB) skipping brings accuracy back, below 0.25 it does not (`benchmarks/skip_threshold.py`). None: no such
            threshold.
        automatic_skip_by: What skips are suggested by: ``qs``, the Quantization Sensitivity, or ``loss``, the expected rise of the loss.
        loss_sensitivity_threshold: Expected rise of the loss above which a skip is suggested, where it is measured; None: no such threshold.
    """

    weights_num_bits: int = 8
    activations_num_bits: int = 8
    weight_only: bool = False
    weights_group_size: int | None = None
    residual_stream: str = "auto"
    skip_tail_quantization: bool = True
    automatic_skip_quantization: bool = False
    quantization_sensitivity_threshold: float | None = 10000.0
    quantization_sensitivity_relative_threshold: float | None = 0.5
    automatic_skip_by: str = "qs"
    loss_sensitivity_threshold: float | None = 0.01


@dataclass
class BitsStage(_Checked):
    """From when on all layers without bits of their own have how many.

    Attributes:
        at_step: Global step from which the stage holds; or
        at_epoch: Epoch from which it does, counted from 0.
        weights_num_bits: Bits of the weights, 2 to 8; None: as before.
        activations_num_bits: Bits of the activations, 2 to 8; None: as before.
    """

    at_step: int | None = None
    at_epoch: int | None = None
    weights_num_bits: int | None = None
    activations_num_bits: int | None = None

    def __post_init__(self) -> None:
        if problem := problem_with_stage(vars(self)):
            raise CCOError(f"BitsStage{problem}")


def problem_with_stage(values: Mapping[str, Any]) -> str:
    """What is wrong with the values of a stage together, in words that go on from its place in the recipe; empty if nothing is."""
    whens = [key for key in ("at_step", "at_epoch") if values.get(key) is not None]
    if len(whens) != 1:
        came = "both" if whens else "neither"
        return f": at_step or at_epoch was expected, {came} came. Write {{at_step: 500, weights_num_bits: 4}}."
    if values.get("weights_num_bits") is None and values.get("activations_num_bits") is None:
        return f": a stage without bits changes nothing. Write {{{whens[0]}: {values[whens[0]]}, weights_num_bits: 4}}."
    return ""


def problem_with_stages(stages: Sequence[BitsStage]) -> str:
    """What is wrong with the order of stages, in words; empty if nothing is."""
    for key in ("at_step", "at_epoch"):
        times = [time for stage in stages if (time := getattr(stage, key)) is not None]
        if any(later <= earlier for earlier, later in pairwise(times)):
            return f"stages in the order of their time were expected, {key}: {', '.join(map(str, times))} came."
    return ""


@dataclass
class TrainingSettings(_Checked):
    """Calibration and ranges.

    Attributes:
        stats_steps: Batches of the training loader for the calibration before the first step.
        range_estimator: ``moving_average``, ``min_max``, ``percentile`` or ``mse``; ``auto``: what is best at a tensor's bits, which is ``mse`` with
            ranges that are frozen after the calibration up to 4 bits, and ``moving_average`` above (`benchmarks/fashion.py`). ``learned``: scale and
            offset begin there and are trained (LSQ+).
        weight_estimator: ``minmax``: scales of the largest magnitudes; ``mse``: those at which rounding and clipping of a channel lose least, found anew at
            each step; ``auto``: ``mse`` up to 4 bits, ``minmax`` above; ``learned``: they begin at those of ``mse`` and are trained (LSQ).
        scale_learning_rate: Learning rate of scales that are ``learned``, relative to each scale. In a Trainer it falls as that of the weights does.
        bias_correction: Measure in the calibration what rounding shifts the mean of each output channel by, and take it off the bias of convolutions and
            linear layers: for models that are calibrated only, above all with depthwise convolutions (`benchmarks/ptq.py`). The module's own biases stay as
            they are. A training that follows goes on with the corrections, which stay as they are. Keeps the calibration's batches, and takes thrice as long.
        averaging_constant: Share of a training batch in the moving average, in (0, 1].
        percentile: Per cent of the values that the ``percentile`` estimator covers at each end, in (50, 100].
        freeze_ranges_at_step: Global step from which ranges are frozen; 0: right after the calibration; None: never.
        start_at_step: Global step at which fake-quantization starts: before it the model is trained in float, at it ranges are calibrated; None: at once.
        stages: Bits that change in the training: ``{at_step: 500, weights_num_bits: 4, activations_num_bits: 4}``, or ``at_epoch``; they take the place of
            the global ones, bits of rules stay. Ranges of other bits are calibrated anew, on the batches that are trained on next.
        freeze_batch_norm_at_step: Global step from which batch norms keep their statistics: the network is then trained as it will be deployed; None: never.
        skip_initial_evaluation: Don't validate the float model before training.
        skip_calibrated_evaluation: Don't validate the model after its calibration, before training: what calibration alone gives, without training.
    """

    stats_steps: int = 20
    range_estimator: str = "auto"
    weight_estimator: str = "auto"
    scale_learning_rate: float = 0.001
    bias_correction: bool = False
    averaging_constant: float = 0.05
    percentile: float = 99.99
    freeze_ranges_at_step: int | None = None
    start_at_step: int | None = None
    stages: list[BitsStage] = field(default_factory=list)
    freeze_batch_norm_at_step: int | None = None
    skip_initial_evaluation: bool = False
    skip_calibrated_evaluation: bool = False


@dataclass
class DistillationSettings(_Checked):
    """Learning from the float model that the run started from, beside the training's own loss.

    The loss of a step becomes ``(1 - weight) * loss + weight * distillation``.

    Attributes:
        weight: Share of the distillation; 0: none; 1: the step's own loss is not used, so that no labels are needed.
        temperature: What logits are divided by before they are compared by Kullback-Leibler divergence, which is multiplied by its square.
        on: ``outputs``: what the network gives; ``layers``: what each layer with integer weights gives, its squared error relative to the float one.
        loss: How outputs are compared: ``kl``: logits of classes by Kullback-Leibler divergence; ``mse``: by the squared error; ``auto``: as the step's
            loss takes them: ``kl`` where it takes a softmax or a sigmoid of them, ``mse`` elsewhere.
        teacher: File of the float weights to learn from (a checkpoint or a ``state_dict``); None: those that the run starts from, which are kept in
            ``teacher.pt`` beside the pictures for a later resume.
    """

    weight: float = 0.0
    temperature: float = 2.0
    on: str = "outputs"
    loss: str = "auto"
    teacher: str | None = None


@dataclass
class MonitoringSettings(_Checked):
    """What is measured and shown each epoch.

    Attributes:
        sensitivity_batches: Batches on which Quantization Sensitivity is measured, the same ones each epoch.
        sensitivity_modes: ``local``, ``accumulated``, or both.
        loss_sensitivity: Measure the loss sensitivity, too: how much the loss is expected to rise by each rounding. Takes a backward for each batch, and each
            layer with weights four times more.
        draw_graph: Draw the layer graph.
        output_dir: Folder for pictures and recipes; None: ``cco`` in the Trainer's log folder.
    """

    sensitivity_batches: int = 2
    sensitivity_modes: list[str] = field(default_factory=lambda: list(SENSITIVITY_MODES))
    loss_sensitivity: bool = False
    draw_graph: bool = True
    output_dir: str | None = None


@dataclass
class BudgetSettings(_Checked):
    """What the compressed model may take: bits and skips are then chosen by what they cost. One goal, or none.

    Attributes:
        size: Size of the exported file, as a part of that of the same model with nothing quantized.
        average_bits: Bits per weight, on average over all that can be quantized; 32 where they stay in float.
        bops: Bit operations (multiplications by the bits of both operands) of the layers with weights, as a part of the float model's.
        accuracy_drop: How much of ``metric`` may be lost before the training; the smallest plan that loses no more is taken, or the fastest.
        metric: What is validated for ``accuracy_drop``, as it is logged: ``val_acc``.
        accuracy_drop_by: Which plan within ``accuracy_drop`` is taken: the smallest by ``size``, the fastest by ``speed``.
        speed: How many times as fast as the model in float it must be, as predicted from the times of its layers; alone, or beside a ``size`` or an
            ``accuracy_drop``.
        layer_times: File with times of the layers that was written before (`layer_times.json`), here or where the model will run; None: they are measured
            here, before the first step.
        threads: Threads of the engine when times are measured.
        batch_size: Samples of a batch then.
        revise_every_n_epochs: Choose anew at the start of every so many epochs, by the sensitivities of the weights as they are then; None: never.
    """

    size: float | None = None
    average_bits: float | None = None
    bops: float | None = None
    accuracy_drop: float | None = None
    metric: str | None = None
    accuracy_drop_by: str = "size"
    speed: float | None = None
    layer_times: str | None = None
    threads: int = 1
    batch_size: int = 1
    revise_every_n_epochs: int | None = None

    def __post_init__(self) -> None:
        if problem := problem_with_budget(vars(self)):
            raise CCOError(f"budget_settings: {problem}")


def problem_with_budget(values: Mapping[str, Any]) -> str:
    """What is wrong with the values of a budget together, in words; empty if nothing is."""
    goals = [goal for goal in ("size", "average_bits", "bops", "accuracy_drop") if values.get(goal) is not None]
    if len(goals) > 1:
        return f"one goal at a time was expected, {' and '.join(goals)} came. Keep one of them."
    speed = values.get("speed") is not None
    if speed and goals and goals[0] not in ("size", "accuracy_drop"):
        return f"speed goes alone, or together with size or accuracy_drop; {goals[0]} came. Keep one of them."
    goals += ["speed"] if speed else []
    if "accuracy_drop" in goals and not values.get("metric"):
        return "accuracy_drop is of a metric, which is missing. Write metric: val_acc, or what validation_step logs."
    if values.get("metric") and "accuracy_drop" not in goals:
        return f"metric: {shown(values['metric'])} is what accuracy_drop is of, which is missing. Write accuracy_drop: 0.005, or leave metric out."
    if values.get("accuracy_drop_by", "size") != "size" and "accuracy_drop" not in goals:
        return (
            "accuracy_drop_by says which plan within accuracy_drop is taken, which is missing. Write accuracy_drop: 0.005, or leave it out."
        )
    for key, what in (
        ("revise_every_n_epochs", "says how often a budget is revised"),
        ("layer_times", "is what a speed is predicted from"),
    ):
        if values.get(key) is not None and not goals:
            return f"{key} {what}, but there is no goal. Write one of size, average_bits, bops, accuracy_drop or speed."
    return ""


@dataclass
class DeploymentSettings(_Checked):
    """Where the model is going.

    Attributes:
        target_framework: ``ort``, ``openvino`` (or ``ov``), ``tensorrt`` (or ``trt``), ``executorch`` (or ``et``) or ``litert`` (or
            ``tflite``): decides which kinds of layer run in INT8, and what `export_dir` gets.
        export_dir: Folder that the best checkpoint is exported to when ``fit`` ends; None: no export.
        int4: Whether files store weights of at most 4 bits in 4 bits, half the size, which ONNX Runtime then computes in float; None: if `budget_settings`
            counts on it (a size, average bits, or an accuracy drop).
        amx: Whether files for ``ort`` are written for processors with AMX (Intel Xeon since 2023), where large convolutions then run up to twice as
            fast, on others a third slower; None: as the processor that exports.
        vnni: Whether files for ``ort`` are written for processors that add products of 8-bit integers without overflow (ARM; x86 with VNNI: Intel since
            2019, AMD since Zen 4). On others int8 weights give wrong sums, so False stores them as uint8; None: as the processor that exports.
            OpenVINO's sums overflow there, too, and it has no other product: False gives weights for ``openvino`` 7 bits instead of 8.
    """

    target_framework: str = "ort"
    export_dir: str | None = None
    int4: bool | None = None
    amx: bool | None = None
    vnni: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.target_framework, str):
            self.target_framework = _target(self.target_framework)
