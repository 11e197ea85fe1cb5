"""ONNX's RNN operator for PyTorch's plain recurrent layers, which the exporter has no translation of: it would write each time step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`: ``aten.rnn_tanh.input`` and ``aten.rnn_relu.input``."""
    return {torch.ops.aten.rnn_tanh.input: _rnn("Tanh"), torch.ops.aten.rnn_relu.input: _rnn("Relu")}


def _rnn(activation: str) -> Callable[..., Any]:
    from onnxscript import opset18

    op: Any = opset18  # its stubs know tensors alone, not the constants that it takes in a trace

    def translate(
        x: Any,
        states: Any,
        weights: Sequence[Any],
        has_biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        directions = 2 if bidirectional else 1
        each = 4 if has_biases else 2
        # ONNX: x [time, batch, input], W [directions, hidden, input], R [directions, hidden, hidden], B [directions, 2 * hidden].
        x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        ends = []
        for layer in range(layers):
            own = [weights[each * number : each * (number + 1)] for number in range(directions * layer, directions * (layer + 1))]
            parts = [[op.Unsqueeze(part, [0]) for part in parts[:2]] for parts in own]
            read = [op.Concat(*found, axis=0) if directions > 1 else found[0] for found in zip(*parts, strict=True)]
            if has_biases:
                biases = [op.Unsqueeze(op.Concat(*parts[2:], axis=0), [0]) for parts in own]
                read.append(op.Concat(*biases, axis=0) if directions > 1 else biases[0])
            begins = op.Slice(states, [directions * layer], [directions * (layer + 1)], [0])
            result, end = op.RNN(
                x,
                *(read if has_biases else [*read, None]),
                None,
                begins,
                hidden_size=states.shape[2],
                direction="bidirectional" if bidirectional else "forward",
                activations=[activation] * directions,
            )
            # From [time, directions, batch, hidden] to [time, batch, directions * hidden].
            x = op.Reshape(op.Transpose(result, perm=[0, 2, 1, 3]), [0, 0, -1])
            ends.append(end)
        states = op.Concat(*ends, axis=0) if layers > 1 else ends[0]
        return (op.Transpose(x, perm=[1, 0, 2]) if batch_first else x), states

    return translate
