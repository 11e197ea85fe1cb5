"""The operators that engines run fastest compute what PyTorch's own operations compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_cco.export.engine_patterns import attention, averages_images, blocked_convolution


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.rand(5, 7) > 0.3},
        {"attn_mask": torch.randn(2, 4, 5, 7)},
    ],
    ids=["plain", "causal", "scale", "bool mask", "float mask"],
)
def test_attention_is_torchs_own(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options))


def test_attention_with_fewer_keys_than_queries_is_torchs_own() -> None:
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    torch.testing.assert_close(attention(q, k, v, enable_gqa=True), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7, (3, 5)])
@pytest.mark.parametrize("padding", [0, 1, 2, 3, (1, 2)])
def test_a_convolution_on_blocks_is_the_convolution(kernel: Any, padding: Any) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 9, (2, 3, 12, 16)).float()
    weight = torch.randint(-9, 9, (8, 3, *((kernel, kernel) if isinstance(kernel, int) else kernel))).float()
    call = {"stride": 2, "padding": padding, "dilation": 1, "groups": 1}
    form = blocked_convolution(weight, (12, 16), call, channel_multiple=4)
    if form is None:  # the last pixels are not read: nothing to gain from a form with a cut
        assert (kernel, padding) not in {(3, 1), (5, 2), (7, 3)}
        return
    top, left, bottom, right = form.pads
    # ONNX's SpaceToDepth counts channels last, PyTorch's pixel_unshuffle first.
    blocks = F.pixel_unshuffle(x, 2).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    got = F.conv2d(F.pad(blocks, (left, right, top, bottom)), form.weight)
    assert torch.equal(got, F.conv2d(x, weight, stride=2, padding=padding))
    assert int((form.weight != 0).sum()) == int((weight != 0).sum())


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 4},
        {"stride": 1},
        {"dilation": 2},
        {"padding": "valid"},
        {"image": (11, 12)},
        {"groups": 3},
    ],
    ids=str,
)
def test_other_convolutions_stay_as_they_are(change: dict[str, Any]) -> None:
    call = {"stride": 2, "padding": 1, "dilation": 1, "groups": 1, "channels": 3, "image": (12, 12)} | change
    weight = torch.randn(6, call.pop("channels") // call["groups"], 3, 3)
    assert blocked_convolution(weight, call.pop("image"), call, channel_multiple=4) is None


def test_which_averages_are_those_of_whole_channels() -> None:
    x = torch.randn(2, 4, 4, 4)
    assert averages_images("mean", (x, (2, 3)), {})
    assert averages_images("mean", (x,), {"dim": [-1, -2], "keepdim": True})
    assert averages_images("adaptive_avg_pool", (x, (1, 1)), {})
    assert not averages_images("mean", (x, (1, 2)), {})
    assert not averages_images("mean", (x,), {})
    assert not averages_images("mean", (x[0], (1, 2)), {})
    assert not averages_images("adaptive_avg_pool", (x, 2), {})
