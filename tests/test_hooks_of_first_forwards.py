"""Hooks that a model registers or takes off at its first forward: trial forwards of the library leave none and take none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import Tensor, nn

from lightning_cco import quantize


class Collecting(nn.Module):
    """Collects hidden states by hooks of its first forward, and notes that it has them, as models of transformers do."""

    def __init__(self, register: Callable[[nn.Module, Callable[..., None]], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)
        self.installed, self._register = False, register
        self.hidden: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            for name, module in self.body.named_children():
                self._register(module, lambda *_, name=name: self.hidden.append(name))
            self.installed = True
        return self.head(self.body(x))


WAYS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "after": lambda module, hook: module.register_forward_hook(hook),
    "after, with keywords and always": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True, always_call=True),
    "before": lambda module, hook: module.register_forward_pre_hook(hook),
    "before, first, with keywords": lambda module, hook: module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "before the backward": lambda module, hook: module.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_hooks_collect_comes_once(way: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    plain = Collecting(WAYS[way])
    plain(x).sum().backward()
    assert plain.hidden  # they ran
    model = Collecting(WAYS[way])
    quantized = quantize(model, "w8a8", (x.detach(),))
    quantized.calibrate([x.detach()])
    assert not model.hidden
    model(x).sum().backward()
    assert model.hidden == plain.hidden
    quantized.remove()
    model.hidden.clear()
    plain.hidden.clear()
    model(x).sum().backward()
    plain(x).sum().backward()
    assert model.hidden == plain.hidden


def test_a_hook_that_takes_itself_off_runs_in_the_first_forward_of_the_user() -> None:
    """Its place among the others, and its handle, are as before."""
    ran: list[str] = []
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def once(*_: Any, **__: Any) -> None:
        ran.append("once")
        handle.remove()

    model[0].register_forward_hook(lambda *_: ran.append("before"))
    handle = model[0].register_forward_hook(once, with_kwargs=True)
    model[0].register_forward_hook(lambda *_: ran.append("after"))
    quantized = quantize(model, "w8a8", (torch.randn(3, 4),))
    ran.clear()
    quantized.calibrate([torch.randn(3, 4)])
    ran.clear()
    model(torch.randn(3, 4))
    assert ran == ["before", "once", "after"]
    model(torch.randn(3, 4))
    assert ran == ["before", "once", "after", "before", "after"]


class Module(Classifier):
    """Keeps what hooks of its first forward have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.installed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            for module in self.children():
                module.register_forward_hook(lambda *_: self.seen.append(1))
            self.installed = True
        return super().forward(x)


def test_a_checkpoint_validated_the_next_day_collects_what_the_float_model_does(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quick())
    trainer.fit(Module(), batches(), batches())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = []
    for callbacks in ([], [quick()]):
        module = Module()
        make_trainer(tmp_path, *callbacks).validate(module, batches(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        found.append(len(module.seen))
    assert found[1] == found[0] > 0
