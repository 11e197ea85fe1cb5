"""What a hook may change in the data of a training, so that batches drawn before differ from those drawn after: levels, switches, sizes, by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.sharedctypes import SynchronizedBase
from types import FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_cco.errors import CCOWarning
from lightning_cco.graph.global_state import functions_of, is_own_code, names_in

_MOST_ITEMS, _MOST_OBJECTS, _DEEPEST = 16, 1000, 6
"""Containers with more items are samples, not settings."""

_RUNNING = (nn.Module, pl.Trainer)
_PROPERTIES = ("global_step", "current_epoch", "hparams")
"""Of modules and Trainers: no attributes of their own, and what data are most likely to read."""

Settings = dict[str, Any]


def settings_of(combined: CombinedLoader) -> Settings:
    """The plain values that loaders hold, by the names of their attributes: of data, transforms, samplers, and what their code knows by global names.

    Data that worker processes read are copies of their own: of theirs only what is in shared memory counts.
    """
    found = _Values()
    for number, loader in enumerate(combined.flattened):
        name = "" if len(combined.flattened) == 1 else f"loaders[{number}]."
        if not isinstance(loader, DataLoader):
            found.enter(f"{name}{type(loader).__name__}", loader)
            continue
        found.others = (Dataset,)  # of which samplers read the length
        for part in ("batch_sampler", "sampler"):
            found.enter(name + part, getattr(loader, part, None))
        found.others = ()
        found.only_shared = bool(loader.num_workers)
        for part in ("dataset", "collate_fn"):
            found.enter(name + part, getattr(loader, part, None))
        found.only_shared = False
    return found.values


def warn_of_changes(before: Settings, now: Settings, count: int) -> bool:
    """Say by name what a hook has changed in the data since so many batches of them were drawn. Returns whether there was anything."""
    changed = [
        f"{name} (from {before[name]!r} to {value!r})" for name, value in now.items() if repr(value) != repr(before.get(name, value))
    ]
    if not changed:
        return False
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    warnings.warn(
        f"{', '.join(changed[:3])}{more} changed in the training's data after {count} batches had been drawn before their time, to calibrate on. These are "
        "trained on as they were drawn, while without CCOCallback they would show the change. Make it before trainer.fit, let the data be a DataLoader of a "
        "data set with indices and num_workers=0, or set training_settings.stats_steps and monitoring_settings.sensitivity_batches to 1.",
        CCOWarning,
        stacklevel=4,
    )
    return True


class _Values:
    """Collects values by their names."""

    def __init__(self) -> None:
        self.values: Settings = {}
        self.only_shared = False
        self.others: tuple[type, ...] = ()
        self._seen: dict[int, Any] = {}

    def enter(self, name: str, value: Any, depth: int = 0) -> None:
        """Take a value, or what is in it."""
        if value is None or isinstance(value, (bool, int, float, str)):
            if not self.only_shared:
                self.values[name] = value
        elif isinstance(value, (*_RUNNING, ModuleType, *self.others)):
            return
        elif isinstance(value, SynchronizedBase):
            self.values[name] = getattr(value, "value", None)
        elif isinstance(value, Tensor):
            if value.device.type == "cpu" and value.numel() <= _MOST_ITEMS and (value.is_shared() or not self.only_shared):  # type: ignore[no-untyped-call]
                self.values[name] = value.tolist()
        elif id(value) not in self._seen and len(self._seen) < _MOST_OBJECTS and depth < _DEEPEST:
            self._seen[id(value)] = value
            for part, item in self._parts(value).items():
                self.enter(f"{name}{part}", item, depth + 1)

    def _parts(self, value: Any) -> Settings:
        if isinstance(value, (list, tuple, dict)):
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            return {f"[{key!r}]": item for key, item in items} if len(items) <= _MOST_ITEMS else {}
        if isinstance(value, GeneratorType):
            frame = value.gi_frame
            names = names_in(value.gi_code)
            return {} if frame is None else _dotted(frame.f_locals, names) | _known(frame.f_globals, names)
        if isinstance(value, MethodType):
            return {".__self__": value.__self__, ".__func__": value.__func__}
        if isinstance(value, FunctionType):
            return _of_function(value) if is_own_code(value) else {}
        owner = value if isinstance(value, type) else type(value)
        own = [part for part in owner.__mro__ if is_own_code(part)]
        inherited = {
            f".{name}": item for part in reversed(own) for name, item in vars(part).items() if _is_plain(item) and not name.startswith("__")
        }
        functions = [function for part in own for function in functions_of(part) if isinstance(function, FunctionType)]
        known = {name: item for function in functions for name, item in _of_function(function).items()}
        read = frozenset(name for function in functions for name in names_in(function.__code__))
        return known | inherited | ({} if isinstance(value, type) else _dotted(getattr(value, "__dict__", {}), read))


def _of_function(function: FunctionType) -> Settings:
    cells, names = {}, names_in(function.__code__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # it is empty
            continue
    return _dotted(cells, names) | _known(function.__globals__, names)


def _known(values: dict[str, Any], names: frozenset[str]) -> Settings:
    known = {name: values[name] for name in names if name in values}
    wanted = {name: item for name, item in known.items() if _is_plain(item) or isinstance(item, (list, dict, *_RUNNING))}
    return {f": {name.removeprefix('.')}": item for name, item in _dotted(wanted, names).items()}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, SynchronizedBase))


def _dotted(values: Mapping[str, Any], names: frozenset[str]) -> Settings:
    """Values by their names; of a module or a Trainer, which change in each step, what the code names of them."""
    found: Settings = {}
    for name, item in list(values.items()):
        if isinstance(item, _RUNNING):
            found |= {f".{name}.{part}": value for part, value in _read_of(item, names).items()}
        else:
            found[f".{name}"] = item
    return found


def _read_of(value: Any, names: frozenset[str]) -> Settings:
    """Plain attributes, small buffers, and the counters of Lightning, if code names them."""
    held = {**vars(value), **(dict(value.named_buffers(recurse=False)) if isinstance(value, nn.Module) else {})}
    found = {name: item for name, item in held.items() if name in names and (_is_plain(item) or isinstance(item, Tensor))}
    for name in names.intersection(_PROPERTIES):
        with suppress(AttributeError, RuntimeError):  # a module of PyTorch's own has none, and one of Lightning's wants a Trainer
            found[name] = getattr(value, name)
    return found
