"""Fixed numbers as tensors, made once per format and device: making one copies from the host, and waits for a GPU."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["constant"]


@cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor that nobody may change."""
    return torch.tensor(values, dtype=dtype, device=device)
