"""Whether what a call gave goes on into a layer: its result is followed through the calls after it, as long as any tensor of it is alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_cco.graph.containers import tensors_in


class FollowedResults:
    """Tensors that are followed, each with the names of what they came from. Nothing here keeps a tensor alive.

    Example:
        >>> import torch
        >>> followed = FollowedResults()
        >>> x = torch.ones(3)
        >>> followed.start("relu", x)
        >>> y = x + 1
        >>> followed.passed_on("add", (x, 1), {}, y)
        >>> followed.sources([y])
        ['relu']
    """

    def __init__(self) -> None:
        self._alive: dict[int, tuple[weakref.ref[Tensor], frozenset[str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._alive)

    def start(self, source: str, result: Any) -> None:
        """Follow what a call gave, unless that is nothing but indices and masks, which nothing rounds (`torchvision.ops.nms`)."""
        if any(tensor.is_floating_point() or tensor.is_complex() for _, tensor in tensors_in(result)):
            self._add(result, frozenset((source,)))

    def sources(self, value: Any) -> list[str]:
        """What the tensors in a value came from."""
        return sorted(set().union(*(self._of(tensor) for _, tensor in tensors_in(value))))

    def passed_on(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Follow what a call has made of tensors that are followed, or has written into others."""
        found = frozenset(self.sources([args, kwargs]))
        if found:
            writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
            self._add([result, args[:1] if writes else (), kwargs.get("out")], found)

    def forget_numbers(self) -> None:
        """Forget single numbers, such as losses that are kept for a log."""
        for identity, (reference, _) in list(self._alive.items()):
            tensor = reference()
            if tensor is None or tensor.numel() == 1:
                self._alive.pop(identity, None)

    def _of(self, tensor: Tensor) -> Iterable[str]:
        reference, found = self._alive.get(id(tensor), (None, frozenset()))
        return found if reference is not None and reference() is tensor else ()

    def _add(self, value: Any, found: frozenset[str]) -> None:
        for _, tensor in tensors_in(value):
            identity = id(tensor)
            before = frozenset(self._of(tensor))
            self._alive[identity] = (weakref.ref(tensor, lambda _, gone=identity: self._drop(gone)), before | found)  # type: ignore[misc]

    def _drop(self, identity: int) -> None:
        reference, _ = self._alive.get(identity, (None, None))
        if reference is not None and reference() is None:
            del self._alive[identity]
