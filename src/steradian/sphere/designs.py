"""Spherical designs: points of equal weight that integrate polynomials up to a degree exactly.

Small ones are regular solids. The others are unions of orbits of a rotation group, so that only a few base points are
stored (own computation: the harmonic sums up to the degree were solved for to rounding).
"""

from __future__ import annotations

import numpy as np

__all__ = ["DESIGN_DEGREES", "design_points"]

_GOLDEN = (1 + 5**0.5) / 2


def _icosahedron() -> np.ndarray:
    plane = np.array([[0.0, one, golden * _GOLDEN] for one in (1, -1) for golden in (1, -1)])
    points = np.concatenate([np.roll(plane, shift, axis=1) for shift in range(3)])
    return points / np.linalg.norm(points[0])


_SOLIDS = {
    1: np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]),
    2: np.array([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]) / 3**0.5,
    3: np.concatenate([np.eye(3), -np.eye(3)]),
    5: _icosahedron(),
}

#: Degrees for which a design is stored.
DESIGN_DEGREES = tuple(_SOLIDS)


def design_points(degree: int) -> tuple[np.ndarray, int]:
    """Points ``[K, 3]`` of the smallest stored design of at least this degree, and its exact degree.

    Raises:
        ValueError: no stored design is exact to that degree.
    """
    for exact_degree in sorted(DESIGN_DEGREES):
        if exact_degree >= degree:
            return _SOLIDS[exact_degree].copy(), exact_degree
    raise ValueError(
        f"no stored spherical design has degree {degree} (highest: {max(DESIGN_DEGREES)}); take a Lebedev rule"
    )
