"""What an export says of the file it wrote."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import wrap

from lightning_cco.export.island_kinds import FloatIsland
from lightning_cco.files import write_file
from lightning_cco.number_format import number_of

LOW_SQNR_DB = 15.0
"""Below this the report says why outputs can differ while each layer is right."""
_MOST_KINDS = 10
_LONGEST = 200  # characters of a line
_CONTENT = 22  # where the content of a line begins


@dataclass
class LayerDifference:
    """How far the engine's tensor is from the fake-quantized one that is computed from the engine's own tensors before it.

    Attributes:
        layer: Name of the tensor's quantizer.
        largest_steps: Largest difference in steps of its scale.
        mean_steps: Mean difference in steps.
        far_share: Share of values that are more than one step off.
        values: How many values were compared.
    """

    layer: str
    largest_steps: float
    mean_steps: float
    far_share: float = 0.0
    values: int = 0


@dataclass
class OutputDifference:
    """How far an output of the file is from the fake-quantized model's.

    Attributes:
        name: The output.
        sqnr_db: Signal-to-noise ratio, from end to end.
        varying_sqnr_db: The same of the deviation from each batch's mean, so that a constant part hides nothing.
        largest_difference: Largest absolute difference, from end to end.
        mean_difference: Mean absolute difference, from end to end.
        local_difference: Largest difference from the output that the model computes from the engine's quantized tensors, over the output's largest value.
        class_axis: The axis that the arg-max is over; `None`: it has no classes.
        agreement: Share of equal arg-max over it.
        integers: Whether it holds indices, counts or masks; ``local_difference`` is then the largest share of a batch that differs.
    """

    name: str
    sqnr_db: float
    varying_sqnr_db: float
    largest_difference: float
    mean_difference: float
    local_difference: float
    class_axis: int | None
    agreement: float
    integers: bool = False


@dataclass
class ExportReport:
    """A written file, compared with the fake-quantized model on held batches.

    Attributes:
        path: The file.
        size_bytes: Its size.
        inputs: For each input the sizes of its axes; a name for a dynamic axis.
        float_size_bytes: Size of the float parameters and buffers.
        sqnr_db: Signal-to-noise ratio of the outputs against the fake-quantized model's, from end to end.
        varying_sqnr_db: The same of the deviation from each batch's mean, so that a constant part hides nothing.
        agreement: Share of equal arg-max over the class axis of the first output.
        largest_difference: Largest absolute difference of an output.
        mean_difference: Mean absolute difference of the outputs.
        batches: How many batches both were run on.
        variations: How many more batches were made from those: negated and scaled floats, or other ids.
        outputs: Differences of each output.
        layers: Difference of each quantized tensor, in execution order, each computed from the engine's tensors before it.
        faults: Layers whose stored values differ from those of the model, and which.
        uncompared: Quantized tensors that could not be compared, and why.
        integer_nodes: After the engine's optimization: how many nodes of each kind compute in INT8.
        float_nodes: How many nodes of each kind compute in float, without those that only move values.
        float_islands: The layers of those nodes, and why they are in float.
        in_groups: How many layers have weights in groups that the engine uses as integers.
        as_floats: Layers with weights in groups that the engine converts to floats in every run.
        zero_points: How many of the layers in ``in_groups`` have zero points.
        dynamic: Layers whose inputs are dynamically quantized to 8 bits, as planned.
        unasked: Layers that the plan leaves in float and that the engine computes in INT8.
        conversions: Quantize and dequantize nodes left between them.
        notes: Remarks, for instance that weights of few bits are stored in 8.
        target: The engine that the file is for and its version, if it was run in another than ONNX Runtime.
        target_sqnr_db: SQNR of the outputs in that engine.
        target_nodes: How many products of each kind it computes in INT8; if it lists all its operators, how many of these.
        target_largest_steps: Largest difference of a quantized tensor in it, in steps of its scale, computed from its own tensors before it.
        target_floats: How many operators of each kind it computes in float.
        batch_limits: Limits of the batch size of a file whose batch is dynamic.
        random: Operators of the file that draw random numbers in every run.
        widened: Types that the model casts to, and that the file computes in float32.
    """

    path: str
    size_bytes: int = 0
    float_size_bytes: int = 0
    sqnr_db: float = float("nan")
    varying_sqnr_db: float = float("nan")
    agreement: float = float("nan")
    largest_difference: float = float("nan")
    mean_difference: float = float("nan")
    batches: int = 0
    batches_from: str = ""
    variations: int = 0
    outputs: list[OutputDifference] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    uncompared: dict[str, str] = field(default_factory=dict)
    integer_nodes: dict[str, int] = field(default_factory=dict)
    float_nodes: dict[str, int] = field(default_factory=dict)
    float_islands: list[FloatIsland] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)
    in_groups: int = 0
    as_floats: list[str] = field(default_factory=list)
    zero_points: int = 0
    dynamic: list[str] = field(default_factory=list)
    conversions: int = 0
    notes: list[str] = field(default_factory=list)
    target: str = ""
    target_sqnr_db: float = float("nan")
    target_nodes: dict[str, int] = field(default_factory=dict)
    target_largest_steps: float = float("nan")
    target_floats: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, list[int | str]] = field(default_factory=dict)
    batch_limits: list[str] = field(default_factory=list)
    widened: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)

    @property
    def size_ratio(self) -> float:
        """Size over that of the float parameters."""
        return self.size_bytes / max(1, self.float_size_bytes)

    @property
    def largest_steps(self) -> float:
        """Largest difference of any quantized tensor, in steps of its scale."""
        return max((entry.largest_steps for entry in self.layers), default=float("nan"))

    @property
    def mean_steps(self) -> float:
        """Mean over the quantized tensors of their mean difference in steps."""
        return sum(entry.mean_steps for entry in self.layers) / len(self.layers) if self.layers else float("nan")

    @property
    def local_difference(self) -> float:
        """Largest difference of an output from the one that the model computes from the engine's quantized tensors, over its largest value."""
        return max((entry.local_difference for entry in self.outputs), default=float("nan"))

    @property
    def beside(self) -> Path:
        """The path of the saved report: ``model.onnx.export_report.json`` in the folder of ``model.onnx``, one for each file."""
        path = Path(self.path)
        return path.with_name(f"{path.name}.export_report.json")

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        ratios = {"size_ratio": self.size_ratio, "largest_steps": self.largest_steps, "mean_steps": self.mean_steps}
        write_file(path, json.dumps({**asdict(self), **ratios}, indent=2))

    def __str__(self) -> str:
        lines = [
            f"INT8 file: {self.path}",
            f"  size                {self.size_bytes:,} bytes, {self.size_ratio:.3f} of the float parameters",
        ]
        if self.inputs:
            lines.append(
                "  takes               " + ", ".join(f"{name} [{', '.join(map(str, axes))}]" for name, axes in self.inputs.items())
            )
        if self.batches:
            axis = self.outputs[0].class_axis if self.outputs else None
            agreement = f", same arg-max {100 * self.agreement:.1f} % over axis {axis}" if self.agreement == self.agreement else ""
            lines += [
                f"  against fake-quant  SQNR {self.sqnr_db:.1f} dB{agreement}, outputs differ by {self.largest_difference:.3g} at most, "
                f"{self.mean_difference:.3g} on average ({number_of(self.batches, self.batches_from or 'batches', 'batch')}, "
                f"{number_of(self.variations, 'variations', 'variation')})",
                *self._by_output(),
                *self._by_tensor(),
                f"  runs in INT8        {_counts(self.integer_nodes)}",
                f"  runs in float       {_counts(self.float_nodes)}; {self.conversions} conversions between them",
                *(
                    [
                        f"  weights in blocks   multiplied or looked up as they are in {self.in_groups - len(self.as_floats)} of {self.in_groups} layers"
                        + (f", in {self.zero_points} of them with zero points" if self.zero_points else "")
                    ]
                    if self.in_groups
                    else []
                ),
                *(
                    [f"  rounded as it runs  what {len(self.dynamic)} products read, in int8 with a scale for each block of a row"]
                    if self.dynamic
                    else []
                ),
                *(
                    [
                        f"  in {self.target:<16} {self._in_target()}, in INT8: {_counts(self.target_nodes)}"
                        + (f"; in float: {_counts(self.target_floats)}" if self.target_floats else "")
                    ]
                    if self.target
                    else []
                ),
                *self._islands(),
            ]
        else:
            lines.append("  not checked")
        file, *others = [*lines, *(f"  note: {note}" for note in self.notes)]
        return "\n".join([file, *(part for line in others for part in _folded(line))])

    def _in_target(self) -> str:
        return f"SQNR {self.target_sqnr_db:.1f} dB" if self.target_sqnr_db == self.target_sqnr_db else "not run"

    def _by_tensor(self) -> list[str]:
        worst = max(self.layers, key=lambda entry: entry.mean_steps, default=None)
        if worst is None:
            return []
        steps = number_of(round(self.largest_steps), "steps", "step")
        return [
            f"  layer by layer      at most {steps}, {self.mean_steps:.1g} on average; most in '{worst.layer}': {worst.mean_steps:.1g} on average"
            if self.largest_steps
            else f"  layer by layer      no difference in any of {len(self.layers)} rounded tensors",
            *(f"  not compared        {layer}: {why}" for layer, why in self.uncompared.items()),
        ]

    def _by_output(self) -> list[str]:
        """What the one number of all outputs hides: noise beside what varies, outputs apart, and layers that are right while the outputs differ."""
        lines = []
        if self.varying_sqnr_db == -math.inf and math.isfinite(self.sqnr_db):
            lines.append("  between samples     nothing differs: the fake-quantized model gives all samples of a batch the same outputs")
        elif self.varying_sqnr_db < self.sqnr_db - 3:
            lines.append(f"  between samples     SQNR {self.varying_sqnr_db:.1f} dB of what differs between the samples of a batch")
        for entry in self.outputs if len(self.outputs) > 1 else []:
            agreement = (
                f", same arg-max {100 * entry.agreement:.1f} % over axis {entry.class_axis}" if entry.agreement == entry.agreement else ""
            )
            lines.append(f"  output {entry.name:<12} SQNR {entry.sqnr_db:.1f} dB{agreement}")
        if self.sqnr_db < LOW_SQNR_DB:
            lines.append(
                "  though              each layer is right: this network amplifies differences of one rounding step, on any engine"
            )
        return lines

    def _islands(self) -> list[str]:
        """One line for each reason: its layers, and the operators they became."""
        grouped: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
        for island in self.float_islands:
            layers, operators = grouped.setdefault(island.reason, ({}, {}))
            layers.update(dict.fromkeys(island.layers))
            operators[island.operator] = None
        lines = []
        for reason, (layers, operators) in grouped.items():
            names = list(layers)
            shown = ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, … {names[-1]} ({len(names)} layers)"
            lines.append(f"  float island        {shown} ({', '.join(operators)}): {reason}")
        return lines


def _folded(line: str) -> list[str]:
    """A line in parts that are read at a glance; those after the first stand below its content."""
    return wrap(line, _LONGEST, subsequent_indent=" " * _CONTENT, break_long_words=False, break_on_hyphens=False)


def _counts(nodes: dict[str, int]) -> str:
    """The ten most frequent kinds.

    >>> _counts({"Relu": 2, "Conv": 3})
    '3 Conv, 2 Relu'
    """
    kinds = sorted(nodes, key=lambda kind: (-nodes[kind], kind))
    more = (
        f", {sum(nodes[kind] for kind in kinds[_MOST_KINDS:])} of {len(kinds) - _MOST_KINDS} other kinds"
        if len(kinds) > _MOST_KINDS
        else ""
    )
    return (", ".join(f"{nodes[kind]} {kind}" for kind in kinds[:_MOST_KINDS]) or "nothing") + more
