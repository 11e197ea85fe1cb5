"""What is planned for engines that read programs: products give rounded results, a transformer's residual stream stays in float."""

from __future__ import annotations

from typing import Any

import pytest
from export_models import LSTMClassifier, MobileNetV2, TransformerBlock, UNet
from models import ResidualCNN, TokenModel
from torch import Tensor, nn, randint, randn

from lightning_cco import CCOError, CCOWarning, capture_graph, plan_quantization
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.skip_reasons import SkipReason
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.settings import load_settings


class PostNorm(nn.Module):
    """A block whose norms come after the additions, as in the first transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.outer(self.inner(x).relu())))


class GroupedUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.cube = nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 4, 2, 2, groups=2), nn.Conv3d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.cube(self.up(self.first(x)).unsqueeze(1)).mean()


def planned(model: nn.Module, example: Tensor, **overall: Any) -> QuantizationPlan:
    settings = {"global_quantization_settings": overall, "deployment_settings": {"target_framework": "executorch"}}
    return plan_quantization(capture_graph(model.eval(), example), load_settings(settings))


def kinds(plan: QuantizationPlan, *names: str) -> dict[str, bool]:
    return {layer.name: layer.name in plan.quantized for layer in plan.graph if layer.kind in names}


@pytest.mark.parametrize(
    ("model", "example", "additions"),
    [
        (TokenModel(), TokenModel.example(), False),
        (TransformerBlock(8, 2, causal=False), randn(2, 5, 8), False),
        (PostNorm(), randn(2, 6), False),
        (ResidualCNN(), ResidualCNN.example(), True),
        (MobileNetV2(((1, 8, 1, 1), (2, 8, 2, 2)), 8, 4), randn(1, 3, 16, 16), True),
    ],
    ids=["pre-norm", "block", "post-norm", "residual", "mobilenet"],
)
def test_additions_of_transformers_stay_in_float(model: nn.Module, example: Tensor, additions: bool) -> None:
    plan = planned(model, example)
    found = kinds(plan, "add")
    assert found
    assert set(found.values()) == {additions}
    for name in plan.quantized:
        if plan.graph[name].kind in ("linear", "conv"):
            end = name
            while end in plan.groups:
                end = plan.groups[end]
            assert plan.rounds(TensorKey(end)), f"{name}: XNNPACK's products in INT8 give rounded results alone"


def test_what_has_no_integer_form_is_in_float_with_float_weights() -> None:
    plan = planned(UNet(), randn(1, 3, 16, 16))
    assert kinds(plan, "concat") == {"concat": True, "concat_1": True}
    assert kinds(plan, "conv_transpose") == {"conv_transpose": True}
    plan = planned(GroupedUp(), randn(1, 2, 8, 8), skip_tail_quantization=False)
    assert not plan.decisions["conv_transpose"].weight_only
    assert plan.skipped["conv_transpose"] == "conv_transpose with these arguments is computed in float by executorch"
    assert [name for name in plan.quantized if plan.graph[name].kind == "conv"] == ["conv"]
    plan = planned(LSTMClassifier(), randint(0, 30, (2, 5)))
    assert set(plan.weight_only) == {"embedding"}
    assert plan.decisions["lstm"].reason is SkipReason.ENGINE


def test_weights_alone_are_not_stored_as_integers() -> None:
    with pytest.warns(
        CCOWarning, match=r"weight_only: true with target_framework: executorch, .* 'linear', .* stay in float\. Leave weight_only out"
    ):
        plan = planned(TokenModel(), TokenModel.example(), weight_only=True)
    assert set(plan.weight_only) == {"embedding"}
    assert plan.skipped["linear"].endswith("weight_only: true for all layers, and executorch multiplies no floats with integer weights")


def test_groups_are_refused() -> None:
    with pytest.raises(CCOError, match=r"target_framework: executorch, which was not tried with weights in groups"):
        planned(TokenModel(), TokenModel.example(), weights_group_size=16, weight_only=True)
