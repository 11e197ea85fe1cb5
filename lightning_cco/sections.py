"""The sections of a recipe, as dataclasses that refuse what can't be: where they are made, and where they are written to.

A value that says the same in another type, such as "8" for 8, is converted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_cco._combinations import problem_with_budget, problem_with_deployment, problem_with_rule, problem_with_stage
from lightning_cco._values import SENSITIVITY_MODES, Checked, target_of
from lightning_cco.errors import CCOError


@dataclass
class LayerQuantizationSettings(Checked):
    """Settings of one layer, or of the layers from it on.

    Attributes:
        skip_quantization: True: leave the layer in float. False: quantize it, even in the model's tail. None: the rule says nothing of it.
        skip_quantization_until: With ``skip_quantization``: skip all layers from this one up to these, which are not skipped.
        skip_quantization_downstream: With ``skip_quantization``: skip all layers from this one to the outputs.
        weights_num_bits: Bits of the weights, 2 to 8; None: the global value.
        activations_num_bits: Bits of the layer's output, 2 to 8; None: the global value.
        weight_only: True: quantize only the weights; the layer is computed in float. False: not weight-only, although the global setting says so.
            None: the global value.
        weights_group_size: Weights per scale, 16 to 256, as in the global setting; 0: one scale per channel; None: the global value.
        weights_symmetric: False: zero points for weight-only weights, as in the global setting; None: the global value.
        activations_dynamic: Quantize the layer's input dynamically, as in the global setting; None: the global value.

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
    weights_symmetric: bool | None = None
    activations_dynamic: bool | None = None


@dataclass
class LayerRule(LayerQuantizationSettings):
    """The settings of the layers that ``match`` selects: a layer's name, a module's path, or a glob over either.

    Attributes:
        by: ``budget`` in rules that `budget_settings` has chosen: all other rules take precedence over them.
    """

    match: str = ""
    by: str = ""

    def __post_init__(self) -> None:
        if problem := problem_with_rule(vars(self)):
            raise CCOError(f"LayerRule{problem}")


@dataclass
class GlobalQuantizationSettings(Checked):
    """Settings of all layers, unless a rule in ``layer_settings`` says otherwise.

    Attributes:
        weights_num_bits: Bits of the weights, 2 to 8. With up to 4, convolutions that read the inputs of the model keep 8.
        activations_num_bits: Bits of the activations, 2 to 8. With up to 4, inputs of the model keep 8, and so do tensors that no layer multiplies as
            integers (that only additions, activation functions or float layers read): fewer would save nothing. A rule applies to these tensors, too.
        weight_only: Quantize only the weights, in all layers: they are integers in the file, and all layers compute in float.
        weights_group_size: Weights per scale, for group-wise quantization: 16, 32, 64, 128 or 256. For linear layers, matrix products with a weight, and
            embeddings, which are then weight-only. It must divide the number of a layer's inputs. Useful for few bits: with 4 bits and groups of 32
            little accuracy is lost. None: one scale per output channel.
        weights_symmetric: False: weight-only weights (``weight_only``, ``weights_group_size``) of linear layers, matrix products and embeddings have a zero
            point for each scale, and use all levels of their bits. At 2 to 4 bits the rounding error is a quarter to a third smaller
            (`benchmarks/weights_only.py`). Weights that an engine multiplies as integers are always symmetric.
        activations_dynamic: Dynamic quantization: the inputs of linear layers and matrix products with a weight are quantized to 8 bits, symmetric, with a
            scale that is computed at run time from the largest magnitude of each block of a row; nothing is calibrated. The layers are weight-only.
        residual_stream: Format of the tensors that residual additions read and produce: ``quantized``: ``activations_num_bits``; ``int8``: 8 bits;
            ``float``: not quantized. Layers that multiply read ``activations_num_bits`` in any case. ``auto``: ``int8`` up to 3 bits, ``quantized`` above
            (`benchmarks/fashion.py`).
        skip_tail_quantization: Leave the tail in float: the layers from each output back to the first layer with weights of every branch.
        automatic_skip_quantization: Skip the layers above a threshold from the next epoch on, instead of only suggesting it.
        quantization_sensitivity_threshold: Quantization Sensitivity (L2 norm) above which a skip is suggested; None: no such threshold.
        quantization_sensitivity_relative_threshold: The same for the relative error (QS over the norm of the layer's output), also of the part that varies
            between the samples of a batch. Above the default of 0.5 (6 dB) skipping restores accuracy, below 0.25 it does not
            (`benchmarks/skip_threshold.py`). None: no such threshold.
        automatic_skip_by: The criterion of suggested skips: ``qs``, the Quantization Sensitivity, or ``loss``, the expected rise of the loss.
        loss_sensitivity_threshold: Expected rise of the loss above which a skip is suggested, where it is measured; None: no such threshold.
    """

    weights_num_bits: int = 8
    activations_num_bits: int = 8
    weight_only: bool = False
    weights_group_size: int | None = None
    weights_symmetric: bool = True
    activations_dynamic: bool = False
    residual_stream: str = "auto"
    skip_tail_quantization: bool = True
    automatic_skip_quantization: bool = False
    quantization_sensitivity_threshold: float | None = 10000.0
    quantization_sensitivity_relative_threshold: float | None = 0.5
    automatic_skip_by: str = "qs"
    loss_sensitivity_threshold: float | None = 0.01


@dataclass
class BitsStage(Checked):
    """Bits of all layers without a rule, from a step or an epoch on.

    Attributes:
        at_step: Global step at which the stage begins; or
        at_epoch: Epoch at which it begins, counted from 0.
        weights_num_bits: Bits of the weights, 2 to 8; None: unchanged.
        activations_num_bits: Bits of the activations, 2 to 8; None: unchanged.
    """

    at_step: int | None = None
    at_epoch: int | None = None
    weights_num_bits: int | None = None
    activations_num_bits: int | None = None

    def __post_init__(self) -> None:
        if problem := problem_with_stage(vars(self)):
            raise CCOError(f"BitsStage{problem}")


@dataclass
class TrainingSettings(Checked):
    """Calibration, observers, and what changes during the training.

    Attributes:
        stats_steps: Batches of the training loader for the calibration.
        range_estimator: Observer of the activations: ``moving_average``, ``min_max``, ``percentile`` or ``mse`` (the range with the smallest squared error).
            ``auto``: ``mse`` for tensors of up to 4 bits, whose ranges are then frozen after the calibration, and ``moving_average`` above
            (`benchmarks/fashion.py`). ``learned``: scale and offset start at these values and are trained (LSQ+).
        weight_estimator: Scales of the weights: ``minmax``: from the largest magnitude of a channel; ``mse``: those with the smallest squared error,
            computed again at each step; ``auto``: ``mse`` up to 4 bits, ``minmax`` above; ``learned``: they start at those of ``mse`` and are trained (LSQ).
        scale_learning_rate: Learning rate of ``learned`` scales, relative to each scale. In a Trainer it decays with the learning rate of the optimizer.
        bias_correction: Measure in the calibration by how much quantization shifts the mean of each output channel, and subtract it from the bias of
            convolutions and linear layers. For models that are calibrated only (PTQ), especially with depthwise convolutions (`benchmarks/ptq.py`). The
            module's biases do not change, and a training does not update the corrections. The calibration holds its batches in memory, and takes three
            times as long.
        averaging_constant: Weight of a new batch in the moving average, in (0, 1].
        percentile: For the ``percentile`` observer, in (50, 100]: 99.99 clips 0.01 % of the values at each end.
        freeze_ranges_at_step: Global step from which ranges are frozen; 0: right after the calibration; None: never.
        start_at_step: Global step at which fake quantization starts. Before it the model is trained in float; at it the ranges are calibrated. None: from
            the first step on.
        stages: Bits that change during the training: ``{at_step: 500, weights_num_bits: 4, activations_num_bits: 4}``, or ``at_epoch``. They replace the
            global bits; bits in rules stay. Ranges whose bits change are calibrated again, on the following training batches.
        freeze_batch_norm_at_step: Global step from which batch norms use their running statistics, as at inference; None: never.
        skip_initial_evaluation: Don't validate the float model before the training.
        skip_calibrated_evaluation: Don't validate the calibrated model before the training (the accuracy of PTQ).
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
class DistillationSettings(Checked):
    """Distillation from the float model, in addition to the loss of the training.

    The loss of a step becomes ``(1 - weight) * loss + weight * distillation``.

    Attributes:
        weight: Weight of the distillation term; 0: no distillation; 1: the step's own loss is not used, so no labels are needed.
        temperature: Divides the logits before the Kullback-Leibler divergence, which is multiplied by its square.
        on: ``outputs``: compare the outputs of the network; ``layers``: compare the output of each layer with integer weights (relative squared error).
        loss: ``kl``: Kullback-Leibler divergence of class logits; ``mse``: squared error; ``auto``: ``kl`` where the step's loss computes a softmax or a
            sigmoid of the outputs, ``mse`` elsewhere.
        teacher: File with the float weights of the teacher (a checkpoint or a ``state_dict``); None: the weights at the start of the run, which are saved
            as ``teacher.pt`` in the output folder for a resumed run.
    """

    weight: float = 0.0
    temperature: float = 2.0
    on: str = "outputs"
    loss: str = "auto"
    teacher: str | None = None


@dataclass
class MonitoringSettings(Checked):
    """What is measured and shown each epoch.

    Attributes:
        sensitivity_batches: Number of batches for the Quantization Sensitivity, the same batches in each epoch.
        sensitivity_modes: ``local`` (each layer on float inputs), ``accumulated`` (the quantized model against the float model), or both.
        loss_sensitivity: Also measure how much the loss is expected to rise for each quantized tensor. Takes a backward for each batch, and computes each
            layer with weights four more times.
        draw_graph: Draw the layer graph.
        output_dir: Folder for all files of the run; None: ``cco`` in the Trainer's log folder.
    """

    sensitivity_batches: int = 2
    sensitivity_modes: list[str] = field(default_factory=lambda: list(SENSITIVITY_MODES))
    loss_sensitivity: bool = False
    draw_graph: bool = True
    output_dir: str | None = None


@dataclass
class BudgetSettings(Checked):
    """A limit for the compressed model: the bits of each layer, and the layers in float, are then chosen automatically. One goal, or none.

    Attributes:
        size: Size of the exported file, as a part of the size of the float file.
        average_bits: Average bits per weight of all weights that can be quantized; a weight in float counts 32.
        bops: Bit operations (multiplications times the bits of both operands) of the layers with weights, as a part of the float model's.
        accuracy_drop: How much ``metric`` may be worse after the calibration, before any training. The smallest plan within this limit is chosen, or the
            fastest.
        metric: Name of the logged validation metric for ``accuracy_drop``, such as ``val_acc``.
        accuracy_drop_by: Which plan within ``accuracy_drop`` is chosen: ``size``: the smallest; ``speed``: the fastest.
        speed: How many times as fast as the float model it must be, predicted from the times of the layers; alone, or together with ``size`` or
            ``accuracy_drop``.
        layer_times: File with measured times of the layers (`layer_times.json`), from this machine or that of the deployment; None: they are measured on
            this machine before the first step.
        threads: Threads of the engine for that measurement.
        batch_size: Batch size for that measurement.
        revise_every_n_epochs: Choose again at the start of every n-th epoch, from the sensitivities at that time; None: never.
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


@dataclass
class DeploymentSettings(Checked):
    """The engine, the processor and the file of the deployment.

    Attributes:
        target_framework: ``ort``, ``openvino`` (or ``ov``), ``tensorrt`` (or ``trt``), ``executorch`` (or ``et``), ``litert`` (or
            ``tflite``), ``coreml`` or ``qnn`` (or ``htp``): decides which kinds of layers run in INT8, and which file `export_dir` gets.
        export_dir: Folder to which ``fit`` exports the best checkpoint when it ends; None: no export.
        int4: Whether files store weights of at most 4 bits in 4 bits: half the size, but ONNX Runtime then computes these layers in float. None: only if
            `budget_settings` needs it (a size, average bits, or an accuracy drop).
        fp16: Whether files for ``tensorrt`` use 16-bit floats for the layers that are not in INT8.
        amx: Whether files for ``ort`` are written for processors with AMX (Intel Xeon since 2023): large convolutions are up to twice as fast there, and a
            third slower on other processors. None: decided by the processor of the exporting machine.
        vnni: Whether files for ``ort`` are written for processors that add products of 8-bit integers without overflow (ARM; x86 with VNNI: Intel since
            2019, AMD since Zen 4). On others sums of int8 weights overflow, so False stores weights as uint8. For ``openvino``, False limits weights to 7
            bits. None: decided by the processor of the exporting machine.
    """

    target_framework: str = "ort"
    export_dir: str | None = None
    int4: bool | None = None
    fp16: bool = False
    amx: bool | None = None
    vnni: bool | None = None

    def __post_init__(self) -> None:
        self.target_framework = target_of(self.target_framework)
        if problem := problem_with_deployment(vars(self)):
            raise CCOError(f"deployment_settings{problem}")
