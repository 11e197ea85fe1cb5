"""The weights, biases and constants of a model as a file stores them, collected from one ordinary forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.export.engine_patterns import adds_products_exactly, blocked_convolution, bound_of, has_matrix_units, shortened
from lightning_cco.export.engines import ENGINES, Engine, FileFeature
from lightning_cco.export.fold_batch_norm import Affine, BatchNorm, IntegerWeight, affine_of, integer_weight, norm_weight
from lightning_cco.export.weight_blocks import Block, blocks_of
from lightning_cco.graph.captured import CallSite
from lightning_cco.graph.ops import Category, Op
from lightning_cco.quantization.call_arguments import at
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.targets import TARGETS
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.weight_groups import fitting_groups

UNSIGNED = (128, torch.uint8)
_FINER_FOR_FLOATS = 4096
_MOST_IN_16_BITS = (2**15 - 1) // (2 * 255)
_FINE = 5000
"""Of so many steps in the largest product half a one is 1e-4 of it: a tenth of what the check allows for an output."""


def _is_multiplied(op: Op) -> bool:
    """Whether weights of such an operation are multiplied with activations of 8 bits."""
    return op.biased or (op.category is Category.MATMUL and op.mask is None)


def _overflows(weight: IntegerWeight) -> bool:
    """Whether two products with activations of 8 bits can be more than 16 bits hold."""
    return int(weight.integers.abs().max()) > _MOST_IN_16_BITS if weight.integers.numel() else False


class StoredWeights:
    """What a file holds of the layers, as its engine runs them fastest.

    Args:
        quantized: The calibrated model.
        int4: Whether weights of at most 4 bits will be packed, which a zero point other than 0 or an unsigned type would hinder.
        engine: What reads the file, if not the engine that decided the plan.

    Attributes:
        target: What decided the plan.
        engine: The engine, and what it requires of the file.
        int4: Whether weights of at most 4 bits are packed.
        weights: Integer weights by layer.
        blocks: Weights in groups by layer, in the forms of files.
        biases: Bias by layer, and its scale if it is stored as integers.
        rests: By layer with a float result what its bias is beside those integers, where that would be seen.
        operands: Constants of layers without weights: integers, or the scale of what is computed from a parameter.
        blocked: Convolutions on blocks of pixels (`engine_patterns.blocked_convolution`): weight, and zeros around the image.
        for_matrix_units: Convolutions that the engine computes on a processor's matrix units.
        operand_format: Zero point and type of operands: those of activations, since engines add two tensors of one type only.
        folded: What went into the weights before it, by layer: batch norms, constants of channels.
        bounds: ``max_norm`` and ``norm_type`` of embeddings that have them.
        tables: Tables of embeddings with ``max_norm`` that stay in float, with all rows shortened.
        unsigned: Whether weights whose products with activations could overflow 16 bits are stored as uint8.
    """

    def __init__(self, quantized: HookedModel, int4: bool = False, engine: Engine | None = None) -> None:
        deployment = quantized.settings.deployment_settings
        self.int4 = int4
        self.quantized, self.target = quantized, TARGETS[deployment.target_framework]
        self.engine = engine or ENGINES[deployment.target_framework]
        self.weights: dict[str, list[IntegerWeight]] = {}
        self.biases: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.rests: dict[str, Tensor] = {}
        self.operands: dict[str, list[IntegerWeight | Tensor]] = {}
        self.blocked: dict[str, tuple[IntegerWeight, tuple[int, int, int, int]]] = {}
        self.for_matrix_units: list[str] = []
        self.operand_format = (
            (0, torch.int8) if int4 or self.target.symmetric_activations or self.engine.requires(FileFeature.SIGNED) else UNSIGNED
        )
        self.folded: dict[str, Affine] = {}
        self._waiting: dict[str, tuple[CallSite, tuple[Any, ...], dict[str, Any]]] = {}
        self._after: dict[str, dict[str, Affine]] = {}
        self.bounds: dict[str, tuple[float, float]] = {}
        self.tables: dict[str, Tensor] = {}
        amx = has_matrix_units() if deployment.amx is None else deployment.amx
        self._uses_matrix_units = self.engine.requires(FileFeature.MATRIX_UNITS) and amx and not int4
        exact = adds_products_exactly() if deployment.vnni is None else deployment.vnni
        self.blocks: dict[str, Block] = {}
        self.unsigned = self.engine.requires(FileFeature.UNSIGNED_WITHOUT_VNNI) and not exact

    def collect(self, site: CallSite, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the weights that a layer is called with (parametrized, sliced, tied), and call it."""
        plan = self.quantized.plan
        head, follows = plan.folded.get(site.layer, site.layer), plan.folded_after(site.layer)
        if head != site.layer and head in self._waiting:
            self._after[head][site.layer] = affine_of(site, args, kwargs)
            if not follows:
                self._take(*self._waiting.pop(head), self._after.pop(head))
        elif follows:
            self._waiting[site.layer] = site, args, kwargs  # its weights take in what those will be called with
            self._after[site.layer] = {}
        else:
            self._take(site, args, kwargs)
        return func(*args, **kwargs)

    def _take(self, site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any], after: dict[str, Affine] | None = None) -> None:
        """Take the weights of a call, with what is computed after it folded in."""
        bound = bound_of(args, kwargs) if site.op.looks_up and site.weights else None
        if bound is not None:
            self.bounds[site.layer] = bound
        if site.layer in self.quantized.weights:
            found = [at(args, kwargs, weight.slot) for weight in site.weights]
            if bound is not None:
                found[0] = shortened(found[0], *bound)
            if site.op.category in (Category.WEIGHTED, Category.MATMUL):
                self._take_products(site, found, args, kwargs, after or {})
            else:
                self.operands[site.layer] = [self._operand(site.layer, tensor, i) for i, tensor in enumerate(found)]
        elif bound is not None:
            self.tables[site.layer] = shortened(at(args, kwargs, site.weights[0].slot), *bound)
        elif site.op.kind == "batch_norm" and site.layer in self.quantized.plan.quantized and site.layer not in self.folded:
            weight = norm_weight(BatchNorm.of_call(args, kwargs))
            assert weight.bias is not None
            bias = weight.bias
            weight = self._with_room_for_bias(site, weight, bias)
            self.weights[site.layer] = [weight]
            self.biases[site.layer] = self._bias(site, bias, weight, args[0].dim())

    def _take_products(
        self, site: CallSite, found: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], after: dict[str, Affine]
    ) -> None:
        """Take the weights that a call multiplies by, and its bias."""
        bias = self._bias_of(site, found[0], args, kwargs)
        if site.layer in self.quantized.corrections:
            bias = self.quantized.corrections[site.layer](bias, found[0])
        weights = [integer_weight(self.quantized, site.layer, tensor, bias, i, after) for i, tensor in enumerate(found)]
        self.weights[site.layer] = weights
        self.folded.update({name: after[name] for name in weights[0].folded})
        if weights[0].bias is not None:
            weights[0] = self._on_a_finer_grid(site, weights[0])
            weights[0] = self._with_room_for_bias(site, weights[0], weights[0].bias)
            self.biases[site.layer] = self._bias(site, weights[0].bias, weights[0], (args[0] if args else kwargs["input"]).dim())
        if site.op.kind == "conv":
            weights[0] = self._convolution(site, weights[0], args, kwargs)
        if self.unsigned and _is_multiplied(site.op) and not self._alone_on_floats(site):
            self._store_unsigned(site, weights)

    def _bias_of(self, site: CallSite, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The constant that a call adds to each output channel; `None`: it adds none, or one that the forward makes."""
        if site.op.biased:
            made = self.quantized.graph[site.layer].attributes.get("made_bias")
            return None if made else args[2] if len(args) > 2 else kwargs.get("bias")
        addend = args[0] if args else kwargs.get("input")
        if site.op.kind != "addmm" or site.in_place or len(site.sources) > 1 or len(site.weights) > 1 or addend is None:
            return None
        scaled = kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1
        return None if scaled or site.weights[0].slot not in ((2,), ("mat2",)) or addend.shape != weight.shape[1:] else addend

    def _store_unsigned(self, site: CallSite, weights: list[IntegerWeight]) -> None:
        """Let weights that could overflow have the type of the activations, which engines multiply in 32 bits."""
        shapes = self.quantized.graph[site.layer].input_shapes
        depthwise = site.op.kind == "conv" and weights[0].integers.shape[1] == 1 and shapes[0][1:2] != (1,)  # one product at a time
        for number, weight in enumerate(weights):
            if weight.zero_point == 0 and _overflows(weight) and not depthwise:
                weights[number] = weight.shifted(*UNSIGNED)
        if site.layer in self.blocked:
            weight, pads = self.blocked[site.layer]
            self.blocked[site.layer] = (weight.shifted(*UNSIGNED) if _overflows(weight) else weight), pads

    def _alone_on_floats(self, site: CallSite) -> bool:
        """Whether a layer's weights alone are integers, and what it reads is not rounded: then no sum of products of integers overflows."""
        return site.layer in self.quantized.plan.weight_only and (
            self.weights[site.layer][0].group is not None or not site.sources or self.quantizer_of(site) is None
        )

    def make_blocks(self) -> None:
        """Make what files hold of weights in groups, once all are collected: while somebody traces, it would become a part of the file's computation."""
        graph, sites = self.quantized.graph, self.quantized.capture.sites
        lookups = {name for name in self.weights if graph[name].kind in ("embedding", "embedding_bag")}
        behind_rounding = {name for name in self.weights if sites[name].sources and self.quantizer_of(sites[name]) is not None}
        dynamic = self.quantized.plan.dynamic & set(self.weights)
        own = lookups | behind_rounding | dynamic if self.engine.requires(FileFeature.BLOCK_OPERATORS) else None
        # One scale for each channel is the same for each of its groups, if something needs the form of groups.
        sizes = {name: fitting_groups(graph[name])[-1:] for name in self.quantized.plan.weight_only if name in self.weights}
        self.blocks = blocks_of(self.weights, lookups, own, {name: size[0] for name, size in sizes.items() if size}, dynamic)

    @property
    def overflows_without_vnni(self) -> bool:
        """Whether the engine's sums could overflow on processors without VNNI."""
        products = (
            stored
            for name, stored in self.weights.items()
            if self.quantized.graph[name].kind != "embedding" and not self._alone_on_floats(self.quantized.capture.sites[name])
        )
        weights = (weight for stored in products for weight in stored)
        return self.target.narrow_without_vnni and any(map(_overflows, weights))

    def quantizer_of(self, site: CallSite) -> TensorKey | None:
        """Name of the quantizer that a layer's first input went through last, seen through layers that only move values."""
        read = TensorKey(site.sources[0].layer, site.sources[0].output)
        key = self.quantized.plan.reads.get(site.layer, {}).get(0) or self.quantized.plan.origins.get(read, read)
        quantizer = self.quantized.activations.get(key)
        return key if quantizer is not None and not quantizer.empty else None

    def _operand(self, layer: str, tensor: Tensor, number: int) -> IntegerWeight | Tensor:
        """A parameter as integers; what is computed from one (a class token expanded to the batch) is rounded in the file, by this scale."""
        quantizer = self.quantized.weights[layer][number]
        if not isinstance(tensor, nn.Parameter):
            return quantizer.scale(tensor)
        integers, scale = quantizer.quantize(tensor)
        return IntegerWeight(integers, scale.reshape(()), None, None).shifted(*self.operand_format)

    def _is_packed(self, layer: str) -> bool:
        """Whether the file holds a layer's weights in 4 bits, so that the engine computes it in float."""
        return self.int4 and layer in self.quantized.weights and self.quantized.weights[layer][0].num_bits <= 4

    def _on_a_finer_grid(self, site: CallSite, weight: IntegerWeight) -> IntegerWeight:
        """The same values as multiples of a smaller scale, if they have few bits and are stored in 8.

        A bias is rounded to the input's scale times the weight's: at 2 bits for both that is half a step of the output. Up to 64 no two products with
        activations of 8 bits overflow 16 bits.
        """
        largest = int(weight.integers.abs().max()) if weight.integers.numel() else 0
        factor = (_MOST_IN_16_BITS // largest) if largest else 1
        if factor < 2 or self._is_packed(site.layer) or weight.group is not None or not self.engine.requires(FileFeature.INTEGER_BIAS):
            return weight
        return replace(weight, integers=(weight.integers.to(torch.int16) * factor).to(torch.int8), scale=weight.scale / factor)

    def _with_room_for_bias(self, site: CallSite, weight: IntegerWeight, bias: Tensor) -> IntegerWeight:
        """The weight, on a coarser grid in channels whose bias would not fit into 32 bits of the accumulator.

        Those are channels of weights that are all but 0 beside their bias (a pruned one): by the input's scale times theirs a bias would be cut off.
        """
        key = self.quantizer_of(site)
        weight_only = site.layer in self.quantized.plan.weight_only
        if key is None or weight_only or (weight.scale.dim() and bias.numel() % weight.scale.numel()):
            return weight
        needed = bias.abs() / (self.quantized.activations[key].scale.detach() * 2.0**30)
        if weight.scale.dim():
            needed = needed.reshape(-1, weight.scale.numel()).amax(0)  # the groups of a transposed convolution share their scales
        scale = torch.maximum(weight.scale, needed if weight.scale.dim() else needed.amax())
        if torch.equal(scale, weight.scale):
            return weight
        shape = [1] * weight.integers.dim()
        if weight.axis is not None:
            shape[weight.axis] = -1
        integers = (weight.integers * (weight.scale / scale).reshape(shape)).round().to(torch.int8)
        return replace(weight, integers=integers, scale=scale)

    def _bias(self, site: CallSite, bias: Tensor, weight: IntegerWeight, dimensions: int) -> tuple[Tensor, Tensor | None]:
        """The bias on the grid of the accumulator, whose step is that of the input times that of the weight.

        In float if the input or the layer is, if the engine wants it so, or if it is added to a product of more than two dimensions that is not rounded.
        Beside packed weights, with which the engine computes in float, on a finer grid: a float bias it would itself round to the coarse one.
        Of few bits the grid is coarse: beside a result that is rounded to few bits too that is little, but one in float shows it, so it gets the rest added.
        """
        key = self.quantizer_of(site)
        in_float = site.op.kind == "linear" and dimensions > 2 and not self.quantized.plan.rounds(site.layer)
        if key is None or in_float or site.layer in self.quantized.plan.weight_only or not self.engine.requires(FileFeature.INTEGER_BIAS):
            return bias, None
        repeated = weight.scale.repeat(bias.numel() // weight.scale.numel()) if weight.scale.dim() else weight.scale
        quantizer = self.quantized.activations[key]
        scale = quantizer.scale.detach() * repeated
        if self._is_packed(site.layer):
            scale = torch.maximum(scale / _FINER_FOR_FLOATS, bias.abs() / 2.0**30)
        integers = (bias / scale).round().clamp(-(2.0**31) + 128, 2.0**31 - 128).to(torch.int32)
        steps = (2**quantizer.num_bits - 1) * (int(weight.integers.abs().max()) if weight.integers.numel() else 0)
        if (
            steps < _FINE
            and not self._is_packed(site.layer)
            and not self.quantized.plan.rounds(self.quantized.plan.end_of_group(site.layer))
        ):
            self.rests[site.layer] = bias - integers * scale
        return integers, scale

    def _convolution(self, site: CallSite, weight: IntegerWeight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> IntegerWeight:
        """A convolution's weight; on blocks of pixels for what reads the image, for matrix units if it is deep enough."""
        names = ("stride", "padding", "dilation", "groups")
        call = dict(zip(names, (1, 0, 1, 1), strict=True)) | dict(zip(names, args[3:], strict=False))
        call |= {name: value for name, value in kwargs.items() if name in names}
        if self._reads_input(site):
            form = blocked_convolution(weight.integers, tuple(args[0].shape[2:]), call, self.engine.amount(FileFeature.CHANNEL_MULTIPLE, 1))
            if form is not None:
                self.blocked[site.layer] = replace(weight, integers=form.weight), form.pads
                return weight
        shallow = weight.integers[0].numel() < self.engine.amount(FileFeature.MATRIX_UNITS, 1)
        if not self._uses_matrix_units or shallow or call["groups"] != 1 or int(weight.integers.min()) == -128:
            return weight
        self.for_matrix_units.append(site.layer)
        # The engine's convolution kernel takes symmetric weights only, so any other zero point sends it to the matrix product.
        return weight.shifted(-1, torch.int8)

    def _reads_input(self, site: CallSite) -> bool:
        """Whether a layer rounds what it reads by itself."""
        return 0 in self.quantized.plan.reads.get(site.layer, {})
