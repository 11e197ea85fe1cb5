"""The state of a quantized model: plan and ranges as plain data, written and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cco.errors import CCOError
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.bias_correction import BiasCorrection
from lightning_cco.quantization.learned_quantizers import LearnedWeightQuantizer
from lightning_cco.quantization.moving_ranges import MovingRanges
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.state_checks import STATE_VERSION, check_scale, check_state, refuse
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.weight_quantizer import WeightQuantizer


def state_of(
    plan: QuantizationPlan,
    activations: Mapping[TensorKey, ActivationQuantizer],
    weights: Mapping[str, Sequence[WeightQuantizer]],
    corrections: Mapping[str, BiasCorrection],
    moving: MovingRanges,
) -> dict[str, Any]:
    """Plan and ranges as plain dicts, strings, numbers and tensors."""
    learned = {name: [q.get_scales() for q in found if isinstance(q, LearnedWeightQuantizer)] for name, found in weights.items()}
    return {
        "version": STATE_VERSION,
        "layers": list(plan.graph.names),
        "kinds": {layer.name: layer.kind for layer in plan.graph},
        "inputs": {
            layer.name: {"shape": list(layer.output_shapes[0]), "dtype": layer.output_dtypes[0]}
            for layer in plan.graph
            if layer.kind == "input"
        },
        "quantized": sorted(plan.quantized),
        "suggestions": list(plan.suggestions),
        "calibrated": moving.calibrated,
        "frozen": moving.frozen,
        "ranges": {str(key): quantizer.get_ranges() for key, quantizer in activations.items()},
        "outliers": [str(key) for key in moving.outliers.names()],
        "weight_scales": {name: found for name, found in learned.items() if any(found)},
        "bias_corrections": {name: c.value.detach().clone().cpu() for name, c in corrections.items()},
    }


def check_fits(state: Mapping[str, Any], graph: LayerGraph, activations: Mapping[TensorKey, ActivationQuantizer]) -> None:
    """Check a state as a whole, and that it is of this model.

    Raises:
        CCOError: It belongs to another architecture, is of a newer version or damaged; the message names the key.
    """
    check_state(state)
    theirs, ours = state["kinds"], {layer.name: layer.kind for layer in graph}
    if theirs != ours:
        missing, extra = [n for n in theirs if n not in ours], [n for n in ours if n not in theirs]
        changed = [n for n in ours if n in theirs and ours[n] != theirs[n]]
        raise CCOError(
            f"load_state_dict: the checkpoint is of another architecture: it has {len(theirs)} layers, this model {len(ours)}. "
            f"Only in the checkpoint: {missing[:5]}; only in the model: {extra[:5]}; of another kind: {changed[:5]}. "
            "Build the model as it was when the checkpoint was written, and call it as the training did (load_quantized takes a batch of it, "
            "batch=...), or start from the checkpoint's weights alone."
        )
    for key, quantizer in activations.items():
        if key in state["ranges"] and state["ranges"][key]["num_bits"] == quantizer.num_bits:
            check_scale(state["ranges"][key], key, quantizer.symmetric)


def plan_differences(state: Mapping[str, Any], plan: QuantizationPlan) -> list[str]:
    """What differs between a state's plan and this one, in words."""
    differences = []
    now_skipped = sorted(set(state["quantized"]) - plan.quantized)
    now_quantized = sorted(plan.quantized - set(state["quantized"]))
    if now_skipped:
        differences.append(f"no longer quantized: {', '.join(now_skipped)}")
    if now_quantized:
        differences.append(f"newly quantized: {', '.join(now_quantized)}")
    return differences


def load_ranges(state: Mapping[str, Any], activations: Mapping[TensorKey, ActivationQuantizer]) -> tuple[list[str], list[str]]:
    """Set the quantizers' ranges from a state that was checked.

    Returns:
        Tensors whose bits differ, in words; and the quantizers that the state says nothing of.
    """
    differences, unknown = [], []
    for key, quantizer in activations.items():
        ranges = state["ranges"].get(key)
        if ranges is None:
            unknown.append(str(key))
            continue
        if ranges.get("num_bits", quantizer.num_bits) != quantizer.num_bits:
            differences.append(f"bits of '{key}': {ranges['num_bits']} → {quantizer.num_bits}")
        quantizer.set_ranges(ranges)
    return differences, unknown


def load_corrections(state: Mapping[str, Any], channels: Mapping[str, int]) -> dict[str, BiasCorrection]:
    """The bias corrections of a state that was checked.

    Args:
        state: The state.
        channels: The layers that can be corrected, with their number of output channels.

    Raises:
        CCOError: One is of another number of channels; the message names the layer.
    """
    found = {}
    for name, value in state.get("bias_corrections", {}).items():
        if name not in channels:
            continue  # it is in float now
        if value.shape != (channels[name],):
            refuse(f"quantized.bias_corrections.{name}", f"{channels[name]} numbers, one for each channel", str(tuple(value.shape)))
        found[name] = BiasCorrection(value)
    return found


def load_weight_scales(state: Mapping[str, Any], weights: Mapping[str, Sequence[WeightQuantizer]]) -> None:
    """Set learned scales from a state that was checked. Of weights that it says nothing of they begin anew."""
    known = state.get("weight_scales", {})
    for name, quantizers in weights.items():
        saved = known.get(name, [])
        for number, quantizer in enumerate(quantizers):
            if isinstance(quantizer, LearnedWeightQuantizer):
                quantizer.set_scales(saved[number] if number < len(saved) else {})
