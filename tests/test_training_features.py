"""Compiled, in other precisions, checkpointed, accumulated, clipped or by hand: a fake-quantized model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_modules import QUICK, Classifier, assert_quantized, batches, plain_losses, run_fit
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_cco import CCOCallback


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_submodule_is_one_graph_with_the_same_losses(tmp_path: Path) -> None:
    backend = CompileCounterWithBackend("aot_eager")
    compiled_for = []

    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.compile(backend=backend, fullgraph=True)

        def on_train_start(self) -> None:
            compiled_for.append(backend.frame_count)

    eager = run_fit(tmp_path, Classifier, val=batches())
    run = run_fit(tmp_path, Compiled, val=batches())
    # The sanity check compiled the float net: that code must not run on. Then one graph for training and one for evaluation.
    assert compiled_for == [1]
    assert backend.frame_count == 3
    assert_quantized(run)
    assert run.losses == pytest.approx(eager.losses, rel=1e-4)
    assert run.losses != pytest.approx(plain_losses(tmp_path, Classifier), rel=1e-4)


class Silent(Classifier):
    """`self.log` can't be compiled: Lightning inspects the signature of what is compiled."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_lightning_module_has_no_more_graphs_than_without(tmp_path: Path) -> None:
    backend = CompileCounterWithBackend("aot_eager")
    eager = run_fit(tmp_path, Silent)
    plain_losses(tmp_path, lambda: torch.compile(Silent(), backend=backend))
    plain = backend.frame_count
    assert plain > 0
    torch._dynamo.reset()
    backend.clear()
    run = run_fit(tmp_path, lambda: torch.compile(Silent(), backend=backend))
    assert backend.frame_count == plain
    assert_quantized(run)
    assert run.losses == pytest.approx(eager.losses, rel=1e-4)


# 16-true has no test: Adam's epsilon is 0 in it, with or without the callback.
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_precision(precision: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = plain_losses(tmp_path, Classifier, precision=precision)
    run = run_fit(tmp_path, Classifier, val=batches(), precision=precision)
    assert {p.dtype for p in run.model.parameters()} == {dtype}
    # An 8-bit scale of eight bits itself would move every level.
    assert all(q.scale.dtype is q.min_val.dtype is torch.float32 for q in run.cco.quantized.activations.values())
    assert_quantized(run, batches().dataset.tensors[0].to(dtype))
    assert run.losses != plain
    assert run.losses == pytest.approx(plain, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
def test_16_mixed_is_bf16_mixed_on_a_cpu(tmp_path: Path) -> None:
    run = run_fit(tmp_path, Classifier, precision="16-mixed")
    assert_quantized(run)
    assert run.losses == run_fit(tmp_path, Classifier, precision="bf16-mixed").losses


@pytest.mark.parametrize("estimator", ["percentile", "mse", "min_max"])
def test_bf16_true_with_each_range_estimator(estimator: str, tmp_path: Path) -> None:
    cco = CCOCallback({**QUICK, "training_settings": {"stats_steps": 2, "range_estimator": estimator}})
    run = run_fit(tmp_path, Classifier, cco=cco, precision="bf16-true")
    assert_quantized(run, batches().dataset.tensors[0].bfloat16(), unmoved=99 if estimator == "min_max" else 0)
