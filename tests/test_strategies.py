"""Several processes: equal ranges on all of them, the same training as with plain DDP, and a reason where a strategy can't work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning_modules import Classifier, make_trainer, quick
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from lightning_cco import CCOError, capture_graph

TESTS = Path(__file__).parent


def run_on_two(case: str, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", str(TESTS / "two_processes.py"), str(folder), case]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS, timeout=200)
    except subprocess.TimeoutExpired as error:  # one process has ended, and the other waits for it: say why it has
        pytest.fail(f"{case}: {(error.stderr or b'').decode(errors='replace')[-3000:]}")


def ranks(case: str, tmp_path: Path) -> list[dict[str, Any]]:
    done = run_on_two(case, tmp_path / case)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / case / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_agree(found)
    return found


def assert_agree(found: list[dict[str, Any]]) -> None:
    assert found[0]["ranges"].keys() == found[1]["ranges"].keys() != set()
    for key, values in found[0]["ranges"].items():
        assert torch.equal(values, found[1]["ranges"][key]), key
    assert found[0]["qs"] == found[1]["qs"]
    assert found[0]["batches"] == 4  # two batches on each of two ranks
    assert found[0]["losses"] != found[1]["losses"]
    for name, value in found[0]["weights"].items():
        if "running" not in name:
            assert torch.equal(value, found[1]["weights"][name]), name


def test_ranges_and_sensitivities_agree_on_two_processes(tmp_path: Path) -> None:
    found = ranks("ddp", tmp_path)
    assert [len(rank["quantized"]) for rank in found] == [20, 20]
    assert [rank["drift"] for rank in found] == [[], []]
    assert_tested(found)


def assert_tested(found: list[dict[str, Any]]) -> None:
    """A fresh Trainer with a fresh callback gives the metric that the checkpoint was written with.

    On one rank at least: batch norms have statistics on each rank, and the checkpoint has those of one. Only DDP makes them equal.
    """
    assert any(rank["tested"] == pytest.approx(rank["logged"], rel=1e-6) for rank in found)
    assert all(rank["tested"] != pytest.approx(rank["float"], rel=1e-6) for rank in found)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fully_shard", "ddp_static_graph"])
def test_it_trains_as_under_plain_ddp(case: str, tmp_path: Path) -> None:
    plain, other = ranks("ddp", tmp_path), ranks(case, tmp_path)
    assert_tested(other)
    for one, two in zip(plain, other, strict=True):
        assert two["quantized"] == one["quantized"]
        assert two["drift"] == []
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        for key, values in one["ranges"].items():
            torch.testing.assert_close(two["ranges"][key], values, rtol=1e-3, atol=1e-4, msg=key)
        for name, value in one["weights"].items():
            if "running" not in name:
                torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_accumulated_gradients_and_a_smaller_last_batch_on_two_processes(tmp_path: Path) -> None:
    found = ranks("ddp_accumulate", tmp_path)
    assert [len(rank["losses"]) for rank in found] == [8, 8]
    assert [rank["drift"] for rank in found] == [[], []]


@pytest.mark.slow
def test_a_part_that_only_some_steps_use_is_trained_and_reported(tmp_path: Path) -> None:
    for rank in ranks("ddp_unused", tmp_path):
        assert len(rank["drift"]) == 1
        assert "'linear' was called in 'other' though never" in rank["drift"][0]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddp_distilled", "ddp_distilled_unused"])
def test_distillation_on_two_processes(case: str, tmp_path: Path) -> None:
    plain, found = ranks("ddp" if case == "ddp_distilled" else "ddp_unused", tmp_path), ranks(case, tmp_path)
    assert all(one["losses"] != two["losses"] for one, two in zip(plain, found, strict=True))


@pytest.mark.slow
def test_a_budget_on_two_processes(tmp_path: Path) -> None:
    """Each rank has samples of its own; the plan is one, also after it was revised."""
    found = ranks("ddp_budget", tmp_path)
    assert found[0]["bits"] == found[1]["bits"]
    assert len(set(found[0]["bits"].values())) > 1
    assert_tested(found)


@pytest.mark.slow
def test_a_speed_on_two_processes(tmp_path: Path) -> None:
    """Layers are timed by one of them; both train what it chose."""
    found = ranks("ddp_speed", tmp_path)
    assert found[0]["bits"] == found[1]["bits"]
    assert found[0]["quantized"] == found[1]["quantized"]
    assert_tested(found)


@pytest.mark.slow
def test_stages_on_two_processes(tmp_path: Path) -> None:
    """Fake-quantization starts, and a stage begins, in the midst of an epoch; each rank calibrates on batches of its own."""
    found = ranks("ddp_stages", tmp_path)
    assert set(found[0]["bits"].values()) == {4, 8, 32}  # the input and what is only added keep 8
    assert all(torch.equal(found[0]["ranges"][key], found[1]["ranges"][key]) for key in found[0]["ranges"])
    assert_tested(found)


@pytest.mark.slow
def test_learned_scales_on_two_processes(tmp_path: Path) -> None:
    """Their gradients are averaged: the scales of both ranks stay the same, and move."""
    found = ranks("ddp_learned", tmp_path)
    for part in ("ranges", "scales"):
        assert found[0][part]
        assert all(torch.equal(found[0][part][key], found[1][part][key]) for key in found[0][part])
    assert_tested(found)


@pytest.mark.slow
def test_spawned_processes(tmp_path: Path) -> None:
    """They leave nothing in the process that spawned them but the checkpoint, which gives the quantized model back."""
    done = run_on_two("ddp_spawn", tmp_path / "spawn")
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "spawn" / "result.pt", weights_only=True)
    assert "leaves the compressed model in them" in result["export"]
    assert result["tested"] == pytest.approx(result["logged"], rel=1e-5)
    assert result["tested"] != result["float"]


@pytest.mark.slow
def test_a_model_cut_over_processes_is_refused(tmp_path: Path) -> None:
    done = run_on_two("tensor_parallel", tmp_path / "tensor_parallel")
    assert done.returncode != 0
    assert "CCOError: CCOCallback: tensor_parallel_size is 2; expected 1" in done.stderr


# Lightning and torch refuse FSDPStrategy and DeepSpeedStrategy on a CPU by themselves.
def test_lightning_itself_wants_a_gpu_for_fsdp(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="requires a GPU"):
        make_trainer(tmp_path, strategy="fsdp")


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_the_weights_are_refused_at_setup(strategy: type[Any], tmp_path: Path) -> None:
    cco = quick()
    trainer = make_trainer(tmp_path, cco)
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(CCOError, match=rf"{strategy.__name__}.*fully_shard.*ddp"):
        cco.setup(trainer, Classifier(), "fit")


def test_distributed_tensors_are_refused_at_capture(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        mesh = init_device_mesh("cpu", (1,))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Replicate()]))
        with pytest.raises(CCOError, match=r"module '0': its 'linear' reads a DTensor"):
            capture_graph(model, distribute_tensor(torch.randn(3, 4), mesh, [Replicate()]))
    finally:
        torch.distributed.destroy_process_group()
