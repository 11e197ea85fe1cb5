"""What a model is made of: layers and the tensors that run between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]

FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})
"""Data types of real floats, as layers spell them."""


@dataclass(frozen=True)
class Layer:
    """One call of a torch function, an input of the model, or an output of it.

    Attributes:
        name: Kind and counter in execution order, such as ``conv_1``.
        path: Dotted path of the module that made the call; empty for the root module, inputs and outputs.
        kind: What the layer does, one word for its 1d, 2d and 3d forms: ``conv``, ``adaptive_avg_pool``.
        input_shapes: Shape of each tensor it reads from another layer, in argument order.
        output_shapes: Shape of each tensor it returns.
        output_dtypes: Data type of each tensor it returns, written without ``torch.``: ``float32``.
        quantizable_outputs: For each tensor it returns, whether it holds floats of ordinary size; empty: judged by data type.
        attributes: Arguments of the call that describe the layer, such as ``{"kernel_size": (3, 3), "stride": (1, 1)}``.
        parameters: Dotted names of the parameters it reads, the weight first.
        weighted: Whether it multiplies by a weight (convolution, linear, embedding, recurrent, matmul with a parameter).
        multiplications: Products of two numbers that it computes for the example that was captured.
        note: Why the layer can't be quantized whatever the settings say; empty when it can.
        frozen: Path of a frozen module that contains it and that only the training calls, such as a teacher; empty for layers of the deployed model.
        read_out: Indices of the outputs that are also read outside of the network: by Python (`item`, `tolist`, `bool`), a cast to integers, a hook, a loss,
            or code that stores them.
        beside: Whether neither an output of the model nor a layer with weights depends on it: it is part of a loss, a statistic, or a value to log or store.
        outside: Whether the step computes it between its networks, where no module runs; the layers that read it quantize it.
        input_dtypes: Data type of each tensor of ``input_shapes``, written as in ``output_dtypes``; empty: not known.
        constant: Shape of the constant by which it multiplies the one tensor that it reads, or that it adds to it, in evaluation as in training; `None`: it is
            no such layer.
    """

    name: str
    path: str
    kind: str
    input_shapes: tuple[Shape, ...] = ()
    output_shapes: tuple[Shape, ...] = ()
    output_dtypes: tuple[str, ...] = ()
    quantizable_outputs: tuple[bool, ...] = ()
    attributes: Mapping[str, object] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    weighted: bool = False
    multiplications: int = 0
    note: str = ""
    frozen: str = ""
    read_out: tuple[int, ...] = ()
    outside: bool = False
    input_dtypes: tuple[str, ...] = ()
    beside: bool = False
    constant: Shape | None = None


@dataclass(frozen=True)
class Edge:
    """A tensor that runs from one layer to another."""

    source: str
    destination: str
    source_output: int = 0
    destination_input: int = 0
