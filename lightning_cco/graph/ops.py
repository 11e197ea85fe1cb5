"""The table of torch functions: what each is called in a graph, and how it treats the values it reads.

A function mode sees calls by name (``conv2d``, ``__add__``, ``relu_``). The table maps every spelling of one operation to one `Op`, so that
``x + y``, ``torch.add(x, y)`` and ``x.add_(y)`` are all the layer kind ``add``. A name that is not in the table is a layer of its own kind that
runs in float.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
    """Returns its input in another guise (`contiguous`, `detach`); not worth a node of its own."""
    IDENTITY = "identity"
    """Not part of a deployed model: dropout."""


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        kind: The layer kind, the stem of a layer's name.
        category: How it treats values.
        weight: Position and keyword of the weight, for `Category.WEIGHTED`.
        channel_axis: Axis of the weight that counts output channels.
    """

    kind: str
    category: Category
    weight: tuple[int, str] | None = None
    channel_axis: int = 0

    @property
    def fresh(self) -> bool:
        """Whether the result is new memory that the operation's own gradient does not read, so that it may be overwritten."""
        return self.kind in _FRESH

    @property
    def fresh_without_gradients(self) -> bool:
        """Whether the result is new memory, which nothing reads later but who asked for it if no gradients are recorded."""
        return self.kind in _FRESH or self.kind in _READ_BY_GRADIENT


_FRESH = frozenset({
    "conv", "conv_transpose", "linear", "embedding", "matmul", "addmm", "baddbmm", "add", "sub", "mul", "concat", "stack", "avg_pool",
    "adaptive_avg_pool", "mean", "interpolate", "batch_norm", "layer_norm", "group_norm", "gelu", "silu", "hardswish",
})  # fmt: skip
_READ_BY_GRADIENT = frozenset({"scaled_dot_product_attention", "softmax", "sigmoid", "tanh", "div"})


_UPSAMPLE = ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d")


def _spellings(stem: str) -> tuple[str, ...]:
    return (stem, f"{stem}_", f"__{stem}__", f"__r{stem}__", f"__i{stem}__")


def _table() -> dict[str, Op]:
    table: dict[str, Op] = {}

    def put(op: Op, *names: str) -> None:
        for name in names:
            table[name] = op

    for dim in ("1d", "2d", "3d"):
        put(Op("conv", Category.WEIGHTED, (1, "weight")), f"conv{dim}")
        put(Op("conv_transpose", Category.WEIGHTED, (1, "weight"), channel_axis=1), f"conv_transpose{dim}")
        put(Op("max_pool", Category.PRESERVE), f"max_pool{dim}", f"max_pool{dim}_with_indices")
        put(Op("adaptive_max_pool", Category.PRESERVE), f"adaptive_max_pool{dim}", f"adaptive_max_pool{dim}_with_indices")
        put(Op("avg_pool", Category.COMPUTE), f"avg_pool{dim}")
        put(Op("adaptive_avg_pool", Category.COMPUTE), f"adaptive_avg_pool{dim}")
        put(Op("lp_pool", Category.COMPUTE), f"lp_pool{dim}")
        put(Op("dropout", Category.IDENTITY), f"dropout{dim}")
    put(Op("linear", Category.WEIGHTED, (1, "weight")), "linear")
    put(Op("embedding", Category.WEIGHTED, (1, "weight")), "embedding")
    put(Op("embedding_bag", Category.WEIGHTED, (1, "weight")), "embedding_bag")
    put(Op("lstm", Category.WEIGHTED, (2, "params")), "lstm")
    put(Op("gru", Category.WEIGHTED, (2, "params")), "gru")
    put(Op("rnn", Category.WEIGHTED, (2, "params")), "rnn_tanh", "rnn_relu")
    put(Op("lstm_cell", Category.WEIGHTED, (2, "w_ih")), "lstm_cell")
    put(Op("gru_cell", Category.WEIGHTED, (2, "w_ih")), "gru_cell")
    put(Op("rnn_cell", Category.WEIGHTED, (2, "w_ih")), "rnn_tanh_cell", "rnn_relu_cell")

    put(Op("matmul", Category.MATMUL), "matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "__imatmul__")
    put(Op("addmm", Category.MATMUL), "addmm", "addmm_")
    put(Op("baddbmm", Category.MATMUL), "baddbmm", "baddbmm_", "addbmm", "addbmm_")
    put(Op("einsum", Category.MATMUL), "einsum")
    put(Op("scaled_dot_product_attention", Category.MATMUL), "scaled_dot_product_attention")

    for kind in ("add", "sub", "mul"):
        put(Op(kind, Category.COMPUTE), *_spellings(kind))
    put(Op("sub", Category.COMPUTE), "rsub", "subtract", "subtract_")
    put(Op("mul", Category.COMPUTE), "multiply", "multiply_")
    put(Op("div", Category.COMPUTE), "div", "div_", "true_divide", "__truediv__", "__rtruediv__", "__itruediv__", "__rdiv__", "divide")
    put(Op("concat", Category.COMPUTE), "cat", "concat", "concatenate", "hstack", "vstack", "dstack")
    put(Op("stack", Category.COMPUTE), "stack")
    put(Op("setitem", Category.COMPUTE), "__setitem__")
    put(Op("mean", Category.COMPUTE), "mean")
    put(
        Op("interpolate", Category.COMPUTE),
        "interpolate",
        "upsample",
        "upsample_nearest",
        "upsample_bilinear",
        *(f"upsample_{mode}" for mode in _UPSAMPLE),
    )
    for kind in ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", "normalize"):
        put(Op(kind, Category.COMPUTE), kind)
    for kind in (
        "sigmoid",
        "tanh",
        "hardsigmoid",
        "hardswish",
        "leaky_relu",
        "silu",
        "gelu",
        "elu",
        "celu",
        "selu",
        "prelu",
        "mish",
        "softplus",
    ):
        put(Op(kind, Category.COMPUTE), kind, f"{kind}_")
    put(Op("softmax", Category.COMPUTE), "softmax", "_softmax")
    put(Op("log_softmax", Category.COMPUTE), "log_softmax", "_log_softmax")

    put(Op("relu", Category.CLAMP), "relu", "relu_")
    put(Op("relu6", Category.CLAMP), "relu6")
    put(Op("hardtanh", Category.CLAMP), "hardtanh", "hardtanh_")
    put(Op("clamp", Category.CLAMP), "clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_")

    for kind in (
        "flatten", "permute", "squeeze", "unsqueeze", "expand", "repeat", "split", "chunk", "unbind", "tensor_split", "narrow", "select",
        "index_select", "gather", "flip", "roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "movedim",
        "repeat_interleave", "take_along_dim", "pad",
    ):  # fmt: skip
        put(Op(kind, Category.PRESERVE), kind)
    put(Op("squeeze", Category.PRESERVE), "squeeze_")
    put(Op("unsqueeze", Category.PRESERVE), "unsqueeze_")
    put(Op("expand", Category.PRESERVE), "expand_as", "broadcast_to")
    put(Op("repeat", Category.PRESERVE), "tile")
    put(Op("movedim", Category.PRESERVE), "moveaxis")
    put(Op("chunk", Category.PRESERVE), "hsplit", "vsplit", "dsplit")
    put(Op("split", Category.PRESERVE), "split_with_sizes")
    put(Op("reshape", Category.PRESERVE), "reshape", "view", "_unsafe_view", "view_as", "reshape_as", "unflatten", "ravel")
    put(Op("transpose", Category.PRESERVE), "transpose", "transpose_", "t", "swapaxes", "swapdims", "adjoint")
    put(Op("slice", Category.PRESERVE), "__getitem__", "slice")

    put(Op("alias", Category.ALIAS), "contiguous", "detach", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as", "cpu", "cuda", "alias",
        "requires_grad_", "__get__", "as_subclass", "_to_copy", "lift_fresh", "lift_fresh_copy", "__deepcopy__", "view_as_real", "positive", "__pos__",
        "data_ptr", "retain_grad", "result_type")  # fmt: skip

    put(Op("dropout", Category.IDENTITY), "dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_",
        "feature_alpha_dropout", "feature_alpha_dropout_", "native_dropout")  # fmt: skip
    return table


OPS: dict[str, Op] = _table()
"""Operation by the name of the torch function."""

RANDOM = frozenset({
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "normal_", "uniform_", "random_", "exponential_",
    "geometric_", "cauchy_", "log_normal_", "bernoulli", "bernoulli_", "poisson", "multinomial",
})  # fmt: skip
"""Functions that draw random numbers."""

READS_OUT = frozenset({"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__dlpack__"})
"""Functions that hand the values of a tensor over to Python."""

READS_VALUES = READS_OUT | {"__bool__", "__index__", "__complex__", "equal", "allclose", "is_nonzero", "__contains__"}
"""Functions that return no tensor, but what depends on a tensor's values."""

MAKES_OF_DATA = frozenset({"tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor", "full", "new_full", "full_like"})
"""Functions that make a tensor of values that Python has."""

_KINDS: dict[str, Op] = {op.kind: op for op in OPS.values()}


def is_known_kind(kind: str) -> bool:
    """Whether the table has operations of that kind."""
    return kind in _KINDS


def operation_of_kind(kind: str) -> Op:
    """Look an operation up by a layer's kind; an unknown one computes in float."""
    return _KINDS.get(kind) or Op(kind, Category.COMPUTE)


def operation(function_name: str) -> Op:
    """Look an operation up by its torch function's name; an unknown one computes in float under its own name.

    >>> operation("conv2d").kind, operation("__iadd__").kind, operation("cumsum_").kind
    ('conv', 'add', 'cumsum')
    """
    known = OPS.get(function_name)
    return known if known is not None else Op(function_name.strip("_") or function_name, Category.COMPUTE)
