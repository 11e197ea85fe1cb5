"""How the tensors of a graph are made and read, seen through layers that only pass values on."""

from __future__ import annotations

from lightning_cco.graph.layer import FLOATS
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, category_of
from lightning_cco.quantization.tensor_key import TensorKey


class Connections:
    """Who makes and who reads each tensor.

    Args:
        graph: The layer graph.

    Attributes:
        category: The category of each layer.
        reads: The tensors that each layer reads, in the order of its inputs.
        readers: The layers that read each tensor.
        origin: For every tensor the one it got its values from, seen through value-preserving layers.
    """

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        self.category = {layer.name: category_of(layer) for layer in graph}
        self.reads: dict[str, list[TensorKey]] = {name: [] for name in graph.names}
        self.readers: dict[TensorKey, list[str]] = {}
        for edge in graph.edges:
            key = TensorKey(edge.source, edge.source_output)
            self.reads[edge.destination].append(key)
            self.readers.setdefault(key, []).append(edge.destination)
        self.origin: dict[TensorKey, TensorKey] = {}
        for layer in graph:
            reads = self.reads[layer.name]
            for key in self.outputs(layer.name, at_least=1):
                self.origin[key] = self.origin.get(reads[0], reads[0]) if self.passes(layer.name) and reads else key

    def outputs(self, name: str, at_least: int = 0) -> list[TensorKey]:
        """The tensors that a layer makes."""
        return [TensorKey(name, number) for number in range(max(at_least, len(self.graph[name].output_dtypes)))]

    def passes(self, name: str) -> bool:
        """Whether a layer only passes values on."""
        return self.category[name] in (Category.PRESERVE, Category.IDENTITY)

    def is_float(self, key: TensorKey) -> bool:
        """Whether a tensor holds real floats."""
        dtypes = self.graph[key.layer].output_dtypes
        return key.output < len(dtypes) and dtypes[key.output] in FLOATS

    def sources(self, name: str) -> list[TensorKey]:
        """The tensors that a layer reads the values of, floats alone."""
        return [source for source in (self.origin[read] for read in self.reads[name]) if self.is_float(source)]

    def consumers(self, name: str) -> list[str]:
        """The layers that read what a layer makes, seen through those that only pass values on."""
        return [reader for key in self.outputs(name, at_least=1) for reader in self.consumers_of(key)]

    def consumers_of(self, key: TensorKey) -> list[str]:
        """The layers that read one tensor, seen through those that only pass values on."""
        found: list[str] = []
        pending = [key]
        while pending:
            for reader in self.readers.get(pending.pop(), []):
                if self.passes(reader):
                    pending += self.outputs(reader, at_least=1)
                else:
                    found.append(reader)
        return found

    def only_reader(self, name: str) -> str | None:
        """The layer that alone reads a layer's one output."""
        readers = self.readers.get(TensorKey(name), [])
        return readers[0] if len(readers) == 1 and len(self.graph[name].output_dtypes) == 1 else None
