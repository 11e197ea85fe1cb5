"""Whether a checked file is what it should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from lightning_cco.export.errors import ExportError, FileDiffers
from lightning_cco.export.report import ExportReport, LayerDifference
from lightning_cco.names import list_names
from lightning_cco.number_format import figure

MEAN_STEPS = 0.1
"""Most that a tensor may be off on average, in steps. Right layers of the networks of the tests: 0.002 at most."""
FAR_SHARE = 1e-3
"""Most that may be more than a step off of a tensor's values. Right layers: none."""
FAR_STEPS = 3.0
"""Most that any value may be off, in steps. Right layers: 1."""
FEW = 2
"""As many values of a small tensor may be a step off, whatever their share."""
LOCAL_DIFFERENCE = 1e-3
"""Most that an output may be off from what the model makes of the engine's own rounded tensors, beside its largest value."""


@dataclass(frozen=True)
class Limits:
    """Most that a right file may differ.

    Attributes:
        mean_steps: That a tensor may be off on average, in steps of its scale, computed from the engine's tensors before it.
        far_share: That may be more than a step off of its values.
        largest_steps: That any value may be off, in steps.
        difference: Limit for an output: its difference from the output that the model computes from the engine's quantized tensors, over its largest value.
    """

    mean_steps: float = MEAN_STEPS
    far_share: float = FAR_SHARE
    largest_steps: float = FAR_STEPS
    difference: float = LOCAL_DIFFERENCE


_COARSER = {"float16": Limits(0.2, 0.01, 8.0, 0.01), "bfloat16": Limits(0.4, 0.05, 8.0, 0.05)}
"""Beside types of 11 and 8 bits: of 255 steps, bfloat16 is off by up to half a one, and by a quarter on average where values are large."""


def judge(report: ExportReport, min_sqnr_db: float | None = None, limits: Limits | None = None) -> None:
    """Refuse a file of which a layer is wrong.

    Args:
        report: What the check saw.
        min_sqnr_db: Smallest signal-to-noise ratio of the outputs from end to end; `None`: any.
        limits: What it may differ by; `None`: the usual.

    Raises:
        FileDiffers: It names the layer.
    """
    limits = _for_types(limits or Limits(), report.widened)
    wrong = [entry for entry in report.layers if _is_wrong(entry, limits)]
    first = wrong[0].layer if wrong else None
    if report.faults:
        layer, fault = next(iter(report.faults.items()))
        what = f"layer '{layer}': {fault}"
        first = first or layer
    elif wrong:
        entry = wrong[0]
        what = (
            f"'{entry.layer}' is {entry.mean_steps:.2g} steps off on average (expected at most {limits.mean_steps:g}, max_mean_steps), "
            f"{entry.largest_steps:.0f} at most, {figure(100 * entry.far_share, 2)} % of its values by more than one, computed from what the engine computed "
            "before it"
        )
    elif not report.local_difference <= limits.difference and report.outputs:
        output = max(report.outputs, key=lambda entry: entry.local_difference)
        what = (
            f"the output '{output.name}' is {output.local_difference:.2g} of its largest value off (expected at most {limits.difference:g}), "
            "computed from the engine's own rounded tensors"
        )
        if output.integers:
            what = (
                f"{figure(100 * output.local_difference, 2)} % of the integers of the output '{output.name}' differ, computed from the engine's own "
                "rounded tensors; if they are indices (topk, sort): of equal values, as rounding and ReLU make them, each library takes another one "
                "first. Return the values, or use the indices inside of the model"
            )
    elif min_sqnr_db is not None and report.sqnr_db < min_sqnr_db:
        what = f"SQNR {report.sqnr_db:.1f} dB, expected at least {min_sqnr_db:.1f} (min_sqnr_db)"
    else:
        return
    where = f"the first layer that differs is '{first}'" if first else "no single layer exceeds its limits"
    if report.uncompared and not wrong and not report.faults:
        where = (
            f"{list_names(list(report.uncompared))} could not be compared ({next(iter(report.uncompared.values()))}): does the model's code take another way "
            "while it is exported (torch.compiler.is_exporting, torch.jit.is_tracing), or for other values? Make it take the same one"
        )
    if report.random:
        where += (
            f". The forward draws random numbers in evaluation, too ({', '.join(report.random)} in the file), and the file draws others in every run: draw "
            "them only in training (if self.training), or give them to the forward as an argument"
        )
    raise FileDiffers(f"{what}; {where}")


def _for_types(limits: Limits, widened: Sequence[str]) -> Limits:
    """Limits where the model itself computes coarser than the file."""
    wider = [_COARSER[name] for name in widened if name in _COARSER]
    if not wider or limits.mean_steps < MEAN_STEPS:
        return limits  # what was asked for holds
    return Limits(*(max(getattr(entry, name.name) for entry in (limits, *wider)) for name in fields(Limits)))


def refuse_floats(report: ExportReport) -> None:
    """Refuse a file of which the engine computes in float what is planned in INT8.

    Raises:
        CCOError: It names the layers.
    """
    floats = [island for island in report.float_islands if island.unplanned]
    if floats:
        layers = ", ".join(f"'{island.layers[0]}' ({island.operator})" for island in floats[:4]) + (", …" if len(floats) > 4 else "")
        raise ExportError(
            f"{report.target} computes in float what is planned in INT8: {layers}, {len(floats)} in all. No file was written. Skip these layers "
            f"(layer_settings: {{match: {floats[0].layers[0]}, skip_quantization: true}}), or write the file unchecked with check=False."
        )


def _is_wrong(entry: LayerDifference, limits: Limits) -> bool:
    few = entry.values * entry.mean_steps <= FEW
    return entry.largest_steps > limits.largest_steps or (
        not few and (not entry.mean_steps <= limits.mean_steps or entry.far_share > limits.far_share)
    )
