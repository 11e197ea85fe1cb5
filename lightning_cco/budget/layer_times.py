"""The table of layer times that a speed is predicted from, and its file (`docs/layer-times.md`)."""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.files import write_file
from lightning_cco.names import list_names

VERSION = 1
"""Of the fields; it rises when one changes its meaning or goes, not when one is added."""
FLOAT, INT8, WEIGHT_ONLY, PACKED = "float", "INT8", "weight-only", "4 bits"
FORMS = (FLOAT, INT8, WEIGHT_ONLY, PACKED)
"""Ways in which a layer can run: ``4 bits``: its weights stored in 4 bits, for which ONNX Runtime has no INT8 product."""


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one run of a model on some machine, by layer and by conversion.

    Attributes:
        engine: Name and version of the engine.
        processor: What measured it.
        threads: Threads of the engine.
        inputs: Shapes of the inputs.
        layers: By layer the seconds in each form that was measured. What is fused counts for the last layer of its group.
        entering: By layer whose float result is rounded for others: seconds of that conversion.
        leaving: By layer whose INT8 result others read as floats, likewise.
        files: Measured seconds of the whole files that the table was made of, by name.

    Example:
        >>> times = LayerTimes("a phone's engine 1.2", "a phone", 1, [[1, 3, 32, 32]], {"conv": {"float": 2e-3, "INT8": 7e-4}}, {"input_0": 1e-5})
        >>> times.layers["conv"]["INT8"]
        0.0007
    """

    engine: str
    processor: str
    threads: int
    inputs: list[list[int]]
    layers: dict[str, dict[str, float]]
    entering: dict[str, float] = field(default_factory=dict)
    leaving: dict[str, float] = field(default_factory=dict)
    files: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_file(path, self.to_json())

    def to_json(self) -> str:
        """The table's file."""
        return json.dumps(self.to_plain(), indent=1)

    def to_plain(self) -> dict[str, Any]:
        """The file's content."""
        return {"version": VERSION, **asdict(self)}

    def compare(self, engine: str, threads: int) -> None:
        """Warn where it was measured elsewhere than the model will be planned for."""
        here = {"engine": (self.engine, engine), "processor": (self.processor, processor_name()), "threads": (self.threads, threads)}
        others = [f"{what}: {was}, here {now}" for what, (was, now) in here.items() if str(was) != str(now)]
        if others:
            warnings.warn(
                f"budget_settings.layer_times: the table was measured elsewhere ({'; '.join(others)}), and so is the speed that is predicted. If the model "
                "is deployed here, leave layer_times out, and it is measured here.",
                CCOWarning,
                stacklevel=3,
            )

    def check(self, names: Iterable[str]) -> None:
        """Refuse a table of another model.

        Raises:
            CCOError: It has no times of some layers.
        """
        missing = [name for name in names if FLOAT not in self.layers.get(name, {})]
        if missing:
            raise CCOError(
                f"budget_settings.layer_times: the table has no times in float of {list_names(missing)}; it has {list_names(list(self.layers))}. It is of "
                "another model, or of another version of it: measure again, by leaving layer_times out."
            )


def load_layer_times(path: str | Path) -> LayerTimes:
    """Read a table.

    Raises:
        CCOError: It can't be read, or is no table.

    Example:
        >>> import tempfile
        >>> times = LayerTimes("an engine", "a processor", 1, [[1, 4]], {"linear": {"float": 2e-3, "INT8": 7e-4}})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     times.save(f"{folder}/layer_times.json")
        ...     load_layer_times(f"{folder}/layer_times.json").to_plain() == times.to_plain()
        True
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CCOError(
            f"budget_settings.layer_times: '{path}' can't be read: {error}. Give a file that lightning_cco wrote (layer_times.json)."
        ) from error
    return from_plain(raw, str(path))


def from_plain(raw: Any, path: str = "layer_times") -> LayerTimes:
    """A table from the content of its file.

    Raises:
        CCOError: It is none.
    """

    def refuse(expected: str) -> CCOError:
        return CCOError(f"budget_settings.layer_times: {path}: {expected}. See docs/layer-times.md for its fields.")

    if not isinstance(raw, Mapping) or raw.get("version") != VERSION:
        came = raw.get("version") if isinstance(raw, Mapping) else type(raw).__name__
        raise refuse(f"expected a mapping with version: {VERSION}, got {came!r}")
    threads, inputs, layers = raw.get("threads"), raw.get("inputs", []), raw.get("layers")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise refuse(f"threads: expected a whole number of at least 1, got {threads!r}")
    if not isinstance(layers, Mapping) or not layers or not isinstance(inputs, list):
        raise refuse("layers: expected a mapping of layers to seconds by form")
    for name, forms in layers.items():
        if not isinstance(forms, Mapping) or not set(forms) <= set(FORMS) or not all(map(_is_time, forms.values())):
            raise refuse(f"layers.{name}: expected seconds (numbers of at least 0) by {', '.join(FORMS)}, got {forms!r}")
    conversions = {part: raw.get(part, {}) for part in ("entering", "leaving", "files")}
    for part, values in conversions.items():
        if not isinstance(values, Mapping) or not all(map(_is_time, values.values())):
            raise refuse(f"{part}: expected seconds (numbers of at least 0) by name, got {values!r}")
    return LayerTimes(
        str(raw.get("engine", "")),
        str(raw.get("processor", "")),
        threads,
        inputs,
        {str(name): {str(form): float(seconds) for form, seconds in forms.items()} for name, forms in layers.items()},
        **{part: {str(name): float(seconds) for name, seconds in values.items()} for part, values in conversions.items()},
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def processor_name() -> str:
    """What this machine's processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
