"""The table of torch functions: what each is called in a graph, and how it treats the values it reads.

A function mode sees calls by name (``conv2d``, ``__add__``, ``relu_``). The table maps every spelling of one operation to one `Op`, so that
``x + y``, ``torch.add(x, y)`` and ``x.add_(y)`` are all the layer kind ``add``. A name that is not in the table is a layer of its own kind that
runs in float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from lightning_cco.graph.layer import Layer


class Category(Enum):
    """How an operation treats the values it reads."""

    WEIGHTED = "weighted"
    """Multiplies its input by a weight."""
    MATMUL = "matmul"
    """Multiplies two tensors; weighted when one of them is a parameter."""
    COMPUTE = "compute"
    """Computes new values: additions, poolings, norms, activations."""
    CLAMP = "clamp"
    """Limits values to an interval, which a quantizer on its output does for free."""
    PRESERVE = "preserve"
    """Moves or selects values without changing them: what was on a quantization grid stays on it."""
    ALIAS = "alias"
    """Returns the values of its input as another tensor (`contiguous`, `detach`); not shown as a layer."""
    IDENTITY = "identity"
    """Not part of a deployed model: dropout."""


@dataclass(frozen=True)
class Op:
    """One kind of operation: all that is known of it in one row.

    Attributes:
        kind: The layer kind, the stem of a layer's name.
        category: How it treats values.
        functions: Names of the torch functions that are this operation.
        weight: Position and keyword of the weight, for `Category.WEIGHTED`.
        channel_axis: Axis of the weight that counts output channels.
        biased: Whether the operand at position 2, or the keyword ``bias``, is added to each output channel.
        takes_norm: Whether the factors of a batch norm after it go into its weight.
        looks_up: Whether it selects rows of its weight by indices.
        recurrent: Whether it reads a sequence step by step; cells, which read one step, are not.
        adds_first: Whether its first operand is added to the product of the other two.
        mask: Position and keyword of a mask that is added in float between its products.
        masks: Whether its constants may be infinite, as in ``masked_fill`` and added attention masks.
        constants: Whether its constant operands of more than one value are rounded like activations.
        arguments: Names of the positional arguments that a reader wants to see of a call; empty for tensors and others.
        fresh: Whether the result is new memory that the operation's own gradient does not read, so that it may be overwritten.
        read_by_gradient: Whether the result is new memory that its own gradient does read.
    """

    kind: str
    category: Category
    functions: tuple[str, ...] = ()
    weight: tuple[int, str] | None = None
    channel_axis: int = 0
    biased: bool = False
    takes_norm: bool = False
    looks_up: bool = False
    recurrent: bool = False
    adds_first: bool = False
    mask: tuple[int, str] | None = None
    masks: bool = False
    constants: bool = False
    arguments: tuple[str, ...] = ()
    fresh: bool = False
    read_by_gradient: bool = False

    @property
    def fresh_without_gradients(self) -> bool:
        """Whether the result is new memory, which nothing reads later but who asked for it if no gradients are recorded."""
        return self.fresh or self.read_by_gradient


def _each(stem: str, *suffixes: str) -> tuple[str, ...]:
    """The names of a function for one, two and three dimensions."""
    return tuple(f"{stem}{dim}{suffix}" for dim in ("1d", "2d", "3d") for suffix in ("", *suffixes))


def _in_place(stem: str) -> tuple[str, ...]:
    return stem, f"{stem}_"


def _arithmetic(stem: str, *more: str) -> tuple[str, ...]:
    """A function's name and those of its operators."""
    return (stem, f"{stem}_", f"__{stem}__", f"__r{stem}__", f"__i{stem}__", *more)


_WEIGHT = (1, "weight")
_W, _M, _C, _CLAMP, _P = Category.WEIGHTED, Category.MATMUL, Category.COMPUTE, Category.CLAMP, Category.PRESERVE
_NEAREST, _SMOOTH = ("nearest1d", "nearest2d", "nearest3d"), ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
_EXACT = ("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
_ANTI_ALIASED = ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
_CONV = ("", "", "", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("", "", "", "stride", "padding", "output_padding", "groups", "dilation")
_AVG_POOL = ("", "kernel_size", "stride", "padding", "ceil_mode", "", "divisor_override")

_ROWS = (
    # Products with a weight.
    Op("conv", _W, _each("conv"), _WEIGHT, biased=True, takes_norm=True, fresh=True, arguments=_CONV),
    Op("conv_transpose", _W, _each("conv_transpose"), _WEIGHT, 1, biased=True, takes_norm=True, fresh=True, arguments=_CONV_TRANSPOSE),
    Op("linear", _W, ("linear",), _WEIGHT, biased=True, takes_norm=True, fresh=True),
    Op("embedding", _W, ("embedding",), _WEIGHT, looks_up=True, fresh=True),
    Op("embedding_bag", _W, ("embedding_bag",), _WEIGHT, looks_up=True),
    Op("lstm", _W, ("lstm",), (2, "params"), recurrent=True),
    Op("gru", _W, ("gru",), (2, "params"), recurrent=True),
    Op("rnn", _W, ("rnn_tanh", "rnn_relu"), (2, "params"), recurrent=True),
    Op("lstm_cell", _W, ("lstm_cell",), (2, "w_ih")),
    Op("gru_cell", _W, ("gru_cell",), (2, "w_ih")),
    Op("bilinear", _W, ("bilinear",), (2, "weight"), fresh=True),
    Op("rnn_cell", _W, ("rnn_tanh_cell", "rnn_relu_cell"), (2, "w_ih")),
    # Products of two tensors.
    Op("matmul", _M, ("matmul", "linalg_matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "__imatmul__"), fresh=True),
    Op("addmm", _M, ("addmm", "addmm_"), adds_first=True, fresh=True),
    Op("baddbmm", _M, ("baddbmm", "baddbmm_", "addbmm", "addbmm_"), adds_first=True, fresh=True),
    Op("einsum", _M, ("einsum",), arguments=("equation",)),
    Op("scaled_dot_product_attention", _M, ("scaled_dot_product_attention",), mask=(3, "attn_mask"), masks=True, read_by_gradient=True),
    # Sums, and what puts tensors together.
    Op("add", _C, _arithmetic("add"), constants=True, masks=True, fresh=True, arguments=("", "", "alpha")),
    Op("sub", _C, _arithmetic("sub", "rsub", "subtract", "subtract_"), constants=True, masks=True, fresh=True, arguments=("", "", "alpha")),
    Op("mul", _C, _arithmetic("mul", "multiply", "multiply_"), constants=True, masks=True, fresh=True),
    Op(
        "div",
        _C,
        ("div", "div_", "true_divide", "__truediv__", "__rtruediv__", "__itruediv__", "__rdiv__", "divide"),
        constants=True,
        read_by_gradient=True,
    ),
    Op(
        "concat", _C, ("cat", "concat", "concatenate", "hstack", "vstack", "dstack", "row_stack", "column_stack"),
        constants=True, masks=True, fresh=True, arguments=("", "dim"),
    ),
    Op("stack", _C, ("stack",), constants=True, fresh=True),
    Op("lookup", _C),  # a constant indexed by a tensor (`table[ids]`): a layer of its own, since its result is a value
    Op("setitem", _C, ("__setitem__",), masks=True),
    Op("where", _C, masks=True),  # no engine has an INT8 kernel of these two
    Op("masked_fill", _C, masks=True),
    # Averages and other poolings.
    Op("mean", _C, ("mean",), fresh=True, arguments=("", "dim", "keepdim")),
    Op("avg_pool", _C, _each("avg_pool"), fresh=True, arguments=_AVG_POOL),
    Op("adaptive_avg_pool", _C, _each("adaptive_avg_pool"), fresh=True, arguments=("", "output_size")),
    Op("lp_pool", _C, _each("lp_pool")),
    # The operators for one mode have other arguments than the functions.
    Op("interpolate", _C, (*(f"upsample_{mode}" for mode in _NEAREST), *_EXACT), fresh=True, arguments=("", "size", "scale_factor")),
    Op(
        "interpolate",
        _C,
        (*(f"upsample_{mode}" for mode in _SMOOTH), *_ANTI_ALIASED),
        fresh=True,
        arguments=("", "size", "align_corners", "scale_factor"),
    ),
    Op(
        "interpolate",
        _C,
        ("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"),
        fresh=True,
        arguments=("", "size", "scale_factor", "mode"),
    ),
    # Norms.
    Op("batch_norm", _C, ("batch_norm",), fresh=True),
    Op("layer_norm", _C, ("layer_norm",), fresh=True),
    Op("group_norm", _C, ("group_norm",), fresh=True),
    *(Op(kind, _C, (kind,)) for kind in ("instance_norm", "rms_norm", "local_response_norm", "normalize")),
    # Activations.
    *(Op(kind, _C, _in_place(kind), fresh=True) for kind in ("gelu", "silu", "hardswish")),
    *(Op(kind, _C, _in_place(kind), read_by_gradient=True) for kind in ("sigmoid", "tanh")),
    *(Op(kind, _C, _in_place(kind)) for kind in ("hardsigmoid", "leaky_relu", "elu", "celu", "selu", "prelu", "mish", "softplus")),
    Op("softmax", _C, ("softmax", "_softmax"), read_by_gradient=True, arguments=("", "dim")),
    Op("log_softmax", _C, ("log_softmax", "_log_softmax")),
    # Clamps.
    Op("relu", _CLAMP, ("relu", "relu_")),
    Op("relu6", _CLAMP, ("relu6",)),
    Op("hardtanh", _CLAMP, ("hardtanh", "hardtanh_"), arguments=("", "min_val", "max_val")),
    Op(
        "clamp",
        _CLAMP,
        ("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"),
        arguments=("", "min", "max"),
    ),
    # What moves or selects values.
    Op("max_pool", _P, _each("max_pool", "_with_indices"), arguments=("", "kernel_size", "stride", "padding", "dilation")),
    Op("adaptive_max_pool", _P, _each("adaptive_max_pool", "_with_indices")),
    Op("flatten", _P, ("flatten",), arguments=("", "start_dim", "end_dim")),
    Op("permute", _P, ("permute",), arguments=("", "dims")),
    Op("transpose", _P, ("transpose", "transpose_", "t", "swapaxes", "swapdims", "adjoint"), arguments=("", "dim0", "dim1")),
    Op("reshape", _P, ("reshape", "view", "_unsafe_view", "view_as", "reshape_as", "unflatten", "ravel")),
    Op("squeeze", _P, ("squeeze", "squeeze_")),
    Op("unsqueeze", _P, ("unsqueeze", "unsqueeze_")),
    Op("expand", _P, ("expand", "expand_as", "broadcast_to")),
    Op("repeat", _P, ("repeat", "tile")),
    Op("movedim", _P, ("movedim", "moveaxis")),
    Op("chunk", _P, ("chunk", "unsafe_chunk", "hsplit", "vsplit", "dsplit")),
    Op("split", _P, ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")),
    Op("slice", _P, ("__getitem__", "slice")),
    *(
        Op(kind, _P, (kind,))
        for kind in (
            "unbind", "tensor_split", "narrow", "select", "index_select", "gather", "flip", "roll", "pixel_shuffle", "pixel_unshuffle",
            "channel_shuffle", "unfold", "repeat_interleave", "take_along_dim",
        )
    ),
    Op("pad", _P, ("pad",), arguments=("", "pad", "mode", "value")),
    # What is no layer of a deployed model.
    Op(
        "alias",
        Category.ALIAS,
        (
            "contiguous", "detach", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as", "cpu", "cuda", "alias", "requires_grad_",
            "__get__", "as_subclass", "_to_copy", "lift_fresh", "lift_fresh_copy", "__deepcopy__", "view_as_real", "positive", "__pos__", "data_ptr",
            "retain_grad", "result_type",
        ),
    ),
    Op(
        "dropout",
        Category.IDENTITY,
        (
            "dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_", "feature_alpha_dropout",
            "feature_alpha_dropout_", "native_dropout", *_each("dropout"),
        ),
        arguments=("", "p"),
    ),
)  # fmt: skip


OPS: dict[str, Op] = {name: row for row in _ROWS for name in row.functions}
"""Operation by the name of the torch function."""

RANDOM = frozenset({
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "normal_", "uniform_", "random_", "exponential_",
    "geometric_", "cauchy_", "log_normal_", "bernoulli", "bernoulli_", "poisson", "multinomial",
})  # fmt: skip
"""Functions that draw random numbers."""

DRAWS_WEIGHTS = frozenset({
    "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_",
})  # fmt: skip
"""Functions of `torch.nn.init` that draw random numbers."""

OVERWRITES = RANDOM | DRAWS_WEIGHTS | {"copy_", "fill_", "zero_"}
"""Functions that write all of their first operand, and read nothing of it, where their names end with an underscore."""

READS_OUT = frozenset({"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__dlpack__"})
"""Functions that hand the values of a tensor over to Python."""

READS_VALUES = READS_OUT | {"__bool__", "__index__", "__complex__", "equal", "allclose", "is_nonzero", "__contains__"}
"""Functions that return no tensor, but what depends on a tensor's values."""

MAKES_OF_DATA = frozenset({"tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor", "full", "new_full", "full_like"})
"""Functions that make a tensor of values that Python has."""

_KINDS: dict[str, Op] = {row.kind: row for row in _ROWS}


def is_known_kind(kind: str) -> bool:
    """Whether the table has functions of that kind."""
    row = _KINDS.get(kind)
    return row is not None and bool(row.functions)


def operation_of_kind(kind: str) -> Op:
    """Look an operation up by a layer's kind; an unknown one computes in float."""
    return _KINDS.get(kind) or Op(kind, Category.COMPUTE)


_HUGE = 1e4  # a border of at least this size stands for infinity: a maximum never takes it, so it is no new value


def category_of(layer: Layer) -> Category:
    """How a layer treats values: as its kind does, but for arguments that make it move values alone, or add one.

    An interpolation to the nearest picks values; one tensor alone (the first layer of a dense block) is put together with nothing; a border of a number
    may be a new value.
    """
    border = layer.attributes.get("value")
    if layer.kind == "pad" and isinstance(border, (int, float)) and 0 < abs(border) < _HUGE:
        return Category.COMPUTE
    if layer.kind == "interpolate" and str(layer.attributes.get("mode", "nearest")).startswith("nearest"):
        return Category.PRESERVE
    if layer.kind in ("concat", "stack") and [*map(math.prod, layer.input_shapes)] == [*map(math.prod, layer.output_shapes)]:
        return Category.PRESERVE
    return operation_of_kind(layer.kind).category


def operation(function_name: str) -> Op:
    """Look an operation up by its torch function's name; an unknown one computes in float under its own name.

    >>> operation("conv2d").kind, operation("__iadd__").kind, operation("cumsum_").kind
    ('conv', 'add', 'cumsum')
    """
    known = OPS.get(function_name)
    return known if known is not None else Op(function_name.strip("_") or function_name, Category.COMPUTE)
