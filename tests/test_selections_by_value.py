"""Networks that select by value, as detectors and routers do: rounding changes how much they select, and loops run as often as the data ask for."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cco import CCOCallback, CCOWarning, quantize

SELECTS = "ignore:Accumulated QS. layer"


class Proposals(nn.Module):
    """Scores each row, refines those above the mean, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.score, self.refine, self.head = nn.Linear(8, 32), nn.Linear(32, 1), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x).relu()
        score = self.score(h).squeeze(-1)
        chosen = score > score.mean()
        refined = self.refine(h[chosen]).relu()
        return self.head(h.index_put((chosen.nonzero().squeeze(1),), refined))


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Proposals()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


FEW = {"global_quantization_settings": {"weights_num_bits": 2, "activations_num_bits": 2}}
SETTINGS = {
    "plain": FEW,
    "teacher": FEW | {"distillation_settings": {"weight": 0.5, "on": "layers"}},
    "bias correction": FEW | {"training_settings": {"bias_correction": True}},
    "loss sensitivity": FEW | {"monitoring_settings": {"loss_sensitivity": True}},
}


@pytest.mark.filterwarnings(SELECTS, "ignore:loss sensitivity. no gradient", "ignore:.*does not have many workers", "ignore:.*suggest")
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_training_goes_to_its_end(settings: str) -> None:
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(128, 8), torch.randint(0, 4, (128,))), 32)
    callback = CCOCallback(SETTINGS[settings])
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(Classifier(), loader)
    assert trainer.current_epoch == 2
    assert callback.report is not None
    assert "linear_2" in callback.report.local


def test_batches_in_which_the_selection_differs_are_left_out_of_the_accumulated_qs() -> None:
    torch.manual_seed(0)
    model = Proposals().eval()
    batches = list(torch.randn(12, 16, 8))
    with torch.no_grad():
        floats = [model.refine(h[(s := model.score(h).squeeze(-1)) > s.mean()]) for h in (model.features(x).relu() for x in batches)]
    quantized = quantize(model, {"global_quantization_settings": {"weights_num_bits": 3, "activations_num_bits": 3}}, (batches[0],))
    quantized.calibrate(batches)
    seen: list[Tensor] = []
    handle = model.refine.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in batches:
            model(x)
    handle.remove()
    same = [(a, b) for a, b in zip(seen, floats, strict=True) if a.shape == b.shape]
    assert 0 < len(same) < len(batches), "else this test compares nothing"
    with pytest.warns(CCOWarning, match="Accumulated QS: layer 'linear_2' computes what the model selects by value"):
        report = quantized.sensitivity(batches)
    expected = torch.stack([(a - b).double().square().sum() for a, b in same]).mean().sqrt()
    assert report.accumulated["linear_2"].qs == pytest.approx(float(expected), rel=1e-5)
    assert set(report.local) >= {"linear", "linear_1", "linear_2"}


@torch.library.custom_op("cco_selects::best", mutates_args=())
def best(scores: Tensor) -> Tensor:
    return scores.sum(1).argmax().reshape(1)


class Decodes(nn.Module):
    """A custom operator that gives indices, and a decoding of the outputs, once for each object."""

    def __init__(self) -> None:
        super().__init__()
        self.objects, self.first, self.second, self.head = 1, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x).relu()
        rows = [best(h) for _ in range(self.objects)]
        out = self.head(self.second(h[rows[-1].expand(len(h))]).relu())
        return out, torch.stack([F.interpolate(out[None], scale_factor=2.0).sub(0.5).div(2.0).add(k) for k in range(self.objects)])


def test_indices_and_the_decoding_of_outputs_are_no_difference_however_often_they_run() -> None:
    model, x = Decodes().eval(), torch.randn(5, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    model.objects = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        model(x)
    assert not any(kind in place for place in quantized.drift for kind in ("best", "interpolate", "sub", "div", "add"))
