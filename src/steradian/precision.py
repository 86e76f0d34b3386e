"""Which dtype each role of a model uses. Modules ask for a role; nothing changes PyTorch's global dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["POLICIES", "PrecisionPolicy"]


@dataclass(frozen=True)
class PrecisionPolicy:
    """A dtype per role.

    Attributes:
        geometry: positions (centred per system before the cast), edge vectors, distances.
        compute: parameters, features, messages and their sums.
        energy: sum over atoms and reference energies. Totals of -20 000 eV keep only 2 meV in float32.
    """

    geometry: torch.dtype
    compute: torch.dtype
    energy: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if self.geometry.itemsize < 4:
            raise ValueError(f"geometry needs at least float32, got {self.geometry}")


POLICIES = {
    "float32": PrecisionPolicy(torch.float32, torch.float32),
    "float64": PrecisionPolicy(torch.float64, torch.float64),
}
