"""A setting that changes nothing is said, with the reason; one that changes something is not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import GuideCNN, ResidualCNN

from lightning_cco import CCOWarning, quantize

NETWORKS = {"plain": GuideCNN, "residual": ResidualCNN}


@pytest.mark.parametrize(
    ("network", "settings", "said"),
    [
        (
            "plain",
            {"training_settings": {"percentile": 99.0}},
            r"percentile: 99 changes nothing: range_estimator is auto. Add range_estimator",
        ),
        (
            "plain",
            {"training_settings": {"averaging_constant": 0.5, "range_estimator": "min_max"}},
            "averaging_constant: 0.5 changes nothing",
        ),
        ("plain", {"training_settings": {"scale_learning_rate": 0.01}}, "scale_learning_rate: 0.01 changes nothing: no scale is learned"),
        (
            "plain",
            {"training_settings": {"freeze_batch_norm_at_step": 5}},
            "freeze_batch_norm_at_step: 5 changes nothing: the model has no",
        ),
        ("plain", {"distillation_settings": {"temperature": 4.0}}, "temperature changes nothing: there is no distillation"),
        ("plain", {"distillation_settings": {"weight": 0.5, "temperature": 4.0, "loss": "mse"}}, "temperature: 4 changes nothing"),
        ("plain", {"global_quantization_settings": {"residual_stream": "float"}}, "residual_stream: float changes nothing"),
        ("plain", {"deployment_settings": {"int4": True}}, "int4: true changes nothing: no layer has weights of at most 4 bits"),
    ],
)
def test_a_setting_without_effect_is_said(network: str, settings: dict[str, Any], said: str) -> None:
    with pytest.warns(CCOWarning, match=said):
        quantize(NETWORKS[network](), settings, (torch.randn(2, 1, 8, 8),))


@pytest.mark.parametrize(
    "settings",
    [
        {"training_settings": {"percentile": 99.0, "range_estimator": "percentile"}},
        {"training_settings": {"scale_learning_rate": 0.01, "weight_estimator": "learned"}},
        {"training_settings": {"averaging_constant": 0.5, "freeze_batch_norm_at_step": 5, "bias_correction": True}},
        {"distillation_settings": {"weight": 0.5, "temperature": 4.0}},
        {"global_quantization_settings": {"residual_stream": "float"}},
        {"global_quantization_settings": {"weights_num_bits": 4}, "deployment_settings": {"int4": True}},
        {"training_settings": {"stages": [{"at_step": 5, "weights_num_bits": 4}]}, "deployment_settings": {"int4": True}},
        {"budget_settings": {"average_bits": 4}, "deployment_settings": {"int4": True}},
    ],
)
def test_a_setting_with_an_effect_is_not(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        quantize(ResidualCNN(), settings, (torch.randn(2, 1, 8, 8),))
