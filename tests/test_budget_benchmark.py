"""The benchmark of budgets runs from images to its table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import budget
import fashion
from fashion_data import Images


def small() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def test_from_images_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    classes = torch.arange(128) % 10
    data = Images(torch.randn(128, 1, 12, 12) + classes[:, None, None, None], classes, torch.randn(20, 1, 12, 12), classes[:20])
    networks: dict[str, Any] = {"resnet": ("Small", small)}
    for module in (budget, fashion):
        monkeypatch.setattr(module, "NETWORKS", networks)
        monkeypatch.setattr(module, "OUTPUTS", tmp_path)
    monkeypatch.setattr(budget, "load_images", lambda folder: data)
    monkeypatch.setattr(sys, "argv", ["budget.py", "--models", "resnet", "--bits", "3", "4.5", "--seeds", "1", "--resume"])
    threads = torch.get_num_threads()
    try:
        budget.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| Small")]
    assert [row.count("(1)") for row in rows] == [1, 2, 1, 2]  # of 4.5 bits there is no plan of equal bits
    assert "average 4." in printed
