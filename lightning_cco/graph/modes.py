"""Modes in which a model is looked at: training or evaluation, with gradients or without, with everything as before in the end; without the collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_cco.graph.put_back import Kept


@contextmanager
def recording(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Record gradients inside the block, or not; those that parameters have already are theirs again afterwards."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()] if gradients else []
    for parameter, _ in kept:
        parameter.grad = None
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def undisturbed(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Put back what a forward leaves behind, training flags, gradients and random state afterwards."""
    with Kept(model), as_now(model, gradients):
        yield


@contextmanager
def as_now(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Put training flags, gradients and random state back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    devices = [buffer.device for buffer in model.parameters() if buffer.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), recording(model, gradients):
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


def switch_training(model: nn.Module, training: bool) -> None:
    """Do what ``model.train(training)`` does, also with programs of `torch.export` in it, which refuse that: they run in the mode they were exported in."""
    try:
        model.train(training)
    except NotImplementedError:
        for module in model.modules():
            module.training = training


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector of cycles rests inside the block, where objects are made that stay: it would look at all of them again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
