"""What an export says of the file it wrote."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class LayerDifference:
    """How far the engine's tensor is from the fake-quantized one, in steps of its own scale."""

    layer: str
    largest_steps: float
    mean_steps: float


@dataclass
class ExportReport:
    """A written file, compared with the fake-quantized model on held batches.

    Attributes:
        path: The file.
        size_bytes: Its size.
        float_size_bytes: Size of the float parameters and buffers.
        sqnr_db: Signal-to-noise ratio of the outputs against the fake-quantized model's.
        agreement: Share of equal arg-max over the last axis of the first output.
        largest_difference: Largest absolute difference of an output.
        layers: Difference of each quantized tensor, in execution order.
        integer_nodes: After the engine's optimization: how many nodes of each kind compute in INT8.
        float_nodes: Nodes with weights or two inputs that compute in float.
        float_islands: The layers behind them, as far as the file tells.
        conversions: Quantize and dequantize nodes left between them.
        notes: What a reader should know, such as bits stored in wider formats.
    """

    path: str
    size_bytes: int = 0
    float_size_bytes: int = 0
    sqnr_db: float = float("nan")
    agreement: float = float("nan")
    largest_difference: float = float("nan")
    layers: list[LayerDifference] = field(default_factory=list)
    integer_nodes: dict[str, int] = field(default_factory=dict)
    float_nodes: dict[str, int] = field(default_factory=dict)
    float_islands: list[str] = field(default_factory=list)
    conversions: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def size_ratio(self) -> float:
        """Size over that of the float parameters."""
        return self.size_bytes / max(1, self.float_size_bytes)

    @property
    def first_differing_layer(self) -> str | None:
        """The first tensor that is more than two steps off somewhere and a tenth of a step on average."""
        return next((entry.layer for entry in self.layers if entry.largest_steps > 2.0 and entry.mean_steps > 0.1), None)

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps({**asdict(self), "size_ratio": self.size_ratio}, indent=2), encoding="utf-8")

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda entry: entry.mean_steps, default=None)
        lines = [
            f"INT8 file: {self.path}",
            f"  size                {self.size_bytes:,} bytes, {self.size_ratio:.3f} of the float parameters",
            f"  against fake-quant  SQNR {self.sqnr_db:.1f} dB, same arg-max {100 * self.agreement:.1f} %, largest difference {self.largest_difference:.3g}",
        ]
        if worst is not None:
            most = max(entry.largest_steps for entry in self.layers)
            lines.append(
                f"  by tensor           at most {most:.0f} steps; on average most in '{worst.layer}': {worst.mean_steps:.3f} steps"
            )
        lines.append(f"  runs in INT8        {_counts(self.integer_nodes)}")
        lines.append(f"  runs in float       {_counts(self.float_nodes)}; {self.conversions} conversions between them")
        if self.float_islands:
            lines.append(f"  float islands       {', '.join(self.float_islands)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _counts(nodes: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(nodes.items())) or "nothing"
