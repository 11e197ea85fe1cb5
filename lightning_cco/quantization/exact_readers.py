"""Who needs a tensor as it is, and so where it is rounded.

An index, a mask or a step function worked out of a rounded tensor would be another one. A tensor that somebody reads so is not rounded where it is made,
but where INT8 layers read it; likewise a tensor that no function mode sees being made.
"""

from __future__ import annotations

from collections.abc import Collection

from lightning_cco.compat.dynamo import TAKE_FUNCTIONS
from lightning_cco.graph.layer import FLOATS
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, category_of
from lightning_cco.quantization.tensor_key import TensorKey

UNSEEN = TAKE_FUNCTIONS | {"input", "cast", "written", "unseen", "custom_function"}
"""Kinds of what no function mode sees being made at run time."""
_STEPS = frozenset({
    "round", "floor", "ceil", "trunc", "fix", "frac", "sign", "sgn", "heaviside", "remainder", "fmod", "mod", "rmod", "imod", "floor_divide",
    "floordiv", "rfloordiv", "ifloordiv", "divmod", "rdivmod", "unique", "unique_consecutive", "histc", "histogram", "histogramdd",
})  # fmt: skip
INDEX, COMPLEX, READ = (
    "is used as an index, a mask or a step function, which rounding would change",
    "becomes complex numbers (an FFT), which stay in float",
    "is read by Python, a hook, a loss or a log, and by no layer",
)
"""What it is that somebody needs a tensor for as it is."""
_INDIFFERENT = frozenset({
    "isnan", "isinf", "isfinite", "isposinf", "isneginf",
    "pack_padded_sequence", "pad_packed_sequence", "_pack_padded_sequence", "_pad_packed_sequence",
})  # fmt: skip
"""Whose integers rounding changes nothing of: those of a packed sequence are its lengths."""


class ExactReaders:
    """The layers that need what they read as it is, and the tensors that they read.

    Args:
        graph: The layer graph.
        asked: Layers that a rule quantizes by name.

    Attributes:
        layers: Layers that compute indices, masks, steps or complex numbers from floats, and those whose results are read by such layers alone.
        why: For what, in words, by layer.
        of_inputs: The inputs of the model, and what is worked out of them alone before anything is multiplied.
        passing: Layers that only pass values on.
        readers: For each tensor its readers, and as which of their inputs.
    """

    def __init__(self, graph: LayerGraph, asked: Collection[str] = ()) -> None:
        self.graph = graph
        self.readers: dict[TensorKey, list[tuple[str, int]]] = {}
        self._sources: dict[str, list[TensorKey]] = {name: [] for name in graph.names}
        for edge in graph.edges:
            self.readers.setdefault(TensorKey(edge.source, edge.source_output), []).append((edge.destination, edge.destination_input))
            self._sources[edge.destination].append(TensorKey(edge.source, edge.source_output))
        categories = {layer.name: category_of(layer) for layer in graph}
        self.passing = {name for name, category in categories.items() if category in (Category.PRESERVE, Category.IDENTITY)}
        multiplying = {name for name, category in categories.items() if category in (Category.WEIGHTED, Category.MATMUL)}
        self.of_inputs: set[str] = set()
        for layer in graph:
            sources = self._sources[layer.name]
            if layer.kind == "input" or (
                sources and layer.name not in multiplying and all(source.layer in self.of_inputs for source in sources)
            ):
                self.of_inputs.add(layer.name)
        self.why = {name: COMPLEX if self._makes_complex(name) else INDEX for name in graph.names if self._steps(name)}
        self._deployed = {layer.name for layer in graph if layer.kind == "output"}
        for name in reversed(graph.names):
            if name in self._deployed:
                self._deployed.update(source.layer for source in self._sources[name])
        self._exact: dict[TensorKey, str] = {}
        self._other: dict[TensorKey, bool] = {}
        self._returned: dict[TensorKey, bool] = {}
        for name in reversed(graph.names):
            exact, other = self._read(name)
            if name in self.passing or name in multiplying or name in self.layers or name in asked or not exact:
                continue
            # What only serves an index is computed in float; so is what is worked out of the inputs alone, on the way to the first weights.
            if self.graph[name].kind not in ("input", "output") and (not other or name in self.of_inputs):
                self.why[name] = exact

    @property
    def layers(self) -> Collection[str]:
        """Names of the layers that need what they read as it is."""
        return self.why.keys()

    def reads(self, key: TensorKey) -> bool:
        """Whether somebody needs a tensor as it is, seen through what only passes values on."""
        return bool(self._exact.get(key))

    def reads_for_output(self, key: TensorKey) -> str:
        """Why an output of the model needs a tensor unquantized; values that are stored for a log are not in a file. Empty: none does."""
        pending = [key]
        while pending:
            for reader, _ in self.readers.get(pending.pop(), ()):
                if reader in self.passing:
                    pending += _outputs(reader, len(self.graph[reader].output_dtypes))
                elif reader in self.layers and reader in self._deployed:
                    return self.why[reader]
        return ""

    def _makes_complex(self, name: str) -> bool:
        return any("complex" in dtype for dtype in self.graph[name].output_dtypes)

    def _steps(self, name: str) -> bool:
        layer = self.graph[name]
        if layer.kind in _INDIFFERENT or not any(self.is_float(source) for source in self._sources[name]):
            return False
        if layer.kind in _STEPS or "rounding_mode" in layer.attributes:
            return True
        outputs = [key for key in _outputs(name, len(layer.output_dtypes)) if not self.is_float(key)]
        return bool(outputs) and (len(outputs) == len(layer.output_dtypes) or any(key in self.readers for key in outputs))

    def is_float(self, key: TensorKey) -> bool:
        """Whether a tensor holds real floats."""
        dtypes = self.graph[key.layer].output_dtypes
        return key.output < len(dtypes) and dtypes[key.output] in FLOATS

    def _read(self, name: str) -> tuple[str, bool]:
        """What a layer's outputs are needed for as they are, and whether they have other readers; readers come before it in the walk."""
        layer = self.graph[name]
        keys = _outputs(name, max(1, len(layer.output_dtypes)))
        for key in keys:
            needs: list[str] = []
            other = returned = False
            for reader, _ in self.readers.get(key, ()):
                outputs = _outputs(reader, max(1, len(self.graph[reader].output_dtypes)))
                if reader in self.layers:
                    needs.append(self.why[reader])
                    other = other or (reader in self.passing and any(self._other.get(k, False) for k in outputs))
                elif reader in self.passing:
                    needs += [self._exact.get(k, "") for k in outputs]
                    other = other or any(self._other.get(k, False) for k in outputs)
                    returned = returned or any(self._returned.get(k, False) for k in outputs)
                elif self.graph[reader].kind != "output":
                    other = True
                else:
                    returned = True
            if key.output in layer.read_out:
                needs.append(READ)
                other = other or (returned and INDEX not in needs and COMPLEX not in needs)  # whoever else looks at what the model gives
            self._exact[key] = next((need for need in (INDEX, COMPLEX, READ) if need in needs), "")
            self._other[key], self._returned[key] = other, returned
        found = [self._exact[k] for k in keys]
        return next((need for need in (INDEX, COMPLEX, READ) if need in found), ""), any(self._other[k] for k in keys)


class Placement:
    """Where tensors are rounded that are not rounded where they are made.

    Args:
        exact: Who needs them as they are.
        int8: Layers that run in INT8.

    Attributes:
        reads: For each layer, by the number of its input, the quantizer that rounds it there.
    """

    def __init__(self, exact: ExactReaders, int8: Collection[str]) -> None:
        self._exact, self._int8 = exact, int8
        self.reads: dict[str, dict[int, TensorKey]] = {}

    def place(self, key: TensorKey, quantizer: TensorKey | None = None) -> bool:
        """Round a tensor where INT8 layers read it, by a quantizer of its own name or another; returns whether there are any.

        At once if nobody else reads it. Else after all that moves its values, so that a range is that of the part which is read: a table's column of
        identifiers has no say in that of its measurements.
        """
        return self._place(key, quantizer or key, quantizer is None and self._leads_to_int8_alone(key))

    def _place(self, key: TensorKey, quantizer: TensorKey, at_once: bool) -> bool:
        found = False
        for reader, number in self._exact.readers.get(key, ()):
            if reader in self._exact.passing and (not at_once or self._exact.graph[reader].outside):
                if number == 0:  # others are indices and sizes
                    for output in _outputs(reader, len(self._exact.graph[reader].output_dtypes)):
                        found |= self._place(output, quantizer, at_once)
            elif reader in self._int8 or (reader in self._exact.passing and number == 0):
                self.reads.setdefault(reader, {})[number] = quantizer
                found = True
        return found

    def _leads_to_int8_alone(self, key: TensorKey) -> bool:
        """Whether INT8 layers read a tensor, and nobody else, seen through what only passes values on."""
        readers = self._exact.readers.get(key, ())
        if not readers or key.output in self._exact.graph[key.layer].read_out:
            return False
        for reader, number in readers:
            if reader not in self._exact.passing:
                if reader not in self._int8:
                    return False
                continue
            outputs = _outputs(reader, len(self._exact.graph[reader].output_dtypes))
            floats = [output for output in outputs if self._exact.is_float(output) and output in self._exact.readers]
            if number or reader in self._exact.layers or not floats or not all(map(self._leads_to_int8_alone, floats)):
                return False
        return True


def _outputs(layer: str, count: int) -> list[TensorKey]:
    return [TensorKey(layer, number) for number in range(count)]
