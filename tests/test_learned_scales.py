"""Learned scales: the gradients of LSQ as plain autograd has them, and trainings of every form with them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Classifier, batches, make_trainer, quick
from models import ResidualCNN
from test_distillation import Module, Net, assert_same, data, twins
from test_schedule import GoesOn, loader
from torch import Tensor, nn

import lightning_cco as cc
from lightning_cco import CCOCallback, CCOError
from lightning_cco.quantization.learned_quantizers import LearnedActivationQuantizer, LearnedWeightQuantizer

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|not resumable|max_epochs|LeafSpec).*")

LEARNED: dict[str, Any] = {"range_estimator": "learned", "weight_estimator": "learned", "scale_learning_rate": 0.01, "stats_steps": 1}
BITS = {"weights_num_bits": 3, "activations_num_bits": 3}


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def scaled(scale: Tensor, factor: float) -> Tensor:
    """The same value, its gradient times a factor, as the paper writes it."""
    return (scale - scale * factor).detach() + scale * factor


def clipped(x: Tensor, low: int, high: int) -> Tensor:
    """`torch.clamp`, whose gradient at its bounds is 1 until PyTorch 2.13 and 0 from 2.14 on; here it is 1, as that of PyTorch's fake quantize."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def lsq(x: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int, count: int) -> Tensor:
    """LSQ (LSQ+ with an offset) in plain autograd."""
    factor = 1 / math.sqrt(count * high)
    scale = scaled(scale, factor)
    offset = torch.zeros(()) if offset is None else scaled(offset, factor)
    return straight_through(clipped((x - offset) / scale, low, high)) * scale + offset


def quantizer_of(low: float, high: float, bits: int, symmetric: bool) -> LearnedActivationQuantizer:
    made = LearnedActivationQuantizer(bits, symmetric)
    made.min_val.fill_(low)
    made.max_val.fill_(high)
    made.refresh()
    return made


@pytest.mark.parametrize("clamp", [None, (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)])
@pytest.mark.parametrize(("ends", "symmetric"), [((0.0, 1.7), False), ((-0.9, 1.3), False), ((-1.1, 1.1), True)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_of_activations(bits: int, ends: tuple[float, float], symmetric: bool, clamp: tuple[float, float] | None) -> None:
    torch.manual_seed(bits)
    made, weight = quantizer_of(*ends, bits, symmetric), torch.randn(6, 5, 4)
    mine = torch.randn(6, 5, 4, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    scale, offset = made.scale.clone().requires_grad_(), (-made.zero_point * made.scale).requires_grad_()
    (made(mine, clamp=clamp) * weight).sum().backward()
    low, high = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    clamped = theirs if clamp is None else F.hardtanh(theirs, *clamp)
    expected = lsq(clamped, scale, None if symmetric else offset, low, high, theirs.numel())
    torch.testing.assert_close(made(mine.detach(), clamp=clamp), expected.detach(), atol=1e-5, rtol=1e-5)
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert made.probe.grad is not None
    torch.testing.assert_close(made.probe.grad[0], scale.grad, atol=1e-5, rtol=1e-4)
    if not symmetric:
        torch.testing.assert_close(made.probe.grad[1], offset.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_of_weights(bits: int, axis: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    made, values = LearnedWeightQuantizer(bits, axis), torch.randn(6, 4, 3, 3).to(dtype)
    made.see(values)
    assert made.scales is not None
    mine, theirs, factor = values.clone().requires_grad_(), values.clone().requires_grad_(), torch.randn(6, 4, 3, 3).to(dtype)
    scale, limit = made.scales.clone().requires_grad_(), 2 ** (bits - 1) - 1
    expected = lsq(theirs if dtype == torch.float64 else theirs.float(), scale, None, -limit, limit, values.numel() // scale.numel())
    (expected * factor).sum().backward()
    (made(mine) * factor).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(
            made(values).float(), expected.detach().float(), atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-5
        )
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert made.probe is not None
    within = 0.02 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(made.probe.grad, scale.grad, atol=within, rtol=within)


class Plain(Net):
    """Without dropout."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__(checkpointed=checkpointed)
        self.drop = nn.Identity()


def by_hand(module: pl.LightningModule, epochs: int = 2, accumulate: int = 1, needs: bool = False) -> cc.QuantizedModel:
    """A training in a loop of one's own, without Lightning; the scales move before the first forward after each step."""
    epoch = data()
    quantized = cc.quantize(module, {"global_quantization_settings": BITS, "training_settings": LEARNED}, (epoch[0][0],))
    quantized.calibrate([[epoch[0][0]]])
    optimizer, count = module.configure_optimizers(), 0
    for _ in range(epochs):
        for x, y in epoch:
            module.train()
            (F.cross_entropy(module(x.clone().requires_grad_(needs)), y) / accumulate).backward()
            count += 1
            if count % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    quantized.update_ranges()
    return quantized


def values_of(quantized: Any) -> dict[str, Tensor]:
    found = {
        f"{key}.{name}": getattr(q, name).clone() for key, q in quantized.activations.items() for name in ("scale", "offset", "velocity")
    }
    return found | {f"{name}.{n}": q.scales.clone() for name, qs in quantized.weights.items() for n, q in enumerate(qs)}


def assert_scales(one: Any, other: Any, within: float = 1e-5) -> None:
    mine, theirs = values_of(one), values_of(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], atol=within, rtol=within, msg=lambda text, key=key: f"{key}: {text}")


def learning(**more: Any) -> CCOCallback:
    return quick(global_quantization_settings=BITS, training_settings={**LEARNED, **more})


def fitted(
    folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, train: Any = None, ckpt: str | None = None, **options: Any
) -> Any:
    cco = learning()
    trainer = make_trainer(folder, cco, *callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module, train or loader(data()), ckpt_path=ckpt)
    return cco.quantized


def test_a_training_is_that_of_a_loop_by_hand_and_moves_every_scale(tmp_path: Path) -> None:
    mine, reference = twins(lambda: Module(Plain(), F.cross_entropy))
    quantized, other = fitted(tmp_path, mine), by_hand(reference)
    assert_same(mine, reference)
    assert_scales(quantized, other)
    start = cc.quantize(
        Module(Plain(), F.cross_entropy), {"training_settings": LEARNED, "global_quantization_settings": BITS}, (data()[0][0],)
    )
    assert not [name for name in mine.state_dict() if "probe" in name or "scale" in name]
    start.model.load_state_dict(mine.state_dict(), strict=True)
    start.calibrate([[data()[0][0]]])
    moved = values_of(quantized)
    for key, value in values_of(start).items():
        if "velocity" not in key and "offset" not in key and key.partition(".")[0] != "input_0":
            assert not torch.equal(value, moved[key]), key


def test_scales_follow_the_formula(tmp_path: Path) -> None:
    """One step: a scale is multiplied by exp(-rate * gradient / scale)."""
    module = Module(Plain(), F.cross_entropy)
    quantized = cc.quantize(module, {"global_quantization_settings": BITS, "training_settings": LEARNED}, (data()[0][0],))
    quantized.calibrate([[data()[0][0]]])
    x, y = data()[0]
    module.train()
    F.cross_entropy(module(x), y).backward()
    before = values_of(quantized)
    gradient = {key: q.probe.grad[0] for key, q in quantized.activations.items() if q.probe.grad is not None}
    assert gradient
    module.configure_optimizers().step()
    quantized.update_ranges()
    after = values_of(quantized)
    for key, value in gradient.items():
        scale = before[f"{key}.scale"]
        torch.testing.assert_close(after[f"{key}.scale"], scale * torch.exp(-(0.01 * value / scale).clamp(-0.25, 0.25)))


def test_accumulated_gradients(tmp_path: Path) -> None:
    mine, reference = twins(lambda: Module(Plain(), F.cross_entropy))
    quantized, other = fitted(tmp_path, mine, accumulate_grad_batches=3), by_hand(reference, accumulate=3)
    assert_same(mine, reference)
    assert_scales(quantized, other)


class ByHand(Module):
    """Manual optimization with one optimizer."""

    def __init__(self, net: nn.Module, loss: Any) -> None:
        super().__init__(net, loss)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = self.loss(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def test_manual_optimization(tmp_path: Path) -> None:
    mine, reference = twins(lambda: ByHand(Plain(), F.cross_entropy))
    quantized, other = fitted(tmp_path, mine), by_hand(reference)
    assert_same(mine, reference)
    assert_scales(quantized, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    mine, reference = twins(lambda: Module(Plain(), F.cross_entropy))
    mine.net.checkpointed = reentrant
    quantized, other = fitted(tmp_path, mine), by_hand(reference, needs=True)
    assert_same(mine, reference)
    assert_scales(quantized, other)


@pytest.mark.parametrize("save_at", [2, 3, 5])
def test_resumes(save_at: int, tmp_path: Path) -> None:
    whole, parts = twins(lambda: Module(Plain(), F.cross_entropy))
    straight = fitted(tmp_path / "a", whole, train=GoesOn())
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=save_at, save_top_k=-1)
    fitted(tmp_path / "b", parts, saving, train=GoesOn(), max_steps=save_at)
    again = Module(Plain(), F.cross_entropy)
    resumed = fitted(tmp_path / "c", again, train=GoesOn(), ckpt=saving.best_model_path)
    assert_same(again, whole)
    assert_scales(resumed, straight)
    loaded = cc.load_quantized(Module(Plain(), F.cross_entropy), saving.best_model_path, (data()[0][0],))
    assert values_of(loaded).keys() == values_of(straight).keys()


def test_bf16_mixed(tmp_path: Path) -> None:
    module = Module(Plain(), F.cross_entropy)
    quantized = fitted(tmp_path, module, precision="bf16-mixed")
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in values_of(quantized).values())
    assert quantized.activations["relu"].velocity[0] != 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 16, 16), torch.randint(0, 10, (8,))
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = ResidualCNN()
        quantized = cc.quantize(model, {"global_quantization_settings": BITS, "training_settings": LEARNED}, (x,))
        quantized.calibrate([[x]])
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        F.cross_entropy(run(x), y).backward()
        optimizer.step()
        quantized.update_ranges()
        results.append(values_of(quantized))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_file_has_the_learned_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cco = quick(global_quantization_settings=BITS, training_settings={**LEARNED, "scale_learning_rate": 0.05})
    make_trainer(tmp_path, cco).fit(Classifier(), batches())
    assert cco.export(tmp_path / "model.onnx").sqnr_db > 30


def test_shared_weights_have_one_scale() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.layer(F.relu(self.layer(x)))))

    quantized = cc.quantize(Twice(), {"training_settings": LEARNED}, (torch.randn(4, 8),))
    quantized.calibrate([[torch.randn(4, 8)]])
    assert quantized.weights["linear"][0] is quantized.weights["linear_1"][0]
    assert copy.deepcopy(quantized.weights["linear"][0]).scales is not None


class Adversarial(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.stem.parameters(), 0.1), torch.optim.SGD(self.net.fc.parameters(), 0.1)]


def test_what_it_does_not_go_with(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match="range_estimator: learned: expected one optimizer, got 2"):
        make_trainer(tmp_path, learning()).fit(Adversarial(), batches())
    recipe = {"training_settings": LEARNED, "global_quantization_settings": {"weights_group_size": 16, "weights_num_bits": 4}}
    with pytest.raises(
        CCOError, match=r"learned scales are those of channels, but the weights of layer 'linear' have one for each group of 16"
    ):
        cc.quantize(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), recipe, (torch.randn(4, 32),))
    with pytest.raises(CCOError, match=r"scale_learning_rate: expected a number above 0, got 0.0"):
        cc.load_settings({"training_settings": {"scale_learning_rate": 0}})


def test_frozen_ranges_stay(tmp_path: Path) -> None:
    cco = learning(freeze_ranges_at_step=0)
    make_trainer(tmp_path, cco).fit(Classifier(), batches())
    assert cco.quantized is not None
    assert all(q.velocity[0] == 0 for q in cco.quantized.activations.values())
    assert any(q.velocity.abs().max() > 0 for qs in cco.quantized.weights.values() for q in qs)


def test_the_rate_falls_with_that_of_the_weights(tmp_path: Path) -> None:
    class Falling(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.2)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]

    rates = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            rates.append(cco.quantized.scales.rate)  # type: ignore[union-attr]

    cco = learning(scale_learning_rate=0.08)
    make_trainer(tmp_path, cco, Rates()).fit(Falling(), batches())
    assert rates == pytest.approx([0.08, 0.04, 0.02, 0.01])


def test_damaged_scales_are_refused() -> None:
    quantized = by_hand(Module(Plain(), F.cross_entropy), epochs=1)
    state = quantized.state_dict()
    for change in (-1.0, math.nan):
        broken = copy.deepcopy(state)
        broken["weight_scales"]["conv"][0]["scales"].fill_(change)
        with pytest.raises(CCOError, match=r"weight_scales.conv\[0\].scales"):
            quantized.load_state_dict(broken)


def test_scales_of_another_width_are_refused() -> None:
    made = LearnedWeightQuantizer(4)
    made.see(torch.randn(6, 4))
    with pytest.raises(CCOError, match="expected a weight of 6 channels, got one of 8"):
        made(torch.randn(8, 4))
