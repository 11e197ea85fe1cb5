"""Ranges that are moved by one call of C are those of PyTorch's operations, to the last bit."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_cco.quantization import native, range_updates
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.qparams import affine_qparams
from lightning_cco.quantization.range_updates import update_ranges

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no C compiler")

FORMATS = list(itertools.product((2, 3, 8), (False, True)))


def some_quantizers(estimator: str, share: float = 0.05, size: float = 1.0) -> list[ActivationQuantizer]:
    made = [ActivationQuantizer(bits, symmetric, estimator, share) for bits, symmetric in FORMATS]
    for number, quantizer in enumerate(made):
        quantizer.observe(size * torch.randn(9) if number else torch.zeros(9))
        quantizer.finish_calibration()
        quantizer.unfreeze()
    return made


def by_operations(quantizers: list[ActivationQuantizer], before: Tensor | None = None) -> Tensor | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_updates, "move_by_kernel", lambda *_: None)
        return update_ranges(quantizers, before)


def assert_same(ours: list[ActivationQuantizer], theirs: list[ActivationQuantizer]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for (name, buffer), expected in zip(one.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(buffer, expected), name
        assert one.numbers() == other.numbers() == (float(one.scale), float(one.zero_point))
        assert one.empty == other.empty


ends = st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=6, max_size=6)


@given(
    estimator=st.sampled_from(["moving_average", "min_max", "mse"]),
    share=st.sampled_from([0.01, 0.05, 0.5, 0.9, 1.0]),
    size=st.sampled_from([1e-9, 1.0, 1e5]),
    steps=st.lists(ends, min_size=1, max_size=3),
    wide=st.lists(st.booleans(), min_size=6, max_size=6),
)
@settings(max_examples=80, deadline=None)
def test_equal_to_operations(estimator: str, share: float, size: float, steps: list[list[tuple[float, float]]], wide: list[bool]) -> None:
    """NaN, infinities, zeros, batches that say nothing, outliers once and twice in a row."""
    torch.manual_seed(0)
    ours = some_quantizers(estimator, share, size)
    theirs, found, expected = copy.deepcopy(ours), None, None
    for step in [*steps, steps[-1], [(-2000.0 * size * is_wide, 3.0 * size) for is_wide in wide]]:
        for numbers, *both in zip(step, ours, theirs, strict=True):
            for quantizer in both:
                quantizer.extrema.copy_(torch.tensor(numbers))
        found, expected = update_ranges(ours, found), by_operations(theirs, expected)
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
        assert_same(ours, theirs)


def test_formula() -> None:
    quantizers = some_quantizers("moving_average", 0.25)
    before = [(float(quantizer.min_val), float(quantizer.max_val)) for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.extrema.copy_(torch.tensor([-3.0, 5.0]))
    update_ranges(quantizers)
    for quantizer, (low, high) in zip(quantizers[1:], before[1:], strict=True):
        assert (float(quantizer.min_val), float(quantizer.max_val)) == pytest.approx((0.75 * low - 0.75, 0.75 * high + 1.25))
        assert (quantizer.scale, quantizer.zero_point) == affine_qparams(
            quantizer.min_val, quantizer.max_val, quantizer.num_bits, quantizer.symmetric
        )
        assert quantizer.extrema.tolist() == [float("inf"), -float("inf")]


def test_who_holds_a_buffer_sees_that_it_has_changed() -> None:
    quantizers = some_quantizers("moving_average")
    names = ("min_val", "max_val", "scale", "zero_point", "extrema")
    versions = [getattr(quantizer, name)._version for quantizer in quantizers for name in names]
    update_ranges(quantizers)
    now = [getattr(quantizer, name)._version for quantizer in quantizers for name in names]
    assert all(new > old for new, old in zip(now, versions, strict=True))


@pytest.mark.parametrize("how", ["assigned", "data", "copied"])
def test_buffers_that_are_elsewhere_are_found(how: str) -> None:
    """Ranges move where the buffers are now, and the numbers of before are left alone."""
    quantizers = some_quantizers("moving_average")
    update_ranges(quantizers)  # their places are known now
    before = [quantizer.min_val for quantizer in quantizers]
    values = [float(held) for held in before]
    if how == "copied":
        quantizers = copy.deepcopy(quantizers)
    for quantizer in quantizers:
        for name, buffer in list(quantizer.named_buffers()):
            if how == "assigned":
                setattr(quantizer, name, buffer.clone())
            elif how == "data":
                buffer.data = buffer.data.clone()
        quantizer.extrema.copy_(torch.tensor([-30.0, 5.0]))
    theirs = copy.deepcopy(quantizers)
    update_ranges(quantizers)
    by_operations(theirs)
    assert_same(quantizers, theirs)
    assert float(quantizers[1].min_val) < values[1]
    assert how == "data" or [float(held) for held in before] == values


def test_buffers_that_c_can_not_read_are_moved_by_operations() -> None:
    quantizers = some_quantizers("moving_average")
    update_ranges(quantizers)
    low = float(quantizers[1].min_val)
    quantizers[1].min_val = quantizers[1].min_val.double()
    for quantizer in quantizers:
        quantizer.extrema.copy_(torch.tensor([-30.0, 5.0]))
    update_ranges(quantizers)
    assert float(quantizers[1].min_val) == pytest.approx(low + 0.05 * (-30.0 - low))
