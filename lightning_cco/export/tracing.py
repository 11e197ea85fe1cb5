"""A program by `torch.export`, which leaves nothing behind where it fails."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
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
        with ONE_AT_A_TIME, torch.compiler.set_stance("default"), _without_the_partial_graph():
            program = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)
    except BaseException:
        while function_mode_count() > modes:
            pop_function_mode()
        raise
    _drop_checks(program.graph)
    return program


@contextmanager
def _without_the_partial_graph() -> Iterator[None]:
    """Keep from the error stream the graph that PyTorch prints before it raises: thousands of lines, in which the error that names the layer gets lost."""
    printed, graph = io.StringIO(), ""
    try:
        with redirect_stderr(printed):
            yield
    except Exception as error:
        graph = f"{getattr(error, 'partial_fx_graph', '')}"
        raise
    finally:
        sys.stderr.write(printed.getvalue().replace(f"{graph}\n", "") if graph else printed.getvalue())


def _drop_checks(graph: torch.fx.Graph) -> None:
    """Leave out checks whether a matrix had an inverse, and what only they read: weights that are made of parameters are constants in a file."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target is check_of_inverses:
            graph.erase_node(node)
    graph.eliminate_dead_code()
