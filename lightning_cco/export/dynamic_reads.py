"""What products of a file read that they round when they run: given as further outputs, so that each product is compared on what it read itself."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_cco.export.ort_session import QuantizeNode
from lightning_cco.export.weight_blocks import PRODUCT

SUFFIX = ".read"
"""What the name of a layer is followed by, in the names of these tensors, and of what is compared."""


@dataclass(frozen=True)
class DynamicReads:
    """The products of a file that round what they read.

    Attributes:
        nodes: Their names.
        copies: Names of copies of what they read, and of what.
        compared: These copies by layer, as rounded tensors of scale 1: several where a layer is called several times.
    """

    nodes: set[str] = field(default_factory=set)
    copies: dict[str, str] = field(default_factory=dict)
    compared: dict[str, list[QuantizeNode]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, layers: Mapping[str, str], dynamic: Container[str]) -> DynamicReads:
        """Those of a loaded file.

        Args:
            model: The file.
            layers: Layer of each of its nodes, by the node's name.
            dynamic: Layers that round what they read.
        """
        found = cls()
        for node in model.graph.node:
            layer = layers.get(node.name, "")
            if node.op_type != PRODUCT or layer not in dynamic:
                continue
            entries = found.compared.setdefault(f"{layer}{SUFFIX}", [])
            name = f"{layer}{SUFFIX}.{len(entries) + 1}"
            found.nodes.add(node.name)
            found.copies[name] = node.input[0]
            entries.append(QuantizeNode(name, 1.0, 0))
        return found
