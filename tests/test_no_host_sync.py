"""A training step never waits for the device: on a GPU nothing reads a value back, or sends one there by a blocking copy.

On the CPU, on the path of a GPU: quantizers do not know their numbers. A dispatch mode that is hidden from the quantizers sees the operations that wait, and
patches see what Python reads without one. What counts is what our code asks for from the second step on; at the boundaries of an epoch it may look.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels_off import turn_kernels_off
from lightning_modules import Classifier, batches, make_trainer, quick
from test_weight_groups import Decoder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from triton_here import DEVICE, as_on_a_gpu, needs_triton, use_triton

import lightning_cco
from lightning_cco.quantization import activation_range, outliers, range_updates, tracing
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.weight_quantizer import WeightQuantizer
from lightning_cco.quantization.weight_recompute import LEAST_RECOMPUTED, RecomputedWeight, saving_recomputed

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|not resumable|max_epochs|LeafSpec).*")
OURS = str(Path(lightning_cco.__file__).parent)
# Values that have come to the host already.
ARRIVED = f"_local_scalar_dense in {OURS}/quantization/activation_range.py: notice_in_training"
OTHERS = ("/site-packages/torch/", "/site-packages/numpy/", "/site-packages/triton/", "<", __file__)
# Of `torch.tensor` on a device comes a blocking copy from the host; `repeat_interleave` asks how long its result is.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
    "lift_fresh",
    "bincount",
}


class Waits(TorchDispatchMode):
    """Notes which lines of ours let the host wait while `active`."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.found: list[str] = []

    def note(self, name: str) -> None:
        if not self.active:
            return
        frame, inner = sys._getframe(1), None
        while frame is not None and inner is None:
            path = frame.f_code.co_filename
            if not any(part in path for part in OTHERS):
                inner = f"{name} in {path}: {frame.f_code.co_name}"
            frame = frame.f_back  # type: ignore[assignment]
        if inner is not None and f" in {OURS}" in inner and inner != ARRIVED:
            self.found.append(inner)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masked or (name in WAITING and kwargs.get("output_size") is None):
            self.note(name)
        return func(*args, **kwargs)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Waits()
    monkeypatch.setattr(tracing, "dispatch_mode_count", lambda: 0)
    for name in ("tolist", "numpy", "cpu", "__array__"):
        original = getattr(Tensor, name)

        def patched(self: Tensor, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            found.note(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, patched)
    return found


class Watched(Classifier):
    """Its steps are watched from the second one on."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.waits.active = self.global_step > 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.waits.active = self.waits.active and not self.trainer.is_last_batch


class Adapted(nn.Module):
    """A branch that begins at zero: nothing says anything about the range of what it gives, until it has been trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.adapter = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        nn.init.zeros_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc(self.mid(self.adapter(x).sigmoid() * x + self.adapter(x)).mean((2, 3)))


class WatchedAdapter(Watched):
    def __init__(self, waits: Waits) -> None:
        super().__init__(waits)
        self.net = Adapted()


class WatchedDecoder(Watched):
    def __init__(self, waits: Waits) -> None:
        super().__init__(waits)
        self.net = Decoder()

    def _loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[0].flatten())


LEARNED = {"range_estimator": "learned", "weight_estimator": "learned", "stats_steps": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "moving": {},
    "frozen": {"training_settings": {"freeze_ranges_at_step": 0, "stats_steps": 1}},
    "frozen_later": {"training_settings": {"freeze_ranges_at_step": 2, "stats_steps": 1}},
    "min_max": {"training_settings": {"range_estimator": "min_max", "stats_steps": 1}},
    "percentile": {"training_settings": {"range_estimator": "percentile", "stats_steps": 1}},
    "learned": {"training_settings": LEARNED},
    "two_bits": {"global_quantization_settings": {"weights_num_bits": 2, "activations_num_bits": 4}},
    "several_formats": {"layer_settings": {"net.stem": {"activations_num_bits": 6}}},
    "distillation": {"distillation_settings": {"weight": 0.5}},
    "distillation_of_layers": {"distillation_settings": {"weight": 0.5, "on": "layers"}},
    "empty": {},
    "groups": {"global_quantization_settings": {"weights_group_size": 32, "weights_num_bits": 4, "skip_tail_quantization": False}},
}


@pytest.mark.filterwarnings("ignore:calibrate. nothing but zeros")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step(recipe: str, waits: Waits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn_kernels_off(monkeypatch)
    as_on_a_gpu(monkeypatch)
    for user in (activation_range, outliers, range_updates):
        monkeypatch.setattr(user, "reads_at_once", lambda device: False)
    module = {"groups": WatchedDecoder, "empty": WatchedAdapter}.get(recipe, Watched)(waits)
    loader = DataLoader(torch.arange(4 * 24).remainder(48).reshape(4, 1, 2, 12), None) if recipe == "groups" else batches()
    cco = quick(**RECIPES[recipe])
    with waits:
        make_trainer(tmp_path, cco).fit(module, loader)
    assert sorted(set(waits.found)) == []
    assert module.global_step == 4
    assert not any(quantizer.empty for quantizer in cco.quantized.activations.values())


@needs_triton
@pytest.mark.parametrize("values", [300, LEAST_RECOMPUTED])
def test_the_kernels_of_a_gpu(values: int, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer whose weight is kept for the backward, and one whose weight is rounded again there."""
    use_triton(monkeypatch)
    layer = nn.Linear(-(-values // 3), 3, device=DEVICE)
    weights, activations = WeightQuantizer(2 if values < 1000 else 8, estimator="auto"), ActivationQuantizer().to(DEVICE)
    x = torch.randn(2, layer.in_features, device=DEVICE, requires_grad=True)
    activations.observe(x)
    activations.finish_calibration()
    waits.active = True
    with waits:
        rooms: list[RecomputedWeight] = []
        weight = weights(layer.weight, recomputed=rooms)
        y = (saving_recomputed(F.linear, rooms) if rooms else F.linear)(activations(x, track=True), weight, layer.bias)
        activations(y, clamp=(0.0, 6.0)).sum().backward()
    assert waits.found == []
    assert bool(rooms) == (values >= LEAST_RECOMPUTED)
    assert layer.weight.grad is not None
    assert torch.isfinite(activations.extrema).all()


def test_the_search_finds(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "OURS", __file__)
    monkeypatch.setattr(sys.modules[__name__], "OTHERS", OTHERS[:-1])
    x, waits.active = torch.ones(3), True
    with waits:
        _ = bool(x[0]), float(x[0]), x.sum().item(), x.tolist(), x[x > 0], torch.tensor([1.0]), x.cpu(), x.nonzero(), torch.equal(x, x)
    assert len(waits.found) == 9
