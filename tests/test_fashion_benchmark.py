"""The benchmark of accuracy at few bits runs from the files of Fashion-MNIST to its table."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import fashion
import fashion_peers
from fashion_data import NETWORKS, load_images
from fashion_tools import Refused, Tool, readers_of_positive


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty-four images to train on and ten to test, in the format of the files; a class is how bright an image is."""
    torch.manual_seed(0)
    for prefix, count in (("train", 64), ("t10k", 10)):
        classes = torch.arange(count, dtype=torch.uint8) % 10
        pixels = (torch.randint(0, 8, (count, 28, 28)) + 24 * classes[:, None, None]).to(torch.uint8)
        for kind, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, classes)):
            with gzip.open(tmp_path / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(header) + values.numpy().tobytes())
    return tmp_path


def test_missing_data_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"apt-get install dataset-fashion-mnist.*--data FOLDER"):
        load_images(tmp_path)


def test_the_networks_are_of_the_size_that_they_say() -> None:
    sizes = {name: sum(parameter.numel() for parameter in make().parameters()) for name, (_, make) in NETWORKS.items()}
    assert sizes == {"resnet": 77_754, "mobilenet": 36_122, "vit": 88_570}


def test_from_files_to_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def small() -> nn.Module:
        layers = [nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    monkeypatch.setattr(fashion, "NETWORKS", {"resnet": ("Small", small), "mobilenet": ("Small", small)})
    monkeypatch.setattr(fashion, "OUTPUTS", folder / "outputs")
    command = ["fashion.py", "--data", str(folder), "--models", "resnet", "--bits", "w4a4", "w2a2", "--seeds", "2", "--resume"]
    monkeypatch.setattr(sys, "argv", command)
    fashion.main()
    kept = json.loads((folder / "outputs" / "results.json").read_text())
    trainings = len(fashion.TRAININGS)
    assert len(kept) == 1 + 2 * (1 + 2 * (trainings - 1))  # float; of two seeds: float continued, and the others at two bit widths
    printed = capsys.readouterr().out
    assert printed.count("| Small (float") == trainings
    monkeypatch.setattr(fashion, "one", lambda *args: pytest.fail("measured again"))
    fashion.main()
    monkeypatch.setattr(sys, "argv", ["fashion.py", "--data", str(folder), "--table", "--bits", "w2a2", "--trainings", "1"])
    capsys.readouterr()
    fashion.main()
    assert capsys.readouterr().out.count("| Small (float") == 1


def test_first_convolution_and_input_have_8_bits_and_the_last_layer_none(folder: Path) -> None:
    torch.manual_seed(0)
    quantized = fashion.quantized_network(NETWORKS["mobilenet"][1](), load_images(folder), "w2a2", {"residual_stream": "quantized"}, 0)
    assert {one.num_bits for one in quantized.activations.values()} == {2, 8}
    assert [key for key, one in quantized.activations.items() if one.num_bits == 8] == ["input_0", "adaptive_avg_pool"]
    assert [name for name, ones in quantized.weights.items() if ones[0].num_bits == 8] == ["conv"]
    assert "linear" not in quantized.plan.quantized
    quantized.remove()


def _small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def test_other_tools_are_rows_of_the_same_results(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def trained(model: nn.Module, batches: list[torch.Tensor], weights: int, activations: int) -> nn.Module:
        calls.append((weights, activations))
        return model.train()

    def refusing(model: nn.Module, batches: list[torch.Tensor], weights: int, activations: int) -> nn.Module:
        raise Refused("8 bits only")

    def absent(model: nn.Module, batches: list[torch.Tensor], weights: int, activations: int) -> nn.Module:
        import a_tool_that_nobody_has  # type: ignore[import-not-found]

        return a_tool_that_nobody_has  # type: ignore[no-any-return]

    tools = {name: Tool(name, name, prepare, "") for name, prepare in (("A", trained), ("B", refusing), ("C", absent))}
    for module in (fashion, fashion_peers):
        monkeypatch.setattr(module, "NETWORKS", {"resnet": ("Small", _small)})
        monkeypatch.setattr(module, "OUTPUTS", folder / "outputs")
        monkeypatch.setattr(module, "TOOLS", tools)
    command = ["--data", str(folder), "--models", "resnet", "--bits", "w4a4"]
    monkeypatch.setattr(sys, "argv", ["fashion.py", *command, "--seeds", "1", "--trainings", "0"])
    fashion.main()
    before = json.loads((folder / "outputs" / "results.json").read_text())
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["fashion_peers.py", *command, "--seeds", "2", "--resume"])
        fashion_peers.main()
    assert calls == [(4, 4)] * 2  # once for each seed
    kept = json.loads((folder / "outputs" / "results.json").read_text())
    assert before.items() <= kept.items()
    assert kept["resnet|B|w4a4|0"] == "refuses: 8 bits only"
    assert kept["resnet|C|w4a4|1"] == "not installed (a_tool_that_nobody_has)"
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["fashion.py", *command, "--table"])
    fashion.main()
    rows = [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("| Small (float")]
    assert [row[0] for row in rows] == [fashion.FLOAT, "A", "B", "C"]
    assert rows[2][1] == "refuses: 8 bits only |"


def test_layers_that_read_nothing_below_zero(folder: Path) -> None:
    torch.manual_seed(0)
    images = list(load_images(folder).train.split(32))
    assert readers_of_positive(_small(), images) == {"2"}
