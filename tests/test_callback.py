"""The callback does its work in every kind of run, and its checkpoints are ordinary ones."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import QUICK, Classifier, Losses, batches, make_trainer, quick
from models import ResidualCNN, TokenModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_cco import CCOCallback, CCOError, CCOWarning, Settings
from lightning_cco.settings import load_settings

REPORT = {"report.html", "report.json", "model_explorer.json", "model_explorer_data.json"}


def test_fit_quantizes_measures_and_writes(tmp_path: Path) -> None:
    cco, model = quick(), Classifier()
    trainer = make_trainer(tmp_path, cco, max_epochs=2)
    trainer.fit(model, batches(), batches())
    assert cco.quantized is not None
    assert cco.quantized.model is model
    assert len(cco.quantized.plan.quantized) == 20
    assert cco.report is not None
    assert cco.report.num_batches == 2
    assert set(cco.report.local) >= {"conv", "relu", "linear"} - {"linear"}
    assert {"cco/qs_max", "cco/num_quantized_layers", "val_loss"} <= set(trainer.callback_metrics)
    files = {path.name for path in (tmp_path / "cco").iterdir()}
    assert files == {"layers.txt", "resolved_recipe.yaml", "suggested_skips.yaml", "sensitivity.csv", "heat_map.png"} | REPORT
    rows = (tmp_path / "cco" / "sensitivity.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(cco.report.local)
    load_settings(tmp_path / "cco" / "resolved_recipe.yaml")
    load_settings(tmp_path / "cco" / "suggested_skips.yaml")


def test_ranges_come_from_stats_steps_batches_before_the_first_step(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.quantizer = cco.quantized.activations["input_0"]
                self.observed = self.quantizer.observed

    cco, watch = quick(), Watch()
    make_trainer(tmp_path, cco, watch).fit(Classifier(), batches())
    assert watch.observed == 2


def test_original_metrics_are_those_of_the_whole_float_validation(tmp_path: Path) -> None:
    model, val = Classifier(), batches(shuffle=False, seed=5)
    plain = make_trainer(tmp_path).validate(model, val, verbose=False)[0]
    cco = quick()
    make_trainer(tmp_path, cco).fit(model, batches(), val)
    assert cco.original_metrics["val_loss"] == pytest.approx(plain["val_loss"])
    skipping = quick(training_settings={"stats_steps": 2, "skip_initial_evaluation": True})
    make_trainer(tmp_path, skipping).fit(Classifier(), batches(), val)
    assert skipping.original_metrics == {}


def test_checkpoint_is_that_of_the_plain_model(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    make_trainer(tmp_path, quick(), checkpoint).fit(Classifier(), batches())
    saved = torch.load(checkpoint.last_model_path, weights_only=True)
    Classifier().load_state_dict(saved["state_dict"], strict=True)
    state = saved["callbacks"]["CCOCallback"]
    assert {"quantized", "settings", "skips"} <= set(state)


def test_best_checkpoint_gives_the_quantized_metrics_with_any_trainer(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss", save_top_k=-1)
    cco, model, val = quick(), Classifier(), batches(shuffle=False, seed=5)
    trainer = make_trainer(tmp_path, cco, checkpoint, max_epochs=3)
    trainer.fit(model, batches(), val)
    same = trainer.test(model, val, ckpt_path="best", verbose=False)[0]["test_loss"]
    assert same == pytest.approx(float(checkpoint.best_model_score), rel=1e-5)
    fresh_cco, fresh_model = quick(), Classifier()
    fresh = make_trainer(tmp_path, fresh_cco).test(fresh_model, val, ckpt_path=checkpoint.best_model_path, verbose=False)[0]["test_loss"]
    assert fresh == pytest.approx(same, rel=1e-6)
    assert fresh_cco.quantized is not None
    float_loss = make_trainer(tmp_path).test(Classifier(), val, ckpt_path=checkpoint.best_model_path, verbose=False)[0]["test_loss"]
    assert float_loss != same
    # What inference mode touched can be trained again.
    make_trainer(tmp_path, fresh_cco).fit(fresh_model, batches())


def test_predict_and_validate_use_the_quantized_model(tmp_path: Path) -> None:
    cco, model, val = quick(), Classifier(), batches(shuffle=False)
    trainer = make_trainer(tmp_path, cco)
    trainer.fit(model, batches(), val)
    predicted = torch.cat(trainer.predict(model, val))
    images = torch.cat([x for x, _ in val])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(predicted, model(images))
        with cco.quantized.disabled():
            assert not torch.equal(predicted, model(images))
    again = trainer.validate(model, val, verbose=False)[0]["val_loss"]
    assert again == pytest.approx(float(trainer.callback_metrics["val_loss"]))


def test_a_second_fit_goes_on_with_the_same_quantizers(tmp_path: Path) -> None:
    cco, model = quick(), Classifier()
    make_trainer(tmp_path, cco).fit(model, batches())
    quantized = cco.quantized
    make_trainer(tmp_path, cco, max_epochs=2).fit(model, batches())
    assert cco.quantized is quantized


RESUME = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from lightning_modules import QUICK, Classifier, Losses, batches, make_trainer, quick, losses_of
from test_callback import quick
import json
print(json.dumps(losses_of(Path({folder!r}), quick(), {epochs}, {ckpt!r})))
"""


def run_apart(folder: Path, epochs: int, ckpt: str | None) -> list[float]:
    import json

    tests = str(Path(__file__).parent)
    code = RESUME.format(tests=tests, folder=str(folder), epochs=epochs, ckpt=ckpt)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=tests)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_resuming_in_a_new_process_continues_with_the_same_losses(tmp_path: Path) -> None:
    whole = run_apart(tmp_path / "whole", 4, None)
    half = run_apart(tmp_path / "half", 2, None)
    rest = run_apart(tmp_path / "rest", 4, str(tmp_path / "half" / "last.ckpt"))
    assert len(whole) == 16
    assert half == pytest.approx(whole[:8], rel=1e-5)
    assert rest == pytest.approx(whole[8:], rel=1e-4)


def resume(
    folder: Path, before: CCOCallback, after: CCOCallback, caplog: pytest.LogCaptureFixture, epochs: int = 2
) -> tuple[list[float], str]:
    """Fit an epoch with one callback, go on with another: losses of the second run, and its log."""
    checkpoint, losses = ModelCheckpoint(folder, save_last=True), Losses()
    make_trainer(folder, before, checkpoint).fit(Classifier(), batches())
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        caplog.clear()
        make_trainer(folder, after, losses, max_epochs=epochs).fit(Classifier(), batches(), ckpt_path=checkpoint.last_model_path)
    assert all(math.isfinite(loss) for loss in losses.values)
    return losses.values, caplog.text


def test_resuming_with_another_skip_and_more_epochs_says_what_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed = quick(layer_settings=[{"match": "conv_1", "skip_quantization": True}])
    losses, log = resume(tmp_path, quick(), changed, caplog, epochs=3)
    assert len(losses) == 8
    assert "Resuming with other settings than the checkpoint's: no longer quantized: batch_norm_1, conv_1" in log
    assert "layer_settings: with {'match': 'conv_1', 'skip_quantization': True}" in log
    assert "conv_1" in changed.quantized.plan.skipped


def test_resuming_with_fewer_skips_and_bits_calibrates_what_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = quick(layer_settings=[{"match": "net.blocks.0", "skip_quantization": True}])
    after = quick(global_quantization_settings={"weights_num_bits": 4, "activations_num_bits": 6})
    _, log = resume(tmp_path, before, after, caplog)
    assert "newly quantized: add, batch_norm_1" in log
    assert "global_quantization_settings.weights_num_bits: 8 → 4" in log
    assert "bits of 'relu': 8 → 6" in log
    assert "to be calibrated: " in log
    assert "relu_1" in log.partition("to be calibrated: ")[2].splitlines()[0]
    assert after.quantized.uncalibrated == []
    assert all(q.num_bits == 6 and float(q.scale) > 0 for q in after.quantized.activations.values())
    assert "relu_1" in after.report.local


def test_resuming_with_the_same_settings_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "Resuming with other settings" not in resume(tmp_path, quick(), quick(), caplog)[1]


def test_an_evaluation_with_another_recipe_than_the_training_warns(tmp_path: Path) -> None:
    """The plan is made from the callback's recipe: the metrics would be those of a model that nobody has trained."""
    few = {"global_quantization_settings": {"weights_num_bits": 4, "activations_num_bits": 6}}
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, quick(**few), checkpoint).fit(Classifier(), batches())
    with pytest.warns(
        CCOWarning, match=r"evaluated with other settings than it was trained with: .*weights_num_bits: 4 → 8.*resolved_recipe"
    ):
        make_trainer(tmp_path, quick()).validate(Classifier(), batches(), ckpt_path=checkpoint.last_model_path, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        same = quick(**few, monitoring_settings={"draw_graph": False})
        make_trainer(tmp_path, same).validate(Classifier(), batches(), ckpt_path=checkpoint.last_model_path, verbose=False)


def test_a_float_checkpoint_can_be_the_start(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, checkpoint).fit(Classifier(), batches())
    cco = quick()
    make_trainer(tmp_path, cco, max_epochs=2).fit(Classifier(), batches(), ckpt_path=checkpoint.last_model_path)
    assert cco.quantized.calibrated


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(tmp_path, quick(), checkpoint).fit(Classifier(), batches())
    state = torch.load(checkpoint.last_model_path, weights_only=True)["callbacks"]["CCOCallback"]
    cco = quick()
    cco.load_state_dict(state)

    class Other(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    with pytest.raises(CCOError, match="another architecture"):
        make_trainer(tmp_path, cco).fit(Other(), batches())


class InSetup(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = ResidualCNN()


class InConfigureModel(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = ResidualCNN()


class OwnForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.relu(self.conv(x)), 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # An augmentation before the model must not be mistaken for the model.
        x = F.relu(batch[0] + 0.1)
        return F.cross_entropy(self(x), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Parts(OwnForward):
    """Forward encodes only; the training step also decodes: the autoencoder of Lightning's documentation."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU())
        self.decoder = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.decoder(self.encoder(batch[0])), batch[0].flatten(1))
        self.log("train_loss", loss)
        return loss


class NoForward(Parts):
    forward = pl.LightningModule.forward


@pytest.mark.parametrize(
    ("module", "weighted"),
    [
        pytest.param(Classifier, 6, id="init"),
        pytest.param(InSetup, 6, id="setup"),
        pytest.param(InConfigureModel, 6, id="configure_model"),
        pytest.param(OwnForward, 2, id="own_forward"),
        pytest.param(Parts, 2, id="parts"),
        pytest.param(NoForward, 2, id="no_forward"),
    ],
)
def test_wherever_the_layers_are_built_and_called(module: type[pl.LightningModule], weighted: int, tmp_path: Path) -> None:
    cco = quick()
    make_trainer(tmp_path, cco).fit(module(), batches())
    assert sum(layer.weighted for layer in cco.quantized.graph) == weighted
    assert cco.quantized.drift == []
    assert cco.report.local


class TwoInputs(OwnForward):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.left, self.right, self.fc = nn.Linear(64, 4), nn.Linear(64, 4), nn.Linear(4, 10)

    def forward(self, image: Tensor, other: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(torch.relu(self.left(image.flatten(1)) + scale * self.right(other.flatten(1))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            return F.cross_entropy(self(batch["image"], batch["other"]), batch["label"])
        return F.cross_entropy(self(batch[0], batch[1]), batch[2])


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_several_arguments(form: str, tmp_path: Path) -> None:
    rows = [(torch.randn(1, 8, 8), torch.randn(1, 8, 8), i % 10) for i in range(16)]
    data = rows if form == "tuple" else [dict(zip(("image", "other", "label"), row, strict=True)) for row in rows]
    cco = quick()
    make_trainer(tmp_path, cco).fit(TwoInputs(), DataLoader(data, 4))
    assert len(cco.quantized.graph.inputs) == 2


def test_a_batch_without_what_forward_requires(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"TwoInputs.forward expects.*'other'.*forward_fn"):
        make_trainer(tmp_path, quick()).fit(TwoInputs(), DataLoader(torch.randn(4, 1, 8, 8), 2))


def test_forward_fn_says_how_a_batch_goes_through(tmp_path: Path) -> None:
    calls = []

    def forward_fn(module: Any, batch: Any) -> Any:
        calls.append(1)
        return module.net(batch[0])

    cco = CCOCallback(QUICK, forward_fn=forward_fn)
    make_trainer(tmp_path, cco).fit(Classifier(), batches())
    assert calls
    assert cco.quantized.drift == []


class Tokens(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = TokenModel()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch).flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_token_models(tmp_path: Path) -> None:
    cco = quick()
    make_trainer(tmp_path, cco).fit(Tokens(), DataLoader(torch.randint(0, 20, (16, 12)), 4))
    assert cco.quantized.plan.skipped["input_0"].startswith("its values are integers")
    assert "embedding" in cco.report.local


def test_frozen_ranges(tmp_path: Path) -> None:
    cco = quick(training_settings={"stats_steps": 2, "freeze_ranges_at_step": 2})
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(float(cco.quantized.activations["relu"].scale))

    make_trainer(tmp_path, cco, Watch()).fit(Classifier(), batches())
    assert seen[0] != seen[1]
    assert seen[1] == seen[2] == seen[3]
    assert cco.quantized.frozen


def test_two_callbacks_are_one_too_many(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.callbacks += [quick(), quick()]
    with pytest.raises(CCOError, match=r"2 CCOCallbacks.*Keep one of them"):
        trainer.fit(Classifier(), batches())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `CCOCallback`"):  # Lightning says it even sooner
        make_trainer(tmp_path, quick(), quick())


@pytest.mark.parametrize(("run", "loaders"), [("fit", 2), ("validate", 1)])
def test_a_trainer_of_the_other_package_is_refused_by_name(run: str, loaders: int, tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Net(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Linear(4, 4)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layers(batch).sum()

        validation_step = training_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    silent = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = other.Trainer(callbacks=[CCOCallback()], default_root_dir=tmp_path, max_steps=1, **silent)
    with pytest.raises(CCOError, match=r"expected a Trainer of lightning\.pytorch, got one of pytorch_lightning"):
        getattr(trainer, run)(Net(), *[DataLoader(torch.randn(8, 4), batch_size=4)] * loaders)


def test_a_forward_that_raises_says_so_and_keeps_the_models_error(tmp_path: Path) -> None:
    class Broken(Classifier):
        def forward(this, x: Tensor) -> Tensor:
            raise ValueError("mine")

    with pytest.raises(CCOError, match=r"Broken: its forward failed.*ValueError: mine.*forward_fn") as caught:
        make_trainer(tmp_path, quick()).fit(Broken(), batches())
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_users_hook_that_raises_ends_the_fit_with_its_error(tmp_path: Path) -> None:
    """In the capture it is named; later it is as without the callback, and the model is in order afterwards."""
    model, calls = Classifier(), itertools.count(1)  # which no one puts back

    def hook(module: nn.Module, args: object, output: object) -> None:
        if next(calls) in raising:
            raise ValueError("mine")

    model.net.pool.register_forward_hook(hook)
    raising = {1, 2}  # through forward, and through the step
    with pytest.raises(CCOError, match="ValueError: mine"):
        make_trainer(tmp_path, quick()).fit(model, batches())
    number = next(calls)
    cco, raising = quick(), {number + 8}
    with pytest.raises(ValueError, match="mine"):
        make_trainer(tmp_path, cco).fit(model, batches())
    make_trainer(tmp_path, cco).fit(model, batches())
    assert cco.quantized.drift == []
    cco.quantized.remove()
    torch.testing.assert_close(model.eval()(torch.ones(1, 1, 8, 8)), model.net(torch.ones(1, 1, 8, 8)), rtol=0, atol=0)


def test_an_all_zero_tensor_is_said(tmp_path: Path) -> None:
    class Dead(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.blocks[1].bn1.bias.data.fill_(-1e9)

    with pytest.warns(CCOWarning, match=r"nothing but zeros came out of 'relu_3'.*\[0, 0\].*match: relu_3, skip_quantization: true"):
        make_trainer(tmp_path, quick()).fit(Dead(), batches())


def test_an_empty_loader(tmp_path: Path) -> None:
    class Empty(IterableDataset):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(CCOError, match="loader is empty"):
        make_trainer(tmp_path, quick()).fit(Classifier(), DataLoader(Empty(), 4))


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cco = quick(monitoring_settings={"output_dir": str(tmp_path / "file" / "below"), "draw_graph": False})
    with pytest.warns(CCOWarning, match=r"can't be written.*output_dir") as found:
        make_trainer(tmp_path, cco).fit(Classifier(), batches())
    assert len([warning for warning in found if issubclass(warning.category, CCOWarning)]) == 1
    assert cco.report is not None


def test_nan_in_a_batch_names_the_layer(tmp_path: Path) -> None:
    data = DataLoader([(torch.full((1, 8, 8), float("nan")), 1)] * 8, 4)
    with pytest.raises(CCOError, match="input_0"):
        make_trainer(tmp_path, quick()).fit(Classifier(), data)


def test_the_recipe_is_checked_when_the_callback_is_made() -> None:
    with pytest.raises(CCOError, match="weights_num_bits"):
        CCOCallback({"global_quantization_settings": {"weights_num_bits": 1}})


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"limit_train_batches": 1}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}]
)
def test_trainer_options(options: dict[str, Any], tmp_path: Path) -> None:
    cco = quick()
    make_trainer(tmp_path, cco, **options).fit(Classifier(), batches(), batches())
    assert cco.report.local
    assert cco.quantized.drift == []


def test_settings_object_is_copied() -> None:
    settings = Settings()
    cco = CCOCallback(settings)
    settings.global_quantization_settings.weights_num_bits = 3
    assert cco.settings.global_quantization_settings.weights_num_bits == 8
