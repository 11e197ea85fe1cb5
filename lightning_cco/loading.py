"""A compressed model out of a checkpoint, in a process that has no Trainer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_cco.batches import ForwardFn, capture_module, forward_through_model, forward_through_step, overrides_forward
from lightning_cco.checkpoints import check_callback_state, load_weights, read_checkpoint
from lightning_cco.errors import CCOError
from lightning_cco.example_batches import calls_of
from lightning_cco.example_input import example_of, shapes_of
from lightning_cco.graph.capture import capture
from lightning_cco.graph.captured import Capture
from lightning_cco.graph.compiled import eager
from lightning_cco.graph.hooks import refuse_hooked
from lightning_cco.names import list_names
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.settings import Settings, load_settings


def load_quantized(
    model: nn.Module,
    checkpoint: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch: Any = None,
    forward_fn: ForwardFn | None = None,
    settings: Settings | Mapping[str, Any] | str | None = None,
    weights_only: bool = True,
) -> QuantizedModel:
    """Load a checkpoint that a training with `CCOCallback` saved: weights, plan and ranges, ready to be measured and exported.

    The layers are captured anew, from an example: ``example_args`` and ``example_kwargs`` of one ``forward``; or ``batch``, for modules without a
    ``forward`` of their own, whose step is then run on it, and for exports that should hold what the step calls. Without either the module's
    ``example_input_array`` is taken, else numbers of the shapes that the checkpoint knows.

    Args:
        model: The float model, built as for the training: the LightningModule, or a network in it, whose weights then have one prefix in the checkpoint.
            It is put into evaluation mode, and its weights are replaced.
        checkpoint: A file, local or remote, or the directory of a distributed checkpoint.
        example_args: Positional arguments of one forward, or one tensor.
        example_kwargs: Keyword arguments of it.
        batch: A batch of the training.
        forward_fn: What `CCOCallback` was given as ``forward_fn``; needs ``batch``.
        settings: Another recipe than that of the checkpoint. Quantizers without a range are then in ``uncalibrated``: calibrate before you use the model.
        weights_only: Refuse files with objects of arbitrary classes, which can run code when they are read. False: read them, if you trust their author.

    Raises:
        CCOError: The file holds no ranges (``save_weights_only=True``, or a training without the callback), belongs to another architecture, holds objects
            that ``weights_only`` refuses; or no example is known.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from lightning_cco import CCOCallback
        >>> class Module(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def training_step(self, batch, batch_idx):
        ...         return self(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), 0.01)
        >>> silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = pl.Trainer(callbacks=[CCOCallback()], max_steps=2, default_root_dir=folder, **silent)
        ...     trainer.fit(Module(), DataLoader(torch.randn(32, 4), batch_size=8))
        ...     trainer.save_checkpoint(f"{folder}/last.ckpt")
        ...     quantized = load_quantized(Module(), f"{folder}/last.ckpt", (torch.randn(8, 4),))
        >>> quantized.calibrated
        True
    """
    if batch is not None and (len(example_args) or example_kwargs):
        raise CCOError("load_quantized: expected example_args and example_kwargs, or batch; got both. Leave one out.")
    if forward_fn is not None and batch is None:
        raise CCOError("load_quantized: forward_fn needs the batch that it is called with. Give batch=... too.")
    refuse_hooked(model)
    saved = read_checkpoint(str(checkpoint), weights_only=weights_only)
    state = _callback_state(saved, checkpoint)
    _load_weights(model, saved, checkpoint)
    model.eval()
    recipe = load_settings(settings if settings is not None else state["settings"])
    if batch is not None:
        quantized = _captured_from_batch(model, batch, forward_fn, recipe, state["skips"])
    else:
        args = (example_args,) if isinstance(example_args, Tensor) else tuple(example_args)
        if isinstance(model, pl.LightningModule) and not overrides_forward(model):
            raise CCOError(
                f"load_quantized: {type(model).__name__} has no forward of its own. Give a batch of the training, batch=..., for its step."
            )
        given = bool(args or example_kwargs)
        if not given:
            args, example_kwargs = _known_example(model, state, checkpoint)
        captured = _captured_from_example(model, args, example_kwargs or {}, state, given)
        quantized = QuantizedModel(model, captured, recipe, state["skips"])
        quantized.example = (args, example_kwargs)
    for difference in quantized.load_state_dict(state["quantized"]):
        rank_zero_info(f"{checkpoint}, with the settings that were given: {difference}.")
    if quantized.uncalibrated:
        rank_zero_info(f"Without ranges in {checkpoint}; call calibrate(batches): {list_names(quantized.uncalibrated)}.")
    return quantized


def _callback_state(saved: Mapping[str, Any], checkpoint: str | Path) -> Mapping[str, Any]:
    """What `CCOCallback` has saved in a checkpoint."""
    found = [
        state for state in saved.get("callbacks", {}).values() if isinstance(state, Mapping) and {"quantized", "settings"} <= set(state)
    ]
    if not found:
        raise CCOError(
            f"load_quantized: {checkpoint} holds no ranges: it was saved with save_weights_only=True, without CCOCallback, or before the first batch. "
            "Load its weights into the model and calibrate: quantized = cc.quantize(model, recipe, example_args); quantized.calibrate(batches)."
        )
    check_callback_state(found[0])
    return found[0]


def _load_weights(model: nn.Module, saved: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Load the weights, those under one prefix if the model is a part of what was trained."""
    own, weights = set(model.state_dict()), saved["state_dict"]
    if not any("_orig_mod." in name for name in own):  # the training compiled the model, or a part of it
        weights = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    if own != set(weights) and own:
        first = min(own)
        prefixes = {name.removesuffix(first) for name in weights if name.endswith(f".{first}")}
        whole = [prefix for prefix in prefixes if all(prefix + name in weights for name in own)]
        if len(whole) == 1:
            weights = {name.removeprefix(whole[0]): value for name, value in weights.items() if name.startswith(whole[0])}
            rank_zero_info(f"load_quantized: the weights are those of '{whole[0][:-1]}' in {checkpoint}.")
    try:
        load_weights(model, {**saved, "state_dict": weights})
    except RuntimeError as error:
        raise CCOError(
            f"load_quantized: the weights of {checkpoint} are not those of {type(model).__name__}: {error} "
            "Build the model as it was when the checkpoint was written."
        ) from error


def _captured_from_batch(
    model: nn.Module, batch: Any, forward_fn: ForwardFn | None, recipe: Settings, suggestions: Sequence[str]
) -> QuantizedModel:
    if not isinstance(model, pl.LightningModule):
        raise CCOError(
            f"load_quantized: batch needs a LightningModule of lightning.pytorch, which knows what to do with it; got {type(model).__name__}. "
            "Give example_args instead."
        )
    with _with_a_trainer(model), eager(), torch.no_grad():
        captured, way = capture_module(model, batch, forward_fn)
        quantized = QuantizedModel(model, captured, recipe, suggestions)
        calls, quantized.network = calls_of(quantized, [batch], way)
    quantized.example = calls[0]
    return quantized


def calls_on(quantized: QuantizedModel, batches: Sequence[Any]) -> list[Any]:
    """The arguments of what a file holds, on each of some batches, for the ``batches`` of an export.

    Args:
        quantized: A model that was loaded with a ``batch``, and without a ``forward_fn``.
        batches: Batches as that one.

    Raises:
        CCOError: A batch goes otherwise through the model than the first one.
    """
    assert isinstance(quantized.model, pl.LightningModule)
    way = forward_through_model if quantized.network is None else forward_through_step
    with _with_a_trainer(quantized.model), eager(), torch.no_grad():
        calls, _ = calls_of(quantized, batches, way)
    return [kwargs or args for args, kwargs in calls]


@contextmanager
def _with_a_trainer(model: pl.LightningModule) -> Iterator[None]:
    """Let the step ask for ``self.trainer``, as it may in a training."""
    before = model.__dict__.get("_trainer")
    if before is None:
        with _without_greetings():
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        model.trainer = trainer
    try:
        yield
    finally:
        if before is None:
            model.trainer = None


@contextmanager
def _without_greetings() -> Iterator[None]:
    """A Trainer says which accelerators there are: of no interest for one that trains nothing."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _captured_from_example(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: Mapping[str, Any], given: bool
) -> Capture:
    try:
        with torch.no_grad():
            return capture(model, lambda: model(*args, **kwargs))
    except CCOError as error:
        if given or example_of(model) is None:
            raise
        known = ", ".join(str(list(entry["shape"])) for entry in (state["quantized"].get("inputs") or {}).values())
        raise CCOError(
            f"load_quantized: {type(model).__name__}.example_input_array is not what its forward takes: expected {known or 'other shapes'}, "
            f"as in the training, got {shapes_of((args, kwargs))} ({error.__cause__ or error}). Correct it, or pass example_args=(tensor, ...)."
        ) from error.__cause__


def _known_example(model: nn.Module, state: Mapping[str, Any], checkpoint: str | Path) -> tuple[tuple[Any, ...], Mapping[str, Any] | None]:
    """The example that the module itself gives, else numbers of the shapes that the checkpoint knows.

    Raises:
        CCOError: Neither is known, or ``forward`` takes other arguments than tensors.
    """
    given = example_of(model)
    if given is not None:
        return given
    inputs = state["quantized"].get("inputs")
    required = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if not inputs or len(inputs) < max(1, len(required)) or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise CCOError(
            f"load_quantized: no example of forward's arguments is known: {type(model).__name__} has no example_input_array, and {checkpoint} knows "
            f"{len(inputs or [])} input tensors for {len(required)} required arguments. Pass example_args=(tensor, ...), example_kwargs={{...}} or batch=..."
        )
    rank_zero_info(
        f"load_quantized: the example is made of random numbers, of the shapes in {checkpoint}. Pass example_args for real ones."
    )
    ranges = state["quantized"]["ranges"]
    return tuple(_numbers(entry, ranges.get(name)) for name, entry in inputs.items())[: max(1, len(required))], None


def _numbers(entry: Mapping[str, Any], ranges: Mapping[str, Any] | None) -> Tensor:
    """Random numbers of a shape and type: floats over the calibrated range, integers 0 and 1, which most tables have."""
    shape, dtype = list(entry["shape"]), getattr(torch, entry["dtype"])
    if not dtype.is_floating_point:
        return torch.randint(0, 2, shape, dtype=dtype) if not dtype.is_complex else torch.randn(shape, dtype=dtype)
    low, high = (float(ranges["min_val"]), float(ranges["max_val"])) if ranges else (-1.0, 1.0)
    return torch.empty(shape, dtype=dtype).uniform_(low, high)
