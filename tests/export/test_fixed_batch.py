"""The batch varies in a file wherever the model allows it; elsewhere it is that of the example, and it is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, QuantizedModel, quantize
from lightning_cco.export.engine_patterns import in_slices

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class GroupsOfTheBatch(nn.Module):
    """Each sample has a kernel of its own: a convolution in as many groups as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.weights = nn.Parameter(torch.randn(4, 8 * 3 * 9) / 5), nn.Linear(3, 4)
        self.conv, self.last = nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        kernels = (self.weights(x.mean((2, 3))).softmax(1) @ self.kernels).view(count * 8, 3, 3, 3)
        x = F.conv2d(x.reshape(1, count * 3, height, width), kernels, groups=count).view(count, 8, height - 2, width - 2)
        return self.last(F.relu(self.conv(F.relu(x))).mean((2, 3)))


class Ordered(nn.Module):
    """Each sample is mixed with those before it, by a matrix that is made for the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(torch.tril(torch.ones(len(x), len(x))) @ F.relu(self.first(x))))


class Pairs(nn.Module):
    """Two views of each sample in one batch, as contrastive learning has them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = F.relu(self.first(x))
        if self.how == "chunk":
            one, other = both.chunk(2)
        elif self.how == "unsafe":
            one, other = torch.unsafe_chunk(both, 2)
        elif self.how == "split":
            one, other = torch.split(both, both.shape[0] // 2)
        elif self.how == "sizes":
            one, other = both.split([both.shape[0] // 2, both.shape[0] - both.shape[0] // 2], dim=0)
        else:
            one, other = torch.tensor_split(both, 2)
        return self.last(F.relu(self.second(one - other)))


def calibrated(model: nn.Module, x: Tensor) -> QuantizedModel:
    quantized = quantize(model.eval(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    return quantized


@pytest.mark.parametrize("make", [GroupsOfTheBatch, Ordered])
def test_a_batch_that_can_not_vary_is_fixed_and_said(make: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8) if make is GroupsOfTheBatch else torch.randn(4, 8)
    quantized = calibrated(make(), x)
    with pytest.warns(CCOWarning, match=r"the size of the batch is fixed in the file, at 4 as in the example"):
        report = quantized.export(tmp_path / "a.onnx")
    assert any("the size of the batch is fixed in the file, at 4" in note for note in report.notes)
    assert list(report.inputs.values()) == [list(x.shape)]
    assert report.sqnr_db > 30
    with pytest.raises(CCOError, match="dynamic_batch=False"):
        quantized.export(tmp_path / "b.onnx", dynamic_batch=True)
    assert not (tmp_path / "b.onnx").exists()


def test_sizes_that_were_asked_for_are_not_given_up(tmp_path: Path) -> None:
    class Masked(nn.Module):
        """Images of any size, of a batch whose size is a number."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x))) * torch.from_numpy(np.ones((len(x), 1, 1, 1), np.float32))

    torch.manual_seed(0)
    quantized = calibrated(Masked(), torch.randn(4, 3, 8, 8))
    with pytest.raises(CCOError):
        quantized.export(tmp_path / "a.onnx", dynamic_sizes=True)
    assert not (tmp_path / "a.onnx").exists()


def test_a_program_of_a_fixed_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    quantized = calibrated(Ordered(), x)
    with pytest.warns(
        CCOWarning, match=r"the size of the batch is fixed in the file, at 4 as in the example.*x\.shape\[0\] \(not len\(x\)"
    ):
        program = quantized.export(tmp_path / "a.pt2")
    torch.testing.assert_close(program.module()(x), quantized.model(x))
    with pytest.raises(CCOError, match="dynamic_batch=False"):
        quantized.export(tmp_path / "b.pt2", dynamic_batch=True)


@pytest.mark.parametrize("how", ["unsafe", pytest.param("chunk", marks=pytest.mark.slow), "split", "sizes", "tensor_split"])
def test_parts_of_a_batch_that_varies(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = calibrated(Pairs(how), torch.randn(4, 8))
    report = quantized.export(tmp_path / "a.onnx")
    assert list(report.inputs.values()) == [["batch", 8]]
    assert sum(report.integer_nodes.values()) >= 3
    session, x = ort.InferenceSession(str(tmp_path / "a.onnx")), torch.randn(10, 8)
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    error = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] - expected
    assert np.square(error).sum() < 1e-3 * np.square(expected).sum()


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("split", [torch.chunk, torch.unsafe_chunk, torch.tensor_split])
def test_slices_are_the_parts(split: object, size: int) -> None:
    x = torch.arange(size * 6).reshape(size, 6)
    for dim in (0, 1, -1):
        for mine, wanted in zip(in_slices(split)(x, 2, dim), split(x, 2, dim), strict=True):
            assert torch.equal(mine, wanted)


class Centred(nn.Module):
    """Parts of the batch from which their own mean is taken off: what is in which part matters."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        parts = {"split": lambda: x.split(2), "chunk": lambda: x.chunk(3), "tensor_split": lambda: torch.tensor_split(x, 2)}[self.how]()
        return self.last(torch.cat([part - part.mean(0) for part in parts]))


@pytest.mark.parametrize(("how", "size"), [("split", 4), ("chunk", 4), ("chunk", 6), ("tensor_split", 4)])
def test_each_row_of_another_batch_is_in_its_part(how: str, size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Centred(how).eval(), torch.randn(size, 8)
    quantized = quantize(model, {"global_quantization_settings": {"weight_only": True}}, (x,))
    quantized.calibrate([x])
    if size == 4 and how != "tensor_split":
        with pytest.raises(CCOError, match=rf"how many parts {how}\(\d\) makes depends on the size of the batch, .*dynamic_batch=False"):
            quantized.export(tmp_path / "a.onnx", dynamic_batch=True)
        with pytest.warns(CCOWarning, match=rf"fixed in the file, at 4 as in the example.*how many parts {how}"):
            report = quantized.export(tmp_path / "a.onnx")
        assert report.inputs == {"x": [4, 8]}
        return
    quantized.export(tmp_path / "a.onnx", dynamic_batch=True)
    session = ort.InferenceSession(str(tmp_path / "a.onnx"))
    for other in (5, 6, 7, 9):
        x = torch.randn(other, 8)
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], model(x).numpy(), atol=0.02)


def test_parts_along_other_axes_leave_the_batch_free(tmp_path: Path) -> None:
    """Each function has an axis of its own; the number of parts of an axis whose size is fixed is fixed."""

    class Parts(nn.Module):
        """Parts of channels, rows and columns."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            parts = [*x.hsplit(2), *x.hsplit([2, 6]), *x.split(3, dim=1)[:2]]
            channels = torch.cat(parts, 1)
            return self.last(torch.cat([channels[:, :16, :4], torch.cat(channels[:, 6:22].dsplit(2), 2)], 2))

    torch.manual_seed(0)
    quantized = calibrated(Parts(), torch.randn(4, 3, 8, 8))
    report = quantized.export(tmp_path / "a.onnx", dynamic_sizes=False)
    assert list(report.inputs.values()) == [["batch", 3, 8, 8]]
    session, x = ort.InferenceSession(str(tmp_path / "a.onnx")), torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.square(found - expected).mean() < 1e-4 * np.square(expected).mean()
