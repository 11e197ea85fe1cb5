"""ExecuTorch with XNNPACK. Sources: its partitioner's configurations, and what it makes of programs."""

from __future__ import annotations

from lightning_cco.export.engines.entry import Engine, Form, Want

EXECUTORCH = Engine(
    "executorch",
    "ExecuTorch",
    (
        Want(
            Form.SIGNED,
            "1.5",
            "XNNPACK has no kernels for uint8: its partitioner leaves such operators to float",
            "",
        ),
    ),
    fixed_sizes="its memory is planned for sizes that are known",
    not_run="the file is for ONNX Runtime, planned as ExecuTorch computes; ExecuTorch reads .pt2 programs",
)
