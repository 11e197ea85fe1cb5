"""An engine that reads programs, in PyTorch: what the tests put in the place of ExecuTorch, which the tests' environment has not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_cco.compat.decomposed import operators
from lightning_cco.export.engines import BY_ENDING, Converted, Engine
from lightning_cco.export.provenance import LAYER, noted
from lightning_cco.export.pt2e_passes import operator_of

PRODUCTS = ("aten::conv2d", "aten::conv_transpose2d", "aten::linear")


class InTorch:
    """Runs programs as they are.

    Attributes:
        started: How many were started.
        floats: Layers that are said to be computed in float.
        factor: What the values of a pair are multiplied by, by quantizer's place among the quantize operators.
        crashes: In which step it fails.
        said: What it says then, in converting.
    """

    started = 0
    floats: tuple[str, ...] = ()
    factor: tuple[int, float] | None = None
    crashes = ""
    said = "Missing out variants: {'aten::erf'}"

    def __init__(self) -> None:
        type(self).started += 1
        if self.crashes == "start":
            raise RuntimeError("ImportError: no such symbol")

    def convert(self, program: Path, target: Path) -> Converted:
        if self.crashes == "convert":
            raise RuntimeError(self.said)
        loaded = torch.export.load(program)
        products = [node for node in loaded.graph.nodes if operator_of(node) in PRODUCTS]
        summed = [node for node in loaded.graph.nodes if operator_of(node) == "aten::add"]
        layers = tuple((operator_of(node), noted(node, LAYER), noted(node, LAYER) not in self.floats) for node in [*products, *summed])
        integer = Counter(operator for operator, _, on_integers in layers[: len(products)] if on_integers)
        target.write_bytes(program.read_bytes())
        return Converted(integer, {}, layers, 2, ("it ran in PyTorch",))

    def run(self, path: Path, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        if self.crashes == "run":
            raise RuntimeError("its process has ended with status -11")
        module: Any = torch.export.load(path).module()
        if self.factor is not None:
            pairs = [node for node in module.graph.nodes if node.target is operators().quantize]
            node = pairs[self.factor[0]]
            with module.graph.inserting_before(node):
                node.replace_input_with(node.args[0], module.graph.call_function(torch.mul, (node.args[0], self.factor[1])))
            module.recompile()
        with torch.no_grad():
            return [tensor.numpy() for tensor in module(*map(torch.from_numpy, arrays))]


def in_torch(monkeypatch: pytest.MonkeyPatch, ending: str = ".pte", **attributes: Any) -> type[InTorch]:
    """Let the files of an engine be written and run in PyTorch."""
    made = type("InTorch", (InTorch,), {"started": 0, **attributes})
    engine: Engine = dataclasses.replace(BY_ENDING[ending], start=made, package="torch")
    monkeypatch.setitem(BY_ENDING, ending, engine)  # type: ignore[arg-type]
    return made
