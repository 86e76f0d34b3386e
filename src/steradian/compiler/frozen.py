"""Functions of frozen weights, computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steradian.compiler.capture import tracing

__all__ = ["of_weight", "of_weights"]

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def of_weight(weight: Tensor, key: Any, make: Callable[[Tensor], Any]) -> Any:
    """``make(weight)``; kept for a weight that takes no gradient, until it changes.

    Scaling weights instead of features is cheap for large batches, but in a simulation of a small molecule it is a good
    part of a step.
    """
    if weight.requires_grad or tracing():
        return make(weight)
    state = (weight._version, weight.data_ptr(), weight.dtype)
    entries = _KNOWN.setdefault(weight, {})
    known = entries.get(key)
    if known is None or known[0] != state:
        known = entries[key] = (state, make(weight))
    return known[1]


def of_weights(weights: Sequence[Tensor], key: Any, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, a function of several weights; kept while none of them takes a gradient or changes."""
    if tracing() or any(weight.requires_grad for weight in weights):
        return make()
    state = tuple((weight._version, weight.data_ptr(), weight.dtype) for weight in weights)
    entries = _KNOWN.setdefault(weights[0], {})
    known = entries.get(key)
    if known is None or known[0] != state:
        known = entries[key] = (state, make())
    return known[1]
