"""Functions of frozen weights, computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["of_weight"]

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def of_weight(weight: Tensor, key: Any, make: Callable[[Tensor], Any]) -> Any:
    """``make(weight)``; kept for a weight that takes no gradient, until it changes.

    Scaling weights instead of features is cheap for large batches, but in a simulation of a small molecule it is a good
    part of a step.
    """
    if weight.requires_grad:
        return make(weight)
    state = (weight._version, weight.data_ptr(), weight.dtype)
    entries = _KNOWN.setdefault(weight, {})
    known = entries.get(key)
    if known is None or known[0] != state:
        known = entries[key] = (state, make(weight))
    return known[1]
