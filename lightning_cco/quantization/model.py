"""A model with quantization hooked on."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.capture import Capture, capture, recording, switch_training
from lightning_cco.graph.frames import hooks_on, refuse_hooked
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.names import list_names
from lightning_cco.quantization.plan import plan_quantization
from lightning_cco.quantization.quantizer import ActivationQuantizer, WeightQuantizer
from lightning_cco.quantization.range_updates import forget_batches, sync_calibration, update_ranges, world_size
from lightning_cco.quantization.runtime import Phase, Runtime
from lightning_cco.quantization.state import STATE_VERSION, check_scale, check_state
from lightning_cco.settings import Settings, load_settings

if TYPE_CHECKING:
    from lightning_cco.sensitivity import SensitivityReport

Forward = Callable[[nn.Module, Any], Any]
"""How one batch goes through the model."""

_MOVING = threading.RLock()
_MASKED = frozenset({"add", "sub", "mul", "where", "masked_fill", "scaled_dot_product_attention", "concat", "setitem"})


def quantize(
    model: nn.Module,
    settings: Settings | Mapping[str, Any] | str | None = None,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
) -> QuantizedModel:
    """Capture a model's layers, plan, and hook fake-quantization on it; no Trainer needed.

    The model stays the same object with the same parameters. Until `QuantizedModel.calibrate` has run, it computes in float.

    Args:
        model: Any module whose ``forward`` takes the example.
        settings: What `CCOCallback` takes: settings, mapping, YAML path or recipe name.
        example_args: Positional arguments of one example forward.
        example_kwargs: Keyword arguments of it.

    Raises:
        CCOError: The forward fails on the example, a setting matches nothing, or nothing can be quantized.
    """
    refuse_hooked(model)
    example_args = (example_args,) if isinstance(example_args, Tensor) else tuple(example_args)
    captured = capture(model, lambda: model(*example_args, **(example_kwargs or {})))
    quantized = QuantizedModel(model, captured, load_settings(settings))
    quantized.example = (example_args, example_kwargs)
    return quantized


def release(model: nn.Module) -> bool:
    """Take the hooks off that a model carries from an earlier `quantize` or callback.

    Returns:
        Whether there were any.
    """
    frames = hooks_on(model)
    if frames is None:
        return False
    frames.detach()
    return True


def call_with(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a mapping gives keyword arguments, a tuple or list positional ones, anything else the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


class QuantizedModel:
    """A model, its layer graph, its plan and its quantizers. The model itself is hooked, not changed; `remove` takes the hooks off.

    Args:
        model: The model.
        captured: Its captured layers.
        settings: The recipe.
        suggestions: Layers to skip because of their sensitivity.

    Attributes:
        model: The same object that was given.
        graph: Its layer graph.
        plan: What is quantized.
        settings: The recipe.
        weights: Quantizers of each layer's weights.
        calibrated: Whether the ranges are known; before that the model computes in float.
        frozen: Whether the ranges stay as they are.
        example: Positional and keyword arguments of one forward, for exports.
        uncalibrated: Quantizers that have no range after a state was loaded or the plan changed.
    """

    def __init__(self, model: nn.Module, captured: Capture, settings: Settings, suggestions: Iterable[str] = ()) -> None:
        if not any(p.is_floating_point() for p in model.parameters()):
            raise CCOError(
                f"{type(model).__name__}: it has no floating-point parameter, so there is nothing to quantize. "
                "Quantize the float model, before any other conversion, after its layers are built."
            )
        self.model = model
        self.capture = captured
        self.settings = settings
        self.plan = plan_quantization(captured.graph, settings, suggestions)
        self._activations: dict[str, ActivationQuantizer] = {}
        self.weights: dict[str, list[WeightQuantizer]] = {}
        self.calibrated = False
        self.frozen = False
        self.uncalibrated: list[str] = []
        self.example: tuple[Sequence[Any], Mapping[str, Any] | None] = ((), None)
        self._trained = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
        self._moved_at = self._weights_version()
        self._outliers: Tensor | None = None
        self._mode = model.training
        self._build_quantizers()
        self.runtime = Runtime(model, captured, self.plan, self._activations, self.weights)
        self.runtime.phase = Phase.PASS
        self.runtime.frames.started = self._forward_starts
        self.runtime.frames.owner = weakref.ref(self)
        self.runtime.frames.attach()
        self.to(self.device)

    @property
    def graph(self) -> LayerGraph:
        """The layer graph."""
        return self.capture.graph

    @property
    def activations(self) -> dict[str, ActivationQuantizer]:
        """Quantizer of each fake-quantized tensor by name. Whoever asks may read a range, so all move on first to what the last step has shown."""
        if self._ranges_wait():
            self.update_ranges()
        return self._activations

    @property
    def drift(self) -> list[str]:
        """Where the running model has departed from the captured one, in words."""
        return list(self.runtime.drift.values())

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    def _build_quantizers(self) -> None:
        """Make the quantizers that the plan asks for and has none yet; those that stay keep their ranges."""
        training = self.settings.training_settings
        activations: dict[str, ActivationQuantizer] = {}
        for key, spec in self.plan.tensors.items():
            new = ActivationQuantizer(
                spec.num_bits,
                symmetric=spec.symmetric,
                estimator=training.range_estimator,
                averaging_constant=training.averaging_constant,
                percentile=training.percentile,
            )
            known = self._activations.get(key)
            activations[key] = known if known is not None and known.kind == new.kind else new
        weights: dict[str, list[WeightQuantizer]] = {}
        for name in self.graph.names:
            site, decision = self.capture.sites[name], self.plan.decisions[name]
            if not (decision.quantized or decision.weight_only) or not site.weights:
                continue
            bits = decision.weights_num_bits
            if bits is None:  # a constant operand of an addition: an activation that never changes
                bits = decision.activations_num_bits or self.settings.global_quantization_settings.activations_num_bits
            made = [WeightQuantizer(bits, weight.axis, training.weight_estimator) for weight in site.weights]
            known_weights = self.weights.get(name)
            weights[name] = known_weights if known_weights is not None and known_weights[0].kind == made[0].kind else made
        self._activations, self.weights = activations, weights

    def to(self, device: torch.device) -> None:
        """Move the quantizers to the model's device."""
        for quantizer in self._activations.values():
            quantizer.to(device)

    def replan(self, settings: Settings | None = None, suggestions: Iterable[str] = ()) -> list[str]:
        """Change what is quantized. Quantizers that stay keep their ranges.

        Args:
            settings: The new recipe; `None` keeps the old one.
            suggestions: Layers to skip because of their sensitivity, all of them, not only new ones.

        Returns:
            Names of the new quantizers, whose ranges are not known yet: calibrate again if there are any.
        """
        self.settings = load_settings(settings) if settings is not None else self.settings
        self.plan = plan_quantization(self.graph, self.settings, suggestions)
        before = dict(self.activations)
        self._build_quantizers()
        self.to(self.device)
        self.runtime.load(self.plan, self.activations, self.weights)
        torch.compiler.reset()
        return [key for key, quantizer in self.activations.items() if before.get(key) is not quantizer]

    def calibrate(self, batches: Iterable[Any], forward: Forward | None = None, only: Iterable[str] | None = None) -> int:
        """Find the ranges of the activations from some batches, in evaluation mode and without gradients.

        Args:
            batches: What ``forward`` takes, on the model's device.
            forward: ``(model, batch) -> Any``; by default the batch's items are the model's arguments.
            only: Names of the quantizers to calibrate; `None`: all.

        Returns:
            How many batches were seen.

        Raises:
            CCOError: No batch came, or a weight or an activation is NaN or infinite; the message names the layer.
        """
        self._check_weights()
        forward = forward or call_with
        chosen = set(self.activations) if only is None else set(only)
        for key in chosen:
            self.activations[key].start_calibration()
        count = 0
        observed = {key: q for key, q in self.activations.items() if key in chosen}
        with self.evaluating(), self.forked_random(), self.runtime.doing(Phase.OBSERVE, only=observed.values()):
            for batch in batches:
                self.runtime.batch += 1
                forward(self.model, batch)
                count += 1
        if not count:
            raise CCOError(
                "calibrate: no batch came, so no range is known. Expected at least one batch of what the model's forward takes; "
                "check that the loader is not empty and that stats_steps is at least 1."
            )
        errors = sync_calibration(list(observed.values()))
        for number, (key, quantizer) in enumerate(observed.items()):
            self._finish(key, quantizer, errors[number] if errors is not None else None)
        self._warn_of_zeros(observed)
        self.calibrated = True
        self.runtime.phase = Phase.QUANTIZE
        torch.compiler.reset()
        return count

    def _finish(self, key: str, quantizer: ActivationQuantizer, errors: Tensor | None) -> None:
        problem = quantizer.finish_calibration(errors)
        if problem == "non_finite":
            layer = self.graph[key.partition(":")[0]]
            where = f"module '{layer.path}', {layer.kind}" if layer.path else layer.kind
            raise CCOError(
                f"calibrate: layer '{layer.name}' ({where}) gave NaN or infinite values; finite ones were expected. "
                "Check the float model on the same batch (learning rate, input scaling, loss of precision in float16) before quantizing, "
                f"or skip the layer: {{match: {layer.name}, skip_quantization: true}}."
            )

    def _warn_of_zeros(self, observed: Mapping[str, ActivationQuantizer]) -> None:
        """Say which ranges are [0, 0]: until they move, what passes there is not rounded."""
        zero, absent = (
            list(dict.fromkeys(key.partition(":")[0] for key, q in observed.items() if q.empty and q.saw_zeros is saw_zeros))
            for saw_zeros in (True, False)
        )
        zero, absent = ([name for name in names if self._makes_int8(name)] for names in (zero, absent))
        what = [
            *([f"nothing but zeros came out of {list_names(zero)}"] if zero else []),
            *([f"nothing came out of {list_names(absent)} (a branch that no batch took, no rows)"] if absent else []),
        ]
        if what:
            warnings.warn(
                f"calibrate: {' and '.join(what)}, so the range there is [0, 0] and values pass unrounded. It takes the first values that come in training, "
                "unless ranges are frozen. If the zeros are not meant, check the batches (scaling, masks, dead units) or raise training_settings.stats_steps; "
                f"if they are, the layer is better skipped: {{match: {[*zero, *absent][0]}, skip_quantization: true}}.",
                CCOWarning,
                stacklevel=3,
            )

    def _makes_int8(self, name: str) -> bool:
        """Whether an INT8 layer makes or reads a layer's output."""
        return name in self.plan.quantized or any(reader in self.plan.quantized for reader in self.graph.successors(name))

    def _check_weights(self) -> None:
        """Look at all parameters of layers, also of those in float: what they make out of them is calibrated all the same."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        finite: dict[str, bool] = {}
        for layer in self.graph:
            for name in layer.parameters:
                tensor = parameters.get(name)
                if tensor is None or not tensor.is_floating_point():
                    continue
                if name not in finite:
                    # A mask that is added, or fills, may well be infinite; NaN is never meant.
                    values = tensor.detach()
                    finite[name] = not bool((values.isnan() if layer.kind in _MASKED else ~values.isfinite()).any())
                if not finite[name]:
                    raise CCOError(
                        f"calibrate: the parameter '{name}' of layer '{layer.name}' holds NaN or infinite values; finite ones were expected. "
                        "Load a checkpoint from before the training diverged."
                    )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside the block, without gradients if the model's own forward needs none. Ranges stand still."""
        flags = [(module, module.training) for module in self.model.modules()]
        following, self.runtime.following = self.runtime.following, False
        switch_training(self.model, False)
        try:
            with recording(self.model, self.capture.needs_gradients):
                yield
        finally:
            self.runtime.following = following
            for module, flag in flags:
                module.training = flag

    def follow_ranges(self, follow: bool) -> None:
        """Say whether forwards that record gradients are of a training, which ranges follow: a validation may need gradients too, for forces."""
        self.runtime.following = follow

    def freeze_ranges(self) -> None:
        """Keep all activation ranges as they are from now on."""
        for quantizer in self.activations.values():
            quantizer.freeze()
        self.frozen = True

    def unfreeze_ranges(self) -> None:
        """Let the ranges follow the activations again, also those that ``auto`` lets stand still."""
        for quantizer in self._activations.values():
            quantizer.unfreeze()
        self.frozen = False

    def update_ranges(self) -> None:
        """Let the ranges follow what has passed in training since they last moved; under DDP equally on all ranks.

        On a single process this happens by itself, before the first forward after the weights have changed, and before ranges are read. Under DDP call it
        after each step, on all ranks (the callback does).
        """
        self._moved_at = self._weights_version()
        if not self.frozen and self.calibrated:
            self._outliers = update_ranges(list(self._activations.values()), self._outliers)
            if self._outliers is not None and self._outliers.device.type == "cpu":
                self._warn_of_outliers(self._outliers)

    def _warn_of_outliers(self, outliers: Tensor) -> None:
        if not bool(outliers.any()):
            return
        moving = [key for key, quantizer in self._activations.items() if not quantizer.stands_still]
        names = dict.fromkeys(key.partition(":")[0] for key, found in zip(moving, outliers.tolist(), strict=True) if found)
        warnings.warn(
            f"training: a batch gave values more than a thousand times as large as the range of {list_names(list(names))}. The ranges do not follow it, unless "
            "the next batch is like it. Check the samples of that batch (units, missing values) and the learning rate.",
            CCOWarning,
            stacklevel=3,
        )

    def _weights_version(self) -> int:
        return sum(parameter._version for parameter in self._trained)

    def _forward_starts(self) -> None:
        """Before a forward: quantizers on the model's device, ranges moved on."""
        self._follow_device()
        if self._ranges_wait():
            with _MOVING:  # of several threads one moves them, once
                if self._ranges_wait():
                    self.update_ranges()
        if torch.is_grad_enabled() and self._mode != self.model.training:
            # What an evaluation that forgot `torch.no_grad` has shown is no part of the training, and the other way round.
            self._mode = self.model.training
            forget_batches(list(self._activations.values()))

    def _ranges_wait(self) -> bool:
        """Whether weights have changed since the ranges last moved. Under DDP all ranks move them together, when `update_ranges` is called."""
        return self.calibrated and not self.frozen and world_size() == 1 and self._moved_at != self._weights_version()

    def _follow_device(self) -> None:
        """Keep the quantizers where the parameters are: Lightning moves the model to the CPU at the end of a run."""
        device = self.device
        if device.type == "meta":  # there a range would be lost
            return
        for quantizer in self._activations.values():
            if quantizer.scale.device == device:
                return
            quantizer.to(device)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute in float inside the block, in this thread: others go on quantizing."""
        with self.runtime.doing(Phase.PASS):
            yield

    def sensitivity(
        self, batches: Iterable[Any], forward: Forward | None = None, modes: Sequence[str] = ("local", "accumulated")
    ) -> SensitivityReport:
        """Measure the Quantization Sensitivity of each layer.

        Args:
            batches: The held batches, on the model's device.
            forward: How a batch goes through the model, as in `calibrate`.
            modes: ``local``: float and quantized layer on the same float input. ``accumulated``: quantized model against float model.

        Raises:
            CCOError: The model was never calibrated.
        """
        from lightning_cco.measurement import measure

        if not self.calibrated:
            raise CCOError(
                "sensitivity: the model was never calibrated, so there is no quantized output to compare. Call calibrate(batches) first."
            )
        return measure(self, batches, forward or call_with, modes)

    def measured_layers(self) -> list[str]:
        """Layers with a rounding of their own, in graph order: a weight, or a quantizer on the output."""
        return [name for name in self.graph.names if name in self.weights or name in self.activations]

    def forked_random(self) -> AbstractContextManager[None]:
        """Random numbers inside the block, beginning where they are now; afterwards they are there again."""
        device = self.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def state_dict(self) -> dict[str, Any]:
        """Plan and ranges as plain dicts, strings, numbers and tensors."""
        if world_size() == 1 and self._mode:
            self.update_ranges()
        if self._outliers is not None and self._outliers.device.type != "cpu":
            self._warn_of_outliers(self._outliers)  # each step would have to wait for the device
        return {
            "version": STATE_VERSION,
            "layers": list(self.graph.names),
            "kinds": {layer.name: layer.kind for layer in self.graph},
            "quantized": sorted(self.plan.quantized),
            "suggestions": list(self.plan.suggestions),
            "calibrated": self.calibrated,
            "frozen": self.frozen,
            "ranges": {key: quantizer.get_ranges() for key, quantizer in self.activations.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take ranges over from a state: all of it, or, on an error, nothing.

        Returns:
            What differs between the state's plan and this one, in words; empty if nothing does.

        Raises:
            CCOError: The state belongs to another architecture, is of a newer version or damaged; the message names the key.
        """
        check_state(state)
        theirs, ours = state["kinds"], {layer.name: layer.kind for layer in self.graph}
        if theirs != ours:
            missing, extra = [n for n in theirs if n not in ours], [n for n in ours if n not in theirs]
            changed = [n for n in ours if n in theirs and ours[n] != theirs[n]]
            raise CCOError(
                f"load_state_dict: the checkpoint is of another architecture: it has {len(theirs)} layers, this model {len(ours)}. "
                f"Only in the checkpoint: {missing[:5]}; only in the model: {extra[:5]}; of another kind: {changed[:5]}. "
                "Build the model as it was when the checkpoint was written, or start from the checkpoint's weights alone."
            )
        for key, quantizer in self.activations.items():
            if key in state["ranges"] and state["ranges"][key]["num_bits"] == quantizer.num_bits:
                check_scale(state["ranges"][key], key, quantizer.symmetric)
        differences = []
        now_skipped = sorted(set(state["quantized"]) - self.plan.quantized)
        now_quantized = sorted(self.plan.quantized - set(state["quantized"]))
        if now_skipped:
            differences.append(f"no longer quantized: {', '.join(now_skipped)}")
        if now_quantized:
            differences.append(f"newly quantized: {', '.join(now_quantized)}")
        uncalibrated = []
        for key, quantizer in self.activations.items():
            ranges = state["ranges"].get(key)
            if ranges is None:
                uncalibrated.append(key)
            else:
                if ranges.get("num_bits", quantizer.num_bits) != quantizer.num_bits:
                    differences.append(f"bits of '{key}': {ranges['num_bits']} → {quantizer.num_bits}")
                quantizer.set_ranges(ranges)
        self.uncalibrated = uncalibrated
        if state["frozen"]:
            self.freeze_ranges()
        self.calibrated = bool(state["calibrated"])
        self.runtime.phase = Phase.QUANTIZE if self.calibrated else Phase.PASS
        torch.compiler.reset()
        return differences

    def export(
        self, path: str | Path, example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """Write an INT8 ONNX file and check it in ONNX Runtime; or, if ``path`` ends in ``.pt2``, a `torch.export` program.

        Args:
            path: Where to write.
            example_args: Positional arguments of one forward; by default those of `quantize`.
            example_kwargs: Keyword arguments of it.
            **options: See `lightning_cco.export.export_onnx` and `lightning_cco.export.export_program`.

        Returns:
            The report of the check; the program for a ``.pt2`` file.
        """
        from lightning_cco.export import export_onnx, export_program

        if not len(example_args) and not example_kwargs:
            example_args, example_kwargs = self.example
        write = export_program if str(path).endswith(".pt2") else export_onnx
        return write(self, path, example_args, example_kwargs, **options)

    @property
    def attached(self) -> bool:
        """Whether the hooks are on: not after `remove`, nor after another callback has taken the model over."""
        return self.runtime.frames.attached

    def remove(self) -> None:
        """Take all hooks off: the model is as it was."""
        self.runtime.frames.detach()

    def __repr__(self) -> str:
        state = "frozen" if self.frozen else "calibrated" if self.calibrated else "not calibrated"
        return f"QuantizedModel({type(self.model).__name__}, {len(self.plan.quantized)} of {self.plan.counted} layers quantized, {state})"
