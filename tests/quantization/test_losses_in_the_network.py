"""A loss that the network computes itself, once it is given targets, is no layer; what goes on into one is never silently in float."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import CCOWarning, QuantizedModel, quantize
from lightning_cco.quantization.followed_results import FollowedResults

Loss = Callable[[Tensor, Tensor], Tensor]


class Segmenter(nn.Module):
    """Scores; with targets the loss as well, and what ``between`` computes on the way."""

    def __init__(self, loss: Loss = F.cross_entropy, between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | float]] | None = None):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.drop = nn.Dropout(0.0)  # a module in which no call is watched
        self.loss, self.between = loss, between

    def forward(self, x: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        h, extra = torch.relu(self.first(x)), 0.0
        if targets is not None and self.between is not None:
            h, extra = self.between(h, targets)  # type: ignore[assignment]
        scores = self.head(self.drop(torch.relu(self.second(h)) + 1))
        return scores, None if targets is None else self.loss(scores, targets) + extra


def upsampled(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.interpolate(scores, size=(16, 16), mode="bilinear"), targets.repeat_interleave(2, 1).repeat_interleave(2, 2))


def dice(scores: Tensor, targets: Tensor) -> Tensor:
    shares, wanted = scores.softmax(1), F.one_hot(targets, 4).permute(0, 3, 1, 2).float()
    return 1 - 2 * (shares * wanted).sum() / (shares + wanted).sum().clamp(min=1)


def contrast(h: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    features = F.normalize(F.adaptive_avg_pool2d(h, 1).flatten(1))
    return h, F.cross_entropy(features @ features.T / 0.1, torch.arange(len(features)))


def written_into(h: Tensor, _: Tensor) -> tuple[Tensor, float]:
    other = torch.zeros_like(h)
    other[:] = torch.sigmoid(h)
    return other, 0.0


LOSSES = {
    "of enlarged scores": Segmenter(upsampled),
    "of overlaps": Segmenter(dice),
    "of activations": Segmenter(lambda scores, targets: F.mse_loss(torch.sigmoid(scores).mean(1), targets.float())),
    "of features on the way": Segmenter(dice, contrast),
    "of enlarged features on the way": Segmenter(F.cross_entropy, lambda h, targets: (h, upsampled(h[:, :4], targets))),
}
PATHS = {
    "sigmoid": lambda h, _: (torch.sigmoid(h), 0.0),
    "adaptive_avg_pool": lambda h, _: (h * F.adaptive_avg_pool2d(h, 1), 0.0),
    "tanh": lambda h, _: (nn.Sequential(nn.Identity(), nn.Dropout(0.0))(torch.tanh(h)), 0.0),
    "interpolate": lambda h, targets: (F.interpolate(h, size=(8, 8)), upsampled(h[:, :4], targets)),
    "conv": lambda h, _: (F.conv2d(h, torch.ones(8, 8, 1, 1)), 0.0),
    "written": written_into,
}


def captured_without_targets(model: Segmenter) -> tuple[QuantizedModel, Tensor, Tensor]:
    torch.manual_seed(0)
    x, targets = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))
    quantized = quantize(model.eval(), None, (x,))
    quantized.calibrate([[x]])
    return quantized, x, targets


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_no_difference(kind: str) -> None:
    model = LOSSES[kind]
    quantized, x, targets = captured_without_targets(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        for training in (True, False, True):
            model.train(training)
            scores, loss = model(x, targets)
            if model.between is None:
                torch.testing.assert_close(loss, model.loss(scores, targets))
            loss.backward()
        with torch.no_grad():
            model(x, targets)
    assert quantized.drift == []
    quantized.remove()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", PATHS)
def test_a_path_that_the_capture_has_not_seen_is_one(kind: str, training: bool) -> None:
    model = Segmenter(dice, PATHS[kind])
    quantized, x, targets = captured_without_targets(model)
    model.train(training)
    with pytest.warns(CCOWarning, match="run in float"):
        model(x, targets)
    assert quantized.drift
    if kind != "written":
        assert any(f"'{kind}' was called" in message for message in quantized.drift)


def test_a_path_from_one_network_of_a_step_into_the_next_is_one() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Half(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x))

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bent = nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.layer(x)) if self.bent else self.layer(x)

    model, x = Step().eval(), torch.randn(3, 4)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model.encoder.bent = True
    with pytest.warns(CCOWarning, match="'sigmoid' was called in 'encoder'"):
        model.decoder(model.encoder(x))  # as a training step calls them
    assert len(quantized.drift) == 1


@pytest.mark.parametrize("logged", [True, False])
def test_nothing_is_kept_and_nothing_is_watched_for_longer_than_it_is_alive(logged: bool) -> None:
    model = Segmenter(dice)
    quantized, x, targets = captured_without_targets(model)
    watched = quantized.runtime.frames.watched
    _, loss = model.train()(x, targets)
    loss.backward()
    kept = [loss] if logged else []
    del loss
    gc.collect()
    model(x)
    assert len(kept) == logged
    assert not quantized.runtime.mismatches.followed
    assert quantized.runtime.frames.watched is watched is not None


def test_results_are_followed_through_what_is_made_of_them() -> None:
    followed = FollowedResults()
    x, other = torch.ones(3), torch.zeros(3)
    followed.start("relu", x)
    part = x[:2]
    followed.passed_on("__getitem__", (x, slice(2)), {}, part)
    followed.passed_on("copy_", (other, x), {}, other)
    assert followed.sources([(part, other)]) == ["relu"]
    assert followed.sources([torch.ones(3), "relu"]) == []
    del x, part, other
    assert not followed


class Remembering(nn.Module):
    """Puts the keys of the steps before in front of its own, as a cache does; before the first step there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out, self.cached = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.relu(self.key(x))
        if self.cached >= 0:
            keys = torch.cat([torch.empty(len(x), self.cached, 4), keys], 1)
        return torch.relu(self.out(keys)).sum()


@pytest.mark.parametrize(("cached", "differs"), [(0, False), (3, True)])
def test_an_empty_cache_is_no_difference(cached: int, differs: bool, recwarn: pytest.WarningsRecorder) -> None:
    model, x = Remembering(), torch.randn(2, 5, 4)
    model.cached = -1
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model.cached = cached
    model(x)
    assert bool(quantized.drift) is differs
    assert bool([w for w in recwarn if "'concat' was called" in str(w.message)]) is differs
