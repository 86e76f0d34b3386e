"""Finite groups of rotations, for averages that no rotation of the group changes."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

__all__ = ["ROTATION_DEGREES", "rotation_group"]

#: Rotations of a group, and the highest degree up to which an average over them is that over all rotations: the lowest
#: harmonic that a polyhedron leaves unchanged has one degree more (two-fold axes 2, tetrahedron 3, octahedron 4,
#: icosahedron 6).
ROTATION_DEGREES = {4: 1, 12: 2, 24: 3, 60: 5}


def rotation_group(count: int) -> Tensor:
    """The rotations of a group, ``[count, 3, 3]`` in float64, the identity first.

    Args:
        count: 4 (two-fold rotations about the axes), 12 (tetrahedron), 24 (octahedron) or 60 (icosahedron).

    Raises:
        ValueError: another number.
    """
    if count not in ROTATION_DEGREES:
        *few, most = ROTATION_DEGREES
        raise ValueError(
            f"rotation_average must be {', '.join(map(str, few))} or {most} (rotations of a group), not {count}"
        )
    signs = [torch.diag(torch.tensor(s, dtype=torch.float64)) for s in itertools.product((1.0, -1.0), repeat=3)]
    proper = torch.stack([matrix for matrix in signs if matrix.det() > 0])
    if count == 4:
        return proper
    eye = torch.eye(3, dtype=torch.float64)
    if count == 24:
        orders = torch.stack([eye[list(order)] for order in itertools.permutations(range(3))])
        every = torch.stack([sign @ order for order in orders for sign in signs])
        return every[torch.linalg.det(every) > 0]
    threefold = torch.stack([eye[[(row + turn) % 3 for row in range(3)]] for turn in range(3)])
    tetrahedron = torch.stack([order @ sign for order in threefold for sign in proper])
    if count == 12:
        return tetrahedron
    fivefold = [_about((0.0, 1.0, 0.5 + 0.5 * math.sqrt(5.0)), 2 * math.pi * turn / 5) for turn in range(5)]
    return torch.stack([turned @ matrix for turned in fivefold for matrix in tetrahedron])


def _about(axis: tuple[float, float, float], angle: float) -> Tensor:
    """The rotation about an axis (Rodrigues)."""
    x, y, z = (torch.tensor(axis, dtype=torch.float64) / math.hypot(*axis)).tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)
