"""What is found before the training: rules that fit no layer, and batches of the validation to check files on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cco import CCOError, CCOWarning, QuantizedModel


class Counting(Classifier):
    """Counts what it validates and trains."""

    def __init__(self) -> None:
        super().__init__()
        self.validated = self.trained = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.trained += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated += 1
        super().validation_step(batch, batch_idx)


def test_a_rule_that_fits_no_layer_ends_the_run_before_the_validation(tmp_path: Path) -> None:
    model = Counting()
    cco = quick(layer_settings=[{"match": "no_such_layer", "skip_quantization": True}])
    with pytest.raises(CCOError, match="no_such_layer"):
        make_trainer(tmp_path, cco, max_epochs=1).fit(model, batches(), batches(seed=5))
    assert (model.validated, model.trained) == (0, 0)


def test_a_rule_without_effect_is_said_before_the_validation(tmp_path: Path) -> None:
    model = Counting()
    cco = quick(layer_settings=[{"match": "linear", "weights_num_bits": 4}])
    with pytest.raises(CCOWarning, match="'linear' stays in float"):  # warnings are errors
        make_trainer(tmp_path, cco, max_epochs=1).fit(model, batches(), batches(seed=5))
    assert (model.validated, model.trained) == (0, 0)


def test_a_rule_without_effect_is_said_once(tmp_path: Path) -> None:
    cco = quick(layer_settings=[{"match": "linear", "weights_num_bits": 4}])
    with pytest.warns(CCOWarning, match="'linear' stays in float") as found:
        make_trainer(tmp_path, cco, max_epochs=1).fit(Classifier(), batches(), batches(seed=5))
    assert sum("'linear' stays in float" in str(warning.message) for warning in found) == 1


def test_the_check_changes_nothing(tmp_path: Path) -> None:
    losses = []
    for rules in ([], [{"match": "conv", "weights_num_bits": 8}]):
        torch.manual_seed(0)
        model = Counting()
        trainer = make_trainer(tmp_path, quick(layer_settings=rules), max_epochs=1)
        trainer.fit(model, batches(), batches(seed=5))
        losses.append((float(trainer.callback_metrics["val_loss"]), model.validated, model.trained, torch.rand(())))
    assert losses[0] == losses[1]


def test_batches_that_forward_does_not_take_are_left_for_the_training(tmp_path: Path) -> None:
    class Other(Counting):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated += 1

    model = Other()
    cco = quick(layer_settings=[{"match": "no_such_layer", "skip_quantization": True}])
    with pytest.raises(CCOError, match="no_such_layer"):
        make_trainer(tmp_path, cco, max_epochs=1).fit(model, batches(), DataLoader([torch.zeros(2, 3)] * 2, batch_size=None))
    assert model.validated == 2


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("kind", ["images", "others"])
def test_a_file_is_checked_on_batches_that_the_calibration_has_not_seen(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", batch[0].float().mean())

    checked: list[Any] = []
    export = QuantizedModel.export

    def watched(self: QuantizedModel, *args: Any, **options: Any) -> Any:
        checked.extend(options["batches"])
        return export(self, *args, **options)

    monkeypatch.setattr(QuantizedModel, "export", watched)
    validation = list(batches(seed=5)) if kind == "images" else [(torch.zeros(4, 2), torch.zeros(4))]
    cco = quick()
    make_trainer(tmp_path, cco, max_epochs=1).fit(Model(), batches(), DataLoader(validation, batch_size=None))
    report = cco.export(tmp_path / "model.onnx")
    seen = [images for images, _ in (validation if kind == "images" else batches())][:2]
    assert len(checked) == report.batches == 2
    assert all(torch.equal(args[0], images) for args, images in zip(checked, seen, strict=True))
    said = "validation batches, which the calibration has not seen" if kind == "images" else "held batches"
    assert f"(2 {said}, " in str(report)
