"""Products of ViSNet's message passing, as polynomials (see :mod:`steradian.polynomials`)."""

from __future__ import annotations

from functools import cache

import numpy as np

from steradian.polynomials import Operand, Polynomial, Terms

__all__ = ["product_polynomial", "rejected_product", "vector_message"]


@cache
def product_polynomial(num_factors: int) -> Polynomial:
    """Product of rows ``[rows, 1, C]`` channel by channel."""
    one = np.zeros((1, num_factors), dtype=np.int64)
    return Polynomial(
        tuple(Operand(f"factor {index}", 1) for index in range(num_factors)),
        Operand("product", 1),
        (Terms(tuple(range(num_factors)), one, np.zeros(1, dtype=np.int64), np.ones(1)),),
    )


@cache
def vector_message(size: int, has_vectors: bool) -> Polynomial:
    """``(vectors [N, size, C], weights [E, 2 or 1, C], geometry [E, 1 + size]) -> [N, size, C]``.

    ``c v_j s_1 + c d_ij s_2`` (Wang et al. 2024, equation 8) with geometry ``(c, c d_ij)``; without vectors the second
    term alone, with its weights alone.
    """
    component, ones = np.arange(size), np.ones(size)
    zeros = np.zeros(size, dtype=np.int64)
    geometry = Operand("geometry", 1 + size, has_channels=False)
    out = Operand("message", size)
    if not has_vectors:
        along = Terms((0, 1), np.stack([zeros, 1 + component], axis=1), component, ones)
        return Polynomial((Operand("weights", 1), geometry), out, (along,))
    carried = Terms((0, 1, 2), np.stack([component, zeros, zeros], axis=1), component, ones)
    along = Terms((1, 2), np.stack([zeros + 1, 1 + component], axis=1), component, ones)
    return Polynomial((Operand("vectors", size), Operand("weights", 2), geometry), out, (carried, along))


@cache
def rejected_product(l_max: int) -> Polynomial:
    """``(left [N, size, C], right [N, size, C], filter [E, 1, C], directions [E, size]) -> [E, 1, C]``.

    The product of what is left of two vectors when their parts along an edge are rejected (Wang et al. 2024, equation
    10), times a filter. With harmonics d of squared norm l_max, one for each degree,
    ``(a - (a.d) d) . (b - (b.d) d) = a.b - (2 - l_max) (a.d) (b.d)``: for l_max = 2 nothing is rejected.
    """
    size = (l_max + 1) ** 2 - 1
    component = np.arange(size)
    plain = Terms(
        (0, 1, 2),
        np.stack([component, component, np.zeros(size, dtype=np.int64)], axis=1),
        np.zeros(size, dtype=np.int64),
        np.ones(size),
    )
    groups: tuple[Terms, ...] = (plain,)
    if l_max == 1:
        left, right = (index.reshape(-1) for index in np.meshgrid(component, component))
        zeros = np.zeros(size**2, dtype=np.int64)
        groups += (Terms((0, 1, 2, 3, 3), np.stack([left, right, zeros, left, right], 1), zeros, -np.ones(size**2)),)
    return Polynomial(
        (
            Operand("left", size),
            Operand("right", size),
            Operand("filter", 1),
            Operand("directions", size, has_channels=False),
        ),
        Operand("update", 1),
        groups,
    )
