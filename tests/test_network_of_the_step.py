"""What the step called is the network, equal to that of a plain forward; losses, metrics and augmentations are no layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_cco import capture_graph, plan_quantization
from lightning_cco.batches import capture_module
from lightning_cco.graph.captured import Capture

IMAGES = torch.randn(6, 1, 8, 8)


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))


class Decoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 64))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.down(x))
        second = F.interpolate(F.relu(self.middle(F.max_pool2d(first, 2))), scale_factor=2.0)
        return self.head(F.relu(self.up(torch.cat([first, second], 1))))


class Step(pl.LightningModule):
    """A module without a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


class AutoEncoder(Step):
    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.encoder, self.decoder = Encoder(), Decoder()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(batch[0].size(0), -1) * 2.0
        z = self.encoder(x)
        return F.mse_loss(self.decoder(z.view(-1, 4)), x) + 0.1 * z.square().mean()


class PlainAutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, x: Tensor) -> Tensor:
        self.code = self.encoder(x)  # which the loss of the step reads, too
        return self.decoder(self.code.view(-1, 4))


class Segmentation(Step):
    """Batches are mappings; criterion, metric and augmentation are modules, the loss is weighted by what is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion, self.accuracy = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), MulticlassAccuracy(2)
        self.augment, self.weights, self.soften = Noise(), nn.Parameter(torch.ones(2)), nn.Softmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(self.augment(batch["image"] / 2.0 + 0.1))
        probabilities = self.soften(logits)
        dice = 1.0 - (probabilities[:, 1] * batch["mask"]).sum() / (probabilities[:, 1] + batch["mask"]).sum()
        self.log("accuracy", self.accuracy(logits, batch["mask"]))
        losses = torch.stack([self.criterion(logits, batch["mask"]), dice])
        return (losses * self.weights.exp()).sum()


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + 0.1 * torch.randn_like(x))


class Balanced(nn.Module):
    """Learned weights of several losses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(2, 1, bias=False)

    def forward(self, losses: Tensor) -> Tensor:
        return self.scale(losses).squeeze()


class Margin(nn.Module):
    """A loss with a prototype of each class."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(3, 2))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.normalize(features), F.normalize(self.prototypes)), labels)


class LearnedLosses(Step):
    def __init__(self) -> None:
        super().__init__()
        self.balance, self.margin = Balanced(), Margin()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.net(batch[0]).mean((2, 3))
        return self.balance(torch.stack([self.margin(features, torch.zeros(len(features), dtype=torch.long)), features.var()]))


class TwoViews(Step):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, two = (F.normalize(self.net(view).flatten(1)) for view in (batch[0], batch[0].flip(-1)))
        return F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)))


class Perceptual(Step):
    """Frozen features of the result and of the target are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.l1_loss(self.features(self.net(batch[0])[:, :1]), self.features(batch[0]))


class WithLabels(nn.Module):
    """Like the models of transformers: the loss is worked out in the forward, where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = F.relu(self.body(self.table(input_ids))) * attention_mask[..., None]
        logits = self.head(hidden.mean(1))
        loss = {} if labels is None else {"loss": nn.CrossEntropyLoss()(logits.view(-1, 3), labels.view(-1))}
        return {**loss, "logits": logits}


TOKENS = {"input_ids": torch.randint(9, (6, 5)), "attention_mask": torch.ones(6, 5)}


class Finetuning(Step):
    def __init__(self) -> None:
        super().__init__()
        self.net = WithLabels()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(**batch)
        self.log("loss", out["loss"])
        return out["loss"]


class FinetuningForward(Finetuning):
    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self.net(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch)["loss"]


LABELLED = {**TOKENS, "labels": torch.randint(3, (6,))}
MASKED = {"image": IMAGES, "mask": torch.randint(2, (6, 8, 8))}
STEPS: dict[str, tuple[Callable[[], pl.LightningModule], Any, Callable[[], nn.Module], Any]] = {
    "autoencoder": (AutoEncoder, (IMAGES, None), PlainAutoEncoder, IMAGES.flatten(1)),
    "segmentation": (Segmentation, MASKED, UNet, IMAGES),
    "learned losses": (LearnedLosses, (IMAGES,), UNet, IMAGES),
    "two views": (TwoViews, (IMAGES,), UNet, IMAGES),
    "perceptual": (Perceptual, (IMAGES,), UNet, IMAGES),
    "labels": (Finetuning, LABELLED, WithLabels, TOKENS),
    "labels through forward": (FinetuningForward, LABELLED, WithLabels, TOKENS),
}


def captured(module: pl.LightningModule, batch: Any) -> Capture:
    module._trainer = pl.Trainer(barebones=True)
    return capture_module(module, batch)[0]


@pytest.mark.parametrize("case", STEPS)
def test_the_plan_is_that_of_a_plain_forward(case: str) -> None:
    step, batch, plain, example = STEPS[case]
    ours = captured(step(), batch).graph
    theirs = capture_graph(plain(), **example) if isinstance(example, dict) else capture_graph(plain(), example)
    shown = [
        [
            (layer.name, layer.kind, layer.path.removeprefix("net").lstrip("."), layer.output_shapes)
            for layer in graph
            if layer.kind != "output"
        ]
        for graph in (ours, theirs)
    ]
    assert shown[0] == shown[1]
    assert [tuple(ours.predecessors(name)) for name in ours.names] == [tuple(theirs.predecessors(name)) for name in theirs.names]
    plans = [plan_quantization(graph) for graph in (ours, theirs)]
    assert plans[0].decisions == plans[1].decisions
    assert plans[0].tensors == plans[1].tensors
    assert plans[0].counted == plans[1].counted


class Between(Step):
    """What the step computes between its two networks belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.encoder, self.decoder, self.shift = Encoder(), nn.Linear(6, 5), nn.Parameter(torch.ones(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = F.relu(self.encoder(batch["x"].flatten(1)) + self.shift)
        out = self.decoder(torch.cat([z, batch["extra"]], 1))
        return F.cross_entropy(out, torch.zeros(len(out), dtype=torch.long))


def test_what_stands_between_two_networks_is_one_of_its_layers() -> None:
    found = captured(Between(), {"x": IMAGES, "extra": torch.randn(6, 2)})
    graph, plan = found.graph, plan_quantization(found.graph)
    assert [layer.kind for layer in graph] == ["input", "input", "linear", "relu", "linear", "add", "relu", "concat", "linear", "output"]
    assert graph["add"].parameters == ("shift",)
    assert set(graph.predecessors("concat")) == {"relu_1", "input_1"}
    assert plan.quantized >= {"linear", "relu", "linear_1"}
    assert all("the layers that read it quantize it" in plan.skipped[name] for name in ("add", "relu_1", "concat"))


class Siamese(Step):
    """Each branch is needed: the head reads both."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.encoder, self.head = Encoder(), nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        both = torch.cat([self.encoder(view.flatten(1)) for view in batch], 1)
        return F.softplus(self.head(both)).mean()


def test_a_network_that_is_called_twice_for_one_result() -> None:
    graph = captured(Siamese(), [IMAGES, IMAGES.flip(-1)]).graph
    assert [layer.path for layer in graph if layer.weighted] == ["encoder.0", "encoder.2", "head"]
    assert graph.outputs == ("output_0",)
    assert graph.predecessors("output_0") == ("linear_2",)


class Auxiliary(nn.Module):
    """Returns a number beside its result: balance of experts, codebook losses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.side = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.body(x))
        return self.head(y), self.side(y).square().mean()


def test_a_loss_beside_a_result_is_no_output() -> None:
    graph = capture_graph(Auxiliary(), torch.randn(3, 4))
    assert list(graph.names) == ["input_0", "linear", "relu", "linear_1", "output_0"]


def test_a_forward_that_gives_the_loss_alone_ends_at_what_it_compares() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(F.relu(self.body(x))), y)

    graph = capture_graph(Loss(), torch.randn(3, 4), torch.tensor([0, 1, 2]))
    assert list(graph.names) == ["input_0", "linear", "relu", "linear_1", "output_0"]


def test_a_single_number_is_a_result_where_there_is_no_other() -> None:
    graph = capture_graph(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0), nn.ReLU()), torch.randn(1, 4))
    assert graph.predecessors("output_0") == ("relu",)


class TwoInputs(pl.LightningModule):
    """Its ``forward`` takes what the batch has under other names, or what only the step makes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.left(x) * scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.relu(self(batch["x"], torch.ones(4)) + self.right(batch["x"])).sum()


class HalfForward(TwoInputs):
    """Its ``forward`` runs a part of the network."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.left(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.relu(self(batch["x"]) + self.right(batch["x"])).sum()


@pytest.mark.parametrize(
    ("module", "why"), [(TwoInputs(), "nothing for ['scale']"), (HalfForward(), "does not reach 'right.bias', 'right.weight'")]
)
def test_it_is_said_that_the_step_was_captured_in_place_of_forward(
    module: pl.LightningModule, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        found = captured(module, {"x": torch.randn(3, 4)})
    assert sum(layer.kind == "linear" for layer in found.graph) == 2
    said = [record.getMessage() for record in caplog.records if "training step" in record.getMessage()]
    assert len(said) == 1
    assert why in said[0]


def test_a_forward_that_is_captured_needs_no_word(caplog: pytest.LogCaptureFixture) -> None:
    module = HalfForward()
    del module.right
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        captured(module, {"x": torch.randn(3, 4)})
    assert "training step" not in caplog.text
