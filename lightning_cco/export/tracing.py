"""A program by `torch.export`, which leaves nothing behind where it fails."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import nn

from lightning_cco.compat.operators import check_of_inverses
from lightning_cco.compat.torch_modes import function_mode_count, pop_function_mode

ONE_AT_A_TIME = threading.RLock()
"""Held while something is traced or converted: PyTorch puts functions of its own in the place of others then, for all threads of the process."""


def traced_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """What `torch.export.export` makes of a model's forward, traced as Python runs it.

    Where a call fails whose hooks did not all run (that of a scripted module), function modes are taken off in another order than they came, and that of
    `torch.export` stays: it would see every torch call of this thread.

    `torch.export` runs eagerly what the user has compiled. What is traced by the compiler inside of it are the functions that `torch.cond` and its
    like are given, whose weights it makes inputs of the program: run eagerly, these would be constants that nothing can store.

    Args:
        model: The model.
        args: Positional arguments of one forward.
        kwargs: Keyword arguments of it.
        dynamic_shapes: Which axes vary, as `torch.export.export` takes it.
    """
    modes = function_mode_count()
    try:
        with ONE_AT_A_TIME, torch.compiler.set_stance("default"), redirect_stderr(_WithoutGraphs(sys.stderr)):
            program = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)
    except BaseException:
        while function_mode_count() > modes:
            pop_function_mode()
        raise
    _record_readers(program.graph)
    _drop_checks(program.graph)
    return program


class _WithoutGraphs:
    """An error stream without the graph that PyTorch prints before it raises: thousands of lines, in which the error that names the layer gets lost."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left_out = stream, False

    def write(self, text: str) -> int:
        ends_it, self._left_out = self._left_out and text == "\n", "def forward(self" in text and "torch.ops." in text
        if not self._left_out and not ends_it:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _record_readers(graph: torch.fx.Graph) -> None:
    """Put every reader of a value into its list of readers.

    Where a forward switches gradients off in between, PyTorch moves the parts of its graph together again, and forgets those who read an output for
    something that is not returned, such as a loss: they could neither be left out nor be kept.
    """
    for node in graph.nodes:
        for read in node.all_input_nodes:
            read.users.setdefault(node)


def _drop_checks(graph: torch.fx.Graph) -> None:
    """Leave out checks whether a matrix had an inverse, and what only they read: weights that are made of parameters are constants in a file."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target is check_of_inverses:
            graph.erase_node(node)
    graph.eliminate_dead_code()
