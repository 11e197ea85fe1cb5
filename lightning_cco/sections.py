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
        weights_symmetric: Whether weights that are quantized alone have no zero points, as globally; None: the global value.
        activations_dynamic: Whether what the layer reads is rounded by a range that is found when it runs, as globally; None: the global value.

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
        by: ``budget`` if `budget_settings` has chosen it: then what the other rules say comes first.
    """

    match: str = ""
    by: str = ""

    def __post_init__(self) -> None:
        if problem := problem_with_rule(vars(self)):
            raise CCOError(f"LayerRule{problem}")


@dataclass
class GlobalQuantizationSettings(Checked):
    """What holds for every layer that no rule says otherwise of.

    Attributes:
        weights_num_bits: Bits of the weights, 2 to 8. Up to 4, convolutions that read the inputs of the model keep 8.
        activations_num_bits: Bits of the activations, 2 to 8. Up to 4, inputs of the model keep 8, and so do tensors that no layer multiplies as integers
            (what an addition, an activation or a float layer reads alone): fewer would save nothing. A rule that names a layer counts for these as well.
        weight_only: Quantize the weights alone, of every layer: they are integers in the file, and everything is computed in float.
        weights_group_size: So many weights that an output is made of share a scale: 16, 32, 64, 128 or 256, of linear layers, products with a matrix of
            weights, and embeddings, whose weights alone are then quantized (as with ``weight_only``). It must divide the number of a layer's inputs. For
            few bits: of 4, with 32 in a group, little is lost. None: all weights of an output.
        weights_symmetric: False: weights that are quantized alone (``weight_only``, ``weights_group_size``), of the kinds that can be in groups, have a zero
            point beside each scale, and use all levels of their bits. At 2 to 4 bits they are off by a quarter to a third less (`benchmarks/weights_only.py`).
            Weights that an engine multiplies as integers are always symmetric.
        activations_dynamic: Round what linear layers and products with a matrix of weights read to 8 bits by a range that is found when they run, symmetric,
            from the largest magnitude in each row, or in each block of one, as the engine has it; nothing is calibrated. Their weights are then quantized
            alone.
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


@dataclass
class TrainingSettings(Checked):
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
        percentile: For the ``percentile`` estimator, in (50, 100]: 99.99 clips 0.01 % of the values at each end.
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
class DistillationSettings(Checked):
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
class MonitoringSettings(Checked):
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
class BudgetSettings(Checked):
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


@dataclass
class DeploymentSettings(Checked):
    """Where the model is going.

    Attributes:
        target_framework: ``ort``, ``openvino`` (or ``ov``), ``tensorrt`` (or ``trt``), ``executorch`` (or ``et``), ``litert`` (or
            ``tflite``), ``coreml`` or ``qnn`` (or ``htp``): decides which kinds of layer run in INT8, and what `export_dir` gets.
        export_dir: Folder that the best checkpoint is exported to when ``fit`` ends; None: no export.
        int4: Whether files store weights of at most 4 bits in 4 bits, half the size, which ONNX Runtime then computes in float; None: if `budget_settings`
            counts on it (a size, average bits, or an accuracy drop).
        fp16: Whether files for ``tensorrt`` have floats of 16 bits for what is not in INT8, in which it then computes that.
        amx: Whether files for ``ort`` are written for processors with AMX (Intel Xeon since 2023), where large convolutions then run up to twice as
            fast, on others a third slower; None: as the processor that exports.
        vnni: Whether files for ``ort`` are written for processors that add products of 8-bit integers without overflow (ARM; x86 with VNNI: Intel since
            2019, AMD since Zen 4). On others int8 weights give wrong sums, so False stores them as uint8; None: as the processor that exports.
            OpenVINO's sums overflow there, too, and it has no other product: False gives weights for ``openvino`` 7 bits instead of 8.
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
