"""What an entry of the table of engines consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightning_cco.export.check_limits import Limits


class FileFeature(Enum):
    """What an engine can require of a file, since it computes wrongly, in float or slowly without it. What it computes in INT8 is in `quantization.targets`."""

    CHANNEL_MULTIPLE = (
        "a first convolution of stride 2 on blocks of 2 × 2 pixels (space to depth), whose input channels are a multiple of the amount"
    )
    MATRIX_UNITS = "on processors with AMX, convolutions of at least the amount of products per output with a zero point of their own"
    INTEGER_BIAS = "biases as integers on the grid of the accumulator"
    INTEGER_INDEXING = "operators that move values on integers, with the DequantizeLinear after them"
    INTEGER_CLIPS = "formats of fewer than 8 bits, and clamps before a rounding, as a Clip of integers after QuantizeLinear"
    OWN_ZERO_POINTS = "a constant of its own for the zero point of each weight"
    FULL_BIASES = "biases with as many dimensions as the product that they are added to, where its sizes are fixed"
    STORED_TRANSPOSED = "weights of products of more than two dimensions stored as the product reads them, without a Transpose"
    SPLIT_PRODUCTS = "products of their own for the parts that a linear layer's result is split into"
    UNSIGNED_WITHOUT_VNNI = "uint8 weights for x86 processors without VNNI"
    BLOCK_OPERATORS = (
        "as operators of its own: lookups of weights in groups, and products with those that others read, or that read a rounded tensor"
    )
    SIGNED = "int8 for what other engines take as uint8: rounded tensors, and constants that are added to them"
    JOINED = "what is concatenated rounded as the result is"
    FLOAT_WEIGHTS = "an operator that changes nothing between a layer in float and the rounding of its result"
    SEPARATE_ROUNDINGS = "an operator that changes nothing between a product and the rounding of its result, where others read it in float"
    SEPARATE_PAIRS = "an operator that changes nothing between two roundings one after the other"
    UNITS = "quantize and dequantize operators around each operator on rounded tensors, also around those that move or clamp values alone"
    RELU_AS_MAXIMUM = "a ReLU on floats after a product in integers as a Max with 0"
    SORTED_MAXIMA = "the largest values along axes as the first ones of a TopK"
    POOLS_AS_CONVOLUTIONS = "average pooling of windows as a convolution of each channel"
    COUNTED_SIZES = "sizes of tensors as the number of their values along an axis, not as the result of a Shape"
    OPSET = "an opset of at most the amount where activations are symmetric"


@dataclass(frozen=True)
class Requirement:
    """One feature that an engine requires of its files.

    Attributes:
        feature: The feature.
        versions: Versions of the engine that require it, as far as known: "1.20 to 1.32". The end is the newest version that was tried.
        seen: What the engine does without it, and where that was seen.
        canary: The test that fails once the engine no longer needs it (``tests/export/…::name``), or the benchmark that measures it; empty where the
            engine can't be run.
        amount: The number that belongs to some features.
    """

    feature: FileFeature
    versions: str
    seen: str
    canary: str
    amount: int = 1


@dataclass(frozen=True)
class Computed:
    """A node of the graph that an engine executes.

    Attributes:
        operator: What the engine calls it.
        precision: Type that it computes in, such as ``u8`` or ``f32``.
        product: Whether it multiplies and adds up: a convolution, a product of matrices, a recurrent layer.
        names: Nodes of the file that went into it.
        computes: Whether it is known to compute, and not to move or to convert values alone.
    """

    operator: str
    precision: str
    product: bool
    names: tuple[str, ...]
    computes: bool = False


class Loaded(Protocol):
    """A file in an engine."""

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs, in the file's order."""
        ...

    def computed(self) -> list[Computed]:
        """What the engine executes, in order."""
        ...


Load = Callable[[Path], Loaded]


@dataclass(frozen=True)
class Converted:
    """What an engine made of a program.

    Attributes:
        integer: How many operators of each kind compute on integers.
        floats: How many of each kind compute on floats.
        layers: Of each operator that computes, its name, its layer (empty: not known) and whether it computes on integers.
        conversions: How many operators quantize or dequantize between others.
        notes: What else is to be said.
        faults: By layer, what the file stores otherwise than the program has it; of an engine that can't be run.
    """

    integer: Mapping[str, int]
    floats: Mapping[str, int]
    layers: tuple[tuple[str, str, bool], ...]
    conversions: int
    notes: tuple[str, ...] = ()
    faults: Mapping[str, str] = field(default_factory=dict)


class Reader(Protocol):
    """An engine that reads programs, running."""

    def convert(self, program: Path, target: Path) -> Converted:
        """Write the engine's own file."""
        ...

    def run(self, path: Path, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The outputs of a file."""
        ...


@dataclass(frozen=True)
class Engine:
    """An engine, and what it requires of a file.

    Attributes:
        name: That of its `Target`.
        title: What it calls itself.
        requirements: The features that it requires of its files.
        load: Loads a file as its users do; `None` where it can't be run here, or is ONNX Runtime, in which every file is checked.
        package: What must be installed for that.
        ending: How the names of the files that it runs end.
        extra: The optional dependencies of lightning-cco that have the package.
        start: Starts it, where its files are made of programs (PT2E) instead of being ONNX files.
        plans: Targets whose plans it can compute, if not its own alone.
        rounds_as_it_runs: What to say of products with weights alone in integers, where it may round what they read; empty: nothing.
        fixed_sizes: Why sizes of images are fixed unless they are asked to vary; empty: they vary where the model lets them.
        fixed_batch: Why a file has no axis that varies, not even the batch; empty: it may.
        limits: What right files may differ by in it, if not what the check allows.
        strict: Whether a file must be run in it, and is refused if it computes a product in float that is planned in INT8; else both are said alone.
        remark: What to say of a file that was run in it.
        reads_alone: What to say of its files where they are read and not run; empty: they are run.
        not_run: What to say of files that it was not run on; empty: it was.
        takes_fp16: Whether it computes what is not in INT8 in the types of the file, so that files may have floats of 16 bits (``fp16=True``).
    """

    name: str
    title: str
    requirements: tuple[Requirement, ...]
    load: Load | None = None
    package: str = ""
    ending: str = ".onnx"
    extra: str = "export"
    start: Callable[[], Reader] | None = None
    plans: tuple[str, ...] = ()
    rounds_as_it_runs: str = ""
    fixed_sizes: str = ""
    fixed_batch: str = ""
    limits: Limits = field(default_factory=Limits)
    strict: bool = False
    remark: str = ""
    reads_alone: str = ""
    not_run: str = ""
    takes_fp16: bool = False

    def requires(self, feature: FileFeature) -> bool:
        """Whether its files need a feature."""
        return any(entry.feature is feature for entry in self.requirements)

    def amount(self, feature: FileFeature, otherwise: int) -> int:
        """The number that belongs to a feature; another where the engine does not require it."""
        return next((entry.amount for entry in self.requirements if entry.feature is feature), otherwise)
