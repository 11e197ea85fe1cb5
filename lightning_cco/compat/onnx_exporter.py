"""What traces and the ONNX exporter write about the nodes of a graph: which traced node each was made from, and in which module."""

from __future__ import annotations

from typing import Any

from lightning_cco.compat.resolve import or_else

_proxy_mode: Any = or_else("torch.fx.experimental.proxy_tensor.get_proxy_mode", lambda: None)

LOGGERS = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")
"""What the exporter logs under. Without one of these: its warnings are shown."""

HANDED_ON = "custom"
"""The key of a traced node's ``meta`` that PyTorch hands on from graph to graph. Without it: nodes have no layer, so the report names none."""


def graph_being_traced() -> Any:
    """The `torch.fx.Graph` that a running trace adds to, or `None`.

    Private API: ``torch.fx.experimental.proxy_tensor.get_proxy_mode().tracer.graph``. Without it: `None`; nodes have no layer, so the report names none.
    """
    return getattr(getattr(_proxy_mode(), "tracer", None), "graph", None)


def traced_text(node: Any) -> str:
    """The traced node that a node of an exporter's graph was made of, as the exporter prints it.

    Private API: the metadata ``pkg.torch.onnx.fx_node``. Without it: empty; nodes have no layer, so the report names none.
    """
    return str(node.metadata_props.get("pkg.torch.onnx.fx_node", ""))


def scopes_text(node: Any) -> str:
    """The modules that a node of an exporter's graph was traced in, as the exporter prints them.

    Private API: the metadata ``pkg.torch.onnx.name_scopes``. Without it: empty; the report names no module.
    """
    return str(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
