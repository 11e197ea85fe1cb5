"""TensorRT. Sources: its documentation on explicit quantization and the placement of Q/DQ operators; it was not run."""

from __future__ import annotations

from lightning_cco.export.engines.entry import Engine

TENSORRT = Engine(
    "tensorrt",
    "TensorRT",
    (),  # float biases, symmetric pairs: what the file has without a want
    fixed_sizes="TensorRT asks for the least and the largest of each size that varies",
    not_run="the file is what TensorRT's documentation asks for (symmetric int8 Q/DQ pairs); it was run in ONNX Runtime only",
    takes_fp16=True,  # from version 10 on it can be, and from 11 on it always is, strongly typed
)
