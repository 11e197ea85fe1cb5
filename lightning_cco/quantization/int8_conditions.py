"""What tells layers of one kind apart where an engine has an INT8 operator for some of them alone."""

from __future__ import annotations

from lightning_cco.graph.einsum_equations import matrix_product
from lightning_cco.graph.layer import FLOATS, Layer


def two_operands(layer: Layer) -> bool:
    """Two tensors of floats, or one and a parameter: with a number, a mask or integers it is no INT8 operator, nor does a factor of the second."""
    two = len(layer.input_shapes) > 1 or "operand_shape" in layer.attributes
    return two and floats_alone(layer) and layer.attributes.get("alpha", 1) == 1


def reads_one(layer: Layer) -> bool:
    """One tensor alone, and no parameter."""
    return len(layer.input_shapes) < 2 and "operand_shape" not in layer.attributes


def two_activations_or_channels(layer: Layer) -> bool:
    """Two tensors of floats, or one of images and a parameter with a value for each channel, or for all."""
    shape = layer.attributes.get("operand_shape")
    if not isinstance(shape, tuple) or not two_operands(layer):
        return two_operands(layer)
    beside = shape if len(layer.input_shapes[0]) != 4 else (*shape[:-3], *shape[-2:])
    return all(size == 1 for size in beside)


def floats_alone(layer: Layer) -> bool:
    """No mask and no integers, which PyTorch makes floats of, among the tensors that it reads."""
    return all(dtype in FLOATS for dtype in layer.input_dtypes)


def weight_last(layer: Layer) -> bool:
    """No weight on the left of what it multiplies."""
    return not layer.attributes.get("weight_first")


def weight_second(layer: Layer) -> bool:
    """A product with a weight on its right; of two activations the second would need zero point 0."""
    return layer.weighted and weight_last(layer)


def by_a_matrix(layer: Layer) -> bool:
    """An einsum that is a product with a matrix of weights on its right."""
    shape = layer.attributes.get("operand_shape")
    if not layer.weighted or not weight_last(layer) or not isinstance(shape, tuple):
        return False
    return matrix_product(layer.attributes.get("equation"), len(layer.input_shapes[0]), len(shape)) is not None


def averages_images(layer: Layer) -> bool:
    """The mean of each whole channel of a batch of images."""
    axes, shape = layer.attributes.get("dim"), layer.input_shapes[0] if layer.input_shapes else ()
    return len(shape) == 4 and isinstance(axes, tuple) and sorted(axis % 4 for axis in axes) == [2, 3]


def pools_evenly(layer: Layer) -> bool:
    """An adaptive pooling whose windows are all of one size and do not overlap; one window for all is known for images only."""
    before, after = layer.input_shapes[0], layer.output_shapes[0]
    spatial = list(zip(before[2:], after[2:], strict=False))
    if len(before) != len(after) or any(size % parts for size, parts in spatial):
        return False
    return len(before) == 4 or any(parts != 1 for _, parts in spatial)


def divides_by_count(layer: Layer) -> bool:
    """An average pooling of whole windows, by their size: those that ``ceil_mode`` adds at the end are smaller."""
    return layer.attributes.get("divisor_override") is None and not layer.attributes.get("ceil_mode")


def averages_windows(layer: Layer) -> bool:
    """An average pooling of images in whole windows without a border, which is a convolution of each channel with equal weights."""
    padding = layer.attributes.get("padding", 0)
    whole = pools_evenly(layer) if layer.kind == "adaptive_avg_pool" else divides_by_count(layer)
    return whole and len(layer.input_shapes[0]) == 4 and not any(padding if isinstance(padding, tuple) else (padding,))


def nearest(layer: Layer) -> bool:
    """An interpolation that picks the nearest value."""
    return str(layer.attributes.get("mode", "nearest")).startswith("nearest")


def flat(layer: Layer) -> bool:
    """A convolution of one or two dimensions."""
    return bool(layer.input_shapes) and len(layer.input_shapes[0]) <= 4


def transposed_whole(layer: Layer) -> bool:
    """A transposed convolution of images without groups, whose weights may have a scale for each channel."""
    return bool(layer.input_shapes) and len(layer.input_shapes[0]) == 4 and layer.attributes.get("groups", 1) == 1


def ungrouped(layer: Layer) -> bool:
    """A convolution without groups."""
    return bool(layer.attributes.get("groups", 1) == 1)


def averages_to_one(layer: Layer) -> bool:
    """An adaptive pooling of images to one value a channel."""
    return len(layer.output_shapes[0]) == 4 and tuple(layer.output_shapes[0][2:]) == (1, 1)
