"""Number of atoms of every system of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["keep_layout", "sizes_of"]

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sizes_of(system: Tensor, num_systems: int) -> tuple[int, ...]:
    """From the index ``[N]`` of each atom's system, ascending."""
    known: tuple[int, ...] | None = _KNOWN.get(system)
    return known or tuple(torch.bincount(system, minlength=num_systems).tolist())


def keep_layout(system: Tensor, counts: tuple[int, ...]) -> None:
    """Say how many atoms each system has, so that a GPU need not be asked; kept as long as ``system [N]`` lives."""
    _KNOWN[system] = counts
