"""What is said of a file's outputs beside the fake-quantized model's."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.audio import SignalNoiseRatio

from lightning_cco.export.outputs import Outputs
from lightning_cco.export.report import ExportReport


def reported(expected: np.ndarray, results: np.ndarray) -> ExportReport:
    outputs = Outputs(["y"], [None])
    outputs.add([expected], [results], [expected], [results])
    return ExportReport("model.onnx", batches=1, sqnr_db=outputs.sqnr_db, varying_sqnr_db=outputs.varying_sqnr_db)


def test_noise_beside_what_differs_between_samples() -> None:
    drawn = np.random.default_rng(0).normal(size=(2, 8, 16))
    expected = 100 + drawn[0]  # the mean of all is 100: the constant part hides the noise
    report = reported(expected, expected + 0.3 * drawn[1])
    deviation = torch.from_numpy(expected - expected.mean(0))
    reference = SignalNoiseRatio()((deviation + 0.3 * torch.from_numpy(drawn[1])).flatten(), deviation.flatten())
    assert abs(report.varying_sqnr_db - float(reference)) < 1e-3
    assert f"SQNR {float(reference):.1f} dB of what differs between the samples" in str(report)


def test_outputs_that_are_the_same_for_all_samples_are_said_to_be() -> None:
    expected = np.repeat(np.linspace(0.1, 1, 16)[None], 8, 0)
    noisy = expected + 1e-4 * np.random.default_rng(0).normal(size=expected.shape)
    text = str(reported(expected, noisy))
    assert "gives all samples of a batch the same outputs" in text
    assert "inf" not in text.partition("between samples")[2].splitlines()[0]
