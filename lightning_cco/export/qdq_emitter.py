"""Runs the model once more, for an exporter: where fake-quantization would be, quantize and dequantize operators are written down."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.export.dialects import Dialect
from lightning_cco.export.embedding_bags import bag_arguments, is_bag, reduced
from lightning_cco.export.engine_patterns import averages_images, sorted_maximum
from lightning_cco.export.engine_spellings import as_engines_want
from lightning_cco.export.engines import FileFeature
from lightning_cco.export.errors import ExportError
from lightning_cco.export.failures import untraceable
from lightning_cco.export.fold_batch_norm import IntegerWeight
from lightning_cco.export.pooling_as_convolution import averaged, window_weight
from lightning_cco.export.provenance import noting
from lightning_cco.export.qdq_pairs import QdqPairs
from lightning_cco.export.stored_tensors import StoredWeights
from lightning_cco.export.weight_blocks import Block
from lightning_cco.graph.call_node import CallNode, ModuleCall
from lightning_cco.graph.captured import CallSite
from lightning_cco.graph.compiled import mode_stack, restore_modes
from lightning_cco.graph.loop_calls import number_of
from lightning_cco.graph.ops import Category, operation
from lightning_cco.graph.python_calls import calling_position
from lightning_cco.names import list_names
from lightning_cco.quantization.call_arguments import at
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.tensor_key import TensorKey

_POOLS = ("avg_pool", "adaptive_avg_pool")


class Emitter:
    """Writes a quantized model's operators while an exporter traces its forward.

    Args:
        quantized: The calibrated model.
        stored: Its weights.
        dialect: The operators of the file.

    Attributes:
        pairs: Writes what is around a layer.
        order: Quantizer name of each quantize operator, in the order written.
        modules: Module path of each node of the file, by the node's name.
        layers: Layer of each node of the file that belongs to one, by the node's name.
        reached: The last layer that a forward came to.
        model: The forward that is written.
        ran: Captured layers that the forward came to.
        bounds: Of the axes of the inputs, the sizes that the trace holds for, where the user has said which vary; else empty.
        look: Called with each layer's name and arguments before it is written; may refuse it.
    """

    def __init__(self, quantized: HookedModel, stored: StoredWeights, dialect: Dialect) -> None:
        self.quantized, self.stored, self.dialect = quantized, stored, dialect
        self.pairs = QdqPairs(quantized, stored, dialect)
        self.order = self.pairs.order
        self.reached = ""
        self.look: Callable[[str, Sequence[Any]], None] | None = None
        self.modules: dict[str, str] = {}
        self.layers: dict[str, str] = {}
        self.model: nn.Module = quantized.model
        self.bounds: Sequence[Sequence[tuple[int, int]]] = ()
        self.ran: set[str] = set()
        self._others = False
        self._norms: dict[str, IntegerWeight] = {}
        self._windows: dict[str, IntegerWeight] = {}
        self._known: dict[tuple[CallNode, str], tuple[Mapping[int, int], frozenset[int]]] = {}
        self._sites: dict[tuple[int, str, int], CallSite] = {
            (id(site.node), site.op.kind, site.positions[False]): site for site in quantized.capture.sites.values() if site.visible
        }

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the block an ordinary forward gives the weights as the layers see them."""
        with self._handling(self.stored.collect):
            try:
                yield
            except CCOError:
                raise
            except Exception as error:
                if not self.reached:
                    raise  # of the model's own
                raise ExportError(untraceable(self.quantized.model, f" at the weights of layer '{self.reached}'", error)) from error
        if (missing := self._missing()) and len(missing) == len(self._planned()):
            raise ExportError(
                f"the forward that is exported does not run {list_names(missing)} of the plan, nor any other layer of it with weights, so the file "
                "would compute in float. The model is not the one that was quantized: adapters were merged, modules replaced, or another part is called. "
                "Call .remove(), then quantize the changed model and calibrate it."
            )

    def warn_of_missing(self) -> None:
        """Say which planned layers with weights the forward did not run."""
        if missing := self._missing():
            warnings.warn(
                f"export: the forward that is exported does not run {list_names(missing)} of the plan. Layers that were not captured run instead, in "
                "float: the model was changed since, or is called in another way. Call .remove(), then quantize the changed model.",
                CCOWarning,
                stacklevel=2,
            )

    def _planned(self) -> list[str]:
        plan, sites = self.quantized.plan, self.quantized.capture.sites
        planned = plan.quantized | plan.weight_only
        return [layer.name for layer in self.quantized.graph if layer.weighted and layer.name in planned and sites[layer.name].visible]

    def _missing(self) -> list[str]:
        """Planned layers that did not run, where others did that nobody has captured; a forward may well leave a part out, such as a discriminator."""
        return [name for name in self._planned() if name not in self.ran] if self._others else []

    @contextmanager
    def emitting(self) -> Iterator[None]:
        """Inside the block a traced forward contains the operators."""
        self.stored.make_blocks()
        self.pairs.prepare()
        self._prepare()
        self.reached = ""  # by the forward that was not traced
        with self._handling(self._emit):
            yield

    def _prepare(self) -> None:
        """Make what is constant: while somebody traces, it would become a part of the file's computation."""
        stored, graph = self.stored, self.quantized.graph
        self._norms = {
            name: replace(weight, integers=weight.integers.reshape(*weight.integers.shape, *[1] * (len(graph[name].input_shapes[0]) - 2)))
            for name, (weight, *_) in stored.weights.items()
            if graph[name].kind == "batch_norm"
        }
        if stored.engine.requires(FileFeature.POOLS_AS_CONVOLUTIONS):
            found = {name: window_weight(graph[name]) for name in self.quantized.plan.quantized if graph[name].kind in _POOLS}
            self._windows = {name: weight for name, weight in found.items() if weight is not None}
        operands = (weight for entries in stored.operands.values() for weight in entries if isinstance(weight, IntegerWeight))
        weights = (weight for entries in stored.weights.values() for weight in entries)
        self.dialect.prepare(
            [*weights, *operands, *self._norms.values(), *self._windows.values(), *(weight for weight, _ in stored.blocked.values())]
        )

    @contextmanager
    def _handling(self, handle: Callable[..., Any]) -> Iterator[None]:
        frames = self.quantized.runtime.frames

        def find(frame: ModuleCall, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            op = operation(name)
            site = self._site(frame, op.kind)
            if site is None:
                self._others = self._others or op.category is Category.WEIGHTED
                return func(*args, **kwargs)
            self.reached = site.layer
            self.ran.add(site.layer)
            with noting(site.layer):
                return handle(site, func, args, kwargs)

        modes = mode_stack()
        try:
            with frames.handled_by(find):
                yield
        finally:
            # A trace that fails skips the hooks of the modules it was in; torch.export then takes our mode off for its own and leaves that behind.
            frames.reset()
            restore_modes(modes)

    def _site(self, frame: ModuleCall, kind: str) -> CallSite | None:
        """The captured call that one of the forward is; `None`: a trace can take branches of its own, such as one that adds a mask."""
        if (frame.node, kind) not in self._known:
            loop = frame.node.numbers.get(kind)
            self._known[frame.node, kind] = frame.node.known(kind, False), frozenset() if loop is None else loop.onward()
        number = number_of(*self._known[frame.node, kind], frame.counts.get(kind, 0), calling_position())
        if number is None:
            return None
        frame.counts[kind] = number + 1
        return self._sites.get((id(frame.node), kind, number))

    def _emit(self, site: CallSite, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = len(self.order)
        result = self._written(site, func, args, kwargs)
        self.pairs.refuse_unrounded(site, self.order[before:])
        return result

    def _written(self, site: CallSite, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = site.layer
        if self.look is not None:
            self.look(name, args)
        if name in self.stored.folded:
            return self.pairs.with_outputs(site, args, at(args, kwargs, site.sources[0].slot))
        if name in self.stored.blocked and all(isinstance(size, int) for size in args[0].shape[2:]):
            return self.pairs.with_outputs(site, args, self._convolve_blocks(site, args[0]))
        args, kwargs = self.pairs.with_inputs(site, args, kwargs)
        if site.op.looks_up:
            args, kwargs = self.pairs.with_table(site, args, kwargs)
        own = self._in_own_operators(site, args, kwargs)
        if own is not None:
            return self.pairs.with_outputs(site, args, own)
        args, kwargs = self.pairs.with_weights(site, args, kwargs)
        on_rows = self.dialect.products_on_rows and site.op.kind == "linear" and self.quantized.plan.rounds(name)
        if on_rows and args and args[0].dim() > 2:
            return self._linear(name, func, args, kwargs)
        limits = self.pairs.folded_clamp(site, args, kwargs)
        if limits is not None:
            return self.pairs.with_outputs(site, args, args[0] if args else kwargs["input"], limits)
        result = as_engines_want(site, func, kwargs, self.quantized, self.stored)(*args, **kwargs)
        if name in self.stored.rests:
            result = result + self.stored.rests[name]
        if averages_images(site.op.kind, args, kwargs):
            return self._average(name, args[0], result)
        return self.pairs.with_outputs(site, args, result)

    def _in_own_operators(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a layer whose function is written with operators of its own; `None` of one whose function gets its stored weights."""
        kind, stored, block = site.op.kind, self.stored.weights.get(site.layer), self.stored.blocks.get(site.layer)
        if site.layer in self._windows:
            x, weight = args[0] if args else kwargs["input"], self._windows[site.layer]
            return averaged(x, self.dialect.weight(weight, None), self.quantized.graph[site.layer])
        if kind == "batch_norm" and stored is not None:
            return self._scale_channels(site, args[0] if args else kwargs["input"])
        if kind == "embedding" and stored is not None:
            return self._embedding(stored[0], args, kwargs, block)
        if kind == "embedding_bag" and is_bag(bag_arguments(args, kwargs)):
            return self._bags(site, bag_arguments(args, kwargs))
        result = None if block is None else self._block_product(site, block, args, kwargs)
        if result is None and site.layer in self.quantized.plan.dynamic:
            raise ExportError(
                f"layer '{site.layer}' rounds what it reads when it runs (activations_dynamic), for which this file has no operator where it is called "
                f"as {site.function}. Write activations_dynamic: false for it, call it as linear(x, weight), matmul(x, weight) or addmm(bias, x, weight), or "
                "export an .onnx file."
            )
        return result

    def _linear(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A linear layer on rows: engines fuse weight, bias and rounding of a matrix product, not of a product of more dimensions."""
        x = args[0]
        rows = self.pairs.round(func(x.reshape(-1, x.shape[-1]), *args[1:], **kwargs), TensorKey(name))
        return rows.reshape(-1, *x.shape[1:-1], rows.shape[-1])

    def _block_product(self, site: CallSite, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """A product with weights in groups, in the form that engines multiply; `None`: the call itself is, with a matrix of weights."""
        if site.op.kind == "linear":
            call = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            x, bias = call["input"], call.get("bias")
        elif site.op.kind == "addmm" and block.packed is not None and len(args) == 3 and not kwargs:
            bias, x = args[:2]
        elif site.op.kind == "matmul" and block.packed is not None and len(args) == 2:
            x, bias = args[0], None
        else:
            return None
        if site.layer in self.quantized.corrections:
            bias = self.pairs.bias_value(site)
        result = self.dialect.product(x if x.dim() > 1 else x[None], block)
        if result is None:
            return None
        result = result if x.dim() > 1 else result[0]
        return result if bias is None else result + bias

    def _average(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """The average of each channel, rounded as engines do it: before the shape changes."""
        pooled = self.dialect.average(x)
        if self.quantized.plan.rounds(name):
            pooled = self.pairs.round(pooled, TensorKey(name))
        return pooled if result.dim() == 4 else pooled.flatten(1)

    def _convolve_blocks(self, site: CallSite, x: Tensor) -> Tensor:
        """A first convolution on blocks of pixels."""
        weight, pads = self.stored.blocked[site.layer]
        blocks = self.pairs.round(self.dialect.pixel_blocks(x), self.quantized.plan.reads[site.layer][0])
        bias = self.pairs.bias_value(site) if site.layer in self.stored.biases else None
        return self.dialect.convolution(blocks, self.dialect.weight(weight, None), bias, 1, pads)

    def _scale_channels(self, site: CallSite, x: Tensor) -> Tensor:
        """A batch norm that is folded into no layer, as a convolution of each channel with one number."""
        weight = self.dialect.weight(self._norms[site.layer], None)
        return self.dialect.convolution(x, weight, self.pairs.bias_value(site), x.shape[1], None)

    def _embedding(self, weight: IntegerWeight, args: tuple[Any, ...], kwargs: dict[str, Any], block: Block | None) -> Tensor:
        """Look integers up, then scale: dequantizing the whole table first would cost its float size again."""
        indices = args[0] if args else kwargs["input"]
        if block is not None:
            return self.dialect.rows(block, indices)
        scale = weight.scale.reshape(-1, 1) if weight.scale.dim() else weight.scale.expand(weight.integers.shape[0], 1)
        return F.embedding(indices, weight.integers).to(torch.float32) * F.embedding(indices, scale)

    def _bags(self, site: CallSite, call: dict[str, Any]) -> Tensor:
        """Look the rows of all bags up, then reduce them."""
        stored = self.stored.weights.get(site.layer)
        rows = (
            self._embedding(stored[0], (call["input"],), {}, self.stored.blocks.get(site.layer))
            if stored
            else F.embedding(call["input"], call["weight"])
        )
        return reduced(rows, call, sorted_maximum if self.stored.engine.requires(FileFeature.SORTED_MAXIMA) else torch.amax)
