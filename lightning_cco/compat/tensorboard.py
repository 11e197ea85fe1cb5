"""TensorBoard's writer: several values in one event, and a graph that is no TorchScript."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_cco.errors import CCOError


def write_scalars(writer: Any, values: Mapping[str, float], step: int) -> None:
    """Write values as one event: one call for each would cost ten times as much.

    Private API: ``SummaryWriter._get_file_writer``. Without it: one call for each.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    if not hasattr(writer, "_get_file_writer"):
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
        return
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    writer._get_file_writer().add_summary(summary, step)


def write_graph(writer: Any, graph: bytes) -> None:
    """Write a serialized ``GraphDef``.

    Private API: ``SummaryWriter._get_file_writer``.

    Raises:
        CCOError: The writer has none.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    if not hasattr(writer, "_get_file_writer"):
        raise CCOError(f"expected a TensorBoard writer with _get_file_writer, which takes a graph; got a {type(writer).__name__}")
    writer._get_file_writer().add_event(Event(graph_def=graph))
