"""Numbers that are computed once: functions of weights that are not trained, kept by the module that owns them, and
fixed constants as tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Folded",
    "constant",
]

Value = TypeVar("Value")


class Folded:
    """Values made from a module's weights, kept while these take no gradient and do not change.

    Scaling weights instead of features is cheap for large batches, but in a simulation of a small molecule it is a good
    part of a step. The object belongs to one module: copies of the module, and pickles of it, start with an empty one.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[tuple, list[Tensor], Any]] = {}

    def __call__(self, key: Hashable, make: Callable[[], Value], *weights: Tensor) -> Value:
        """``make()``, a function of these weights and of nothing else that changes.

        Args:
            key: tells apart what one module makes.
            make: called again after a weight was written to, moved or replaced; every time for weights that take a
                gradient, were made in inference mode (whose changes PyTorch does not count) or are traced.
            weights: all that ``make`` reads.
        """
        if any(weight.requires_grad or weight.is_inference() for weight in weights):
            return make()
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return make()
        state = tuple((w._version, w.data_ptr(), w.dtype, w.device, w.shape, w.stride()) for w in weights)
        known = self._known.get(key)
        if known is None or known[0] != state:
            # a tensor made in inference mode could not be part of a later derivative by the positions
            with torch.inference_mode(False), torch.no_grad():
                value = make()
            # the memory of the weights is kept too: no other weight can be put at the same address meanwhile
            known = self._known[key] = (state, [weight.detach() for weight in weights], value)
        found: Value = known[2]
        return found

    def __deepcopy__(self, memo: dict) -> Folded:
        return Folded()

    def __reduce__(self) -> tuple:
        return Folded, ()


# ------------------------------------------------------------------------------------------------------- fixed numbers


@cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor that nobody may change."""
    return torch.tensor(values, dtype=dtype, device=device)
