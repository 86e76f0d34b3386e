"""Real spherical harmonics of unit vectors, "component" normalisation, as a polynomial in x, y, z."""

from __future__ import annotations

from functools import cache

import cuequivariance as cue
import numpy as np
import torch
from torch import Tensor

from steradian.polynomials import Operand, Polynomial, Terms, evaluate

__all__ = ["harmonics_polynomial", "spherical_harmonics", "unit_vectors"]


@cache
def harmonics_polynomial(l_max: int) -> Polynomial:
    """Polynomial ``[E, 3] -> [E, (l_max + 1)^2]`` from cuequivariance's descriptor.

    Degree 1 is ``sqrt(3) (x, y, z)``; the squares of degree l sum to 2 l + 1 (as e3nn's "component").
    """
    groups = []
    for degree in range(1, l_max + 1):
        descriptor = cue.descriptors.spherical_harmonics(cue.SO3(1), [degree]).polynomial
        ((_, table),) = descriptor.operations
        paths = [(*path.indices, float(path.coefficients)) for path in table.paths]
        indices = np.array([path[:degree] for path in paths], dtype=np.int64)
        outputs = np.array([path[degree] for path in paths], dtype=np.int64) + degree**2
        groups.append(Terms((0,) * degree, indices, outputs, np.array([path[-1] for path in paths])))
    return Polynomial(
        (Operand("direction", 3, has_channels=False),),
        Operand("harmonics", (l_max + 1) ** 2, has_channels=False),
        tuple(groups),
    )


def unit_vectors(vectors: Tensor, lengths: Tensor) -> Tensor:
    """``[E, 3]`` directions; a vector of zero length has no direction and gives zero, with finite derivatives."""
    safe = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    return vectors / safe.unsqueeze(-1)


def spherical_harmonics(directions: Tensor, l_max: int) -> Tensor:
    """``[E, (l_max + 1)^2]`` harmonics of unit vectors ``[E, 3]``, degrees in order."""
    degree_zero = directions.new_ones((directions.shape[0], 1))
    if l_max == 0:
        return degree_zero
    higher = evaluate(harmonics_polynomial(l_max), [directions])
    return torch.cat([degree_zero, higher[:, 1:]], dim=1)
