"""The rewriting of an exported graph to have the features that its engine requires, pass by pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_cco.export import onnx_passes
from lightning_cco.export.counted_sizes import count_sizes
from lightning_cco.export.engines import Engine, FileFeature
from lightning_cco.export.float_types import compute_in_float32
from lightning_cco.export.fusion_barriers import keep_float_weights, separate_pairs, separate_roundings
from lightning_cco.export.integer_constants import arrange_integers
from lightning_cco.export.qdq_per_operator import carry_pairs, clamp_between_pairs, round_tables
from lightning_cco.export.relu_on_floats import relus_as_maxima
from lightning_cco.export.split_linear import fill_biases, split_products, store_transposed
from lightning_cco.export.weight_blocks import share_packed

_BEFORE_SHARING: tuple[tuple[FileFeature, tuple[Callable[[Any], None], ...]], ...] = (
    (FileFeature.COUNTED_SIZES, (count_sizes,)),
    (FileFeature.INTEGER_INDEXING, (onnx_passes.index_integers,)),
    (FileFeature.UNITS, (carry_pairs, clamp_between_pairs, round_tables)),
    (FileFeature.SPLIT_PRODUCTS, (split_products,)),
    (FileFeature.FULL_BIASES, (fill_biases,)),
    (FileFeature.STORED_TRANSPOSED, (store_transposed,)),
    (FileFeature.RELU_AS_MAXIMUM, (relus_as_maxima,)),
    (FileFeature.FLOAT_WEIGHTS, (keep_float_weights,)),
    (FileFeature.SEPARATE_ROUNDINGS, (separate_roundings,)),
    (FileFeature.SEPARATE_PAIRS, (separate_pairs,)),
)
"""Passes for a form that an engine may want, in the order in which they run."""


def rewrite(graph: Any, engine: Engine, int4: bool, grouped: bool) -> list[str]:
    """Rewrite a graph in place.

    Args:
        graph: An `onnx_ir.Graph`, as the exporter has made it.
        engine: What the file is for.
        int4: Whether weights of at most 4 bits are stored in 4 bits.
        grouped: Whether some weights are in groups.

    Returns:
        The float types other than float32 that the graph computed in, and no longer has.
    """
    narrow = compute_in_float32(graph)
    onnx_passes.fix_shapes(graph)
    arrange_integers(graph)
    for form, passes in _BEFORE_SHARING:
        if engine.requires(form):
            for apply in passes:
                apply(graph)
    onnx_passes.share_constants(graph)
    if engine.requires(FileFeature.OWN_ZERO_POINTS):
        onnx_passes.own_zero_points(graph)
    if int4 or grouped:
        onnx_passes.pack_int4(graph, blocks_alone=not int4)
    share_packed(graph)
    return narrow
