"""Steps that are recorded or traced: inside, nothing may ask the device for a number.

A recorded step (CUDA graph) is replayed on the same tensors with other contents, and a traced one becomes a graph of
fixed shapes. So inside :func:`static_step` shapes depend on shapes alone, what is known about the *contents* of an
index is not kept for the next call, and checks that would have to wait for a GPU are left to whoever prepared the
graph. The state belongs to the process, not to a thread: autograd runs derivatives in threads of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

__all__ = ["capturing", "constant", "static_step"]

_depth = 0


def capturing() -> bool:
    """Whether a step of fixed shapes is being run, recorded or traced."""
    return _depth > 0


@contextmanager
def static_step() -> Iterator[None]:
    """Inside the ``with`` block :func:`capturing` is true."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of fixed numbers, made once per format and device: making one waits for a GPU."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return _constant(values, dtype, device)


@cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
