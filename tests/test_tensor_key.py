"""The names of tensors: types in the code, texts in checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.quantization.skip_reasons import SkipReason
from lightning_cco.quantization.tensor_key import TensorKey


class Halves(nn.Module):
    """A layer whose result is read in two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.inner(x).chunk(2, -1)
        return self.head(torch.relu(self.first(left)) + torch.relu(self.second(right)))


def made() -> tuple[QuantizedModel, Tensor]:
    """A calibrated model and its input."""
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    quantized = quantize(Halves(), None, (x,))
    quantized.calibrate([x])
    return quantized, x


def test_a_key_is_its_text_and_knows_its_parts() -> None:
    key = TensorKey("lstm", 1)
    for same in (key, copy.deepcopy(key), pickle.loads(pickle.dumps(key))):
        assert (same, same.layer, same.output) == ("lstm:1", "lstm", 1)
    assert {key: 0}["lstm:1"] == 0
    assert TensorKey("lstm", 0) == "lstm"


def test_a_state_holds_plain_texts_and_is_read_by_them(tmp_path: Path) -> None:
    quantized, x = made()
    assert all(type(key) is TensorKey for key in (*quantized.activations, *quantized.plan.tensors, *quantized.plan.origins))
    state = quantized.state_dict()
    assert {type(key) for key in state["ranges"]} == {str}
    torch.save(state, tmp_path / "state.pt")
    other, _ = made()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.model(x), quantized.model(x))


def test_reasons_are_of_a_kind_and_have_a_text() -> None:
    quantized, _ = made()
    plan = quantized.plan
    assert plan.left_for(SkipReason.TAIL) == [name for name in plan.skipped if plan.decisions[name].reason is SkipReason.TAIL] != []
    assert all(plan.skipped[name].endswith(plan.decisions[name].detail) for name in plan.skipped)
    assert {plan.decisions[name].reason for name in plan.quantized} == {None}
