"""Modes in which a model is looked at: training or evaluation, with gradients or without, with everything as before in the end; without the collector."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from lightning_cco.graph.snapshot import Snapshot


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
def random_apart(model: nn.Module) -> Iterator[None]:
    """Random numbers inside the block, of PyTorch, Python and NumPy, beginning where they are now; afterwards they are there again."""
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"][:1]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def undisturbed(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Put back what a forward leaves behind, training flags, gradients and random state afterwards."""
    with Snapshot(model), as_now(model, gradients):
        yield


@contextmanager
def as_now(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Put training flags, gradients and random state back afterwards."""
    with random_apart(model), recording(model, gradients), training_flags(model):
        yield


@contextmanager
def training_flags(model: nn.Module) -> Iterator[None]:
    """Put training flags back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def evaluating(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Evaluation mode inside the block, with gradients or without; what forwards leave is put back."""
    with training_flags(model):
        switch_training(model, False)
        with Snapshot(model, parts=True), recording(model, gradients):
            yield


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
