"""Real coupling coefficients of three irreps, each path normalised to one and with a definite sign.

The networks that learn one number per coupling path (Unke and Maennel 2024, arXiv:2401.07595, whose O(3) network EFA's
paper uses) fix the sign of every path by the formula below, so weights can be exchanged with them. The components of a
degree are those of :mod:`steradian.equivariant.harmonics`; :func:`to_cartesian_order` is the change of basis to the
order m = l, -l, ..., 1, -1, 0 in which the formula is written.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from steradian.equivariant.harmonics import spherical_harmonics

__all__ = ["coupling", "to_cartesian_order"]


@cache
def coupling(l1: int, l2: int, l3: int) -> np.ndarray:
    """``[2 l1 + 1, 2 l2 + 1, 2 l3 + 1]`` coefficients C with ``sum_ab C_abc C_abd = delta_cd``.

    Even ``l1 + l2 + l3``: two harmonics of one direction couple to a positive multiple of the third. Odd: the sign of
    the cross product, ``C[x, y -> z] = 1 / sqrt(2)``. Coupling with a scalar is the identity.

    Raises:
        ValueError: the degrees violate the triangle rule.
    """
    if not abs(l1 - l2) <= l3 <= l1 + l2:
        raise ValueError(f"degrees {l1} and {l2} do not couple to {l3}")
    first, second, third = _complex_rows(l1), _complex_rows(l2), _complex_rows(l3)
    table = np.einsum("ap,bq,cr,pqr->abc", first, second, third.conj(), _clebsch_gordan(l1, l2, l3))
    table = (1j ** (l1 + l2 - l3) * table).real
    one, two, three = (to_cartesian_order(degree) for degree in (l1, l2, l3))
    out = np.einsum("abc,xa,yb,zc->xyz", table, one, two, three)
    out[np.abs(out) < 1e-14] = 0.0
    return out


@cache
def to_cartesian_order(degree: int) -> np.ndarray:
    """``[2 l + 1, 2 l + 1]`` orthogonal Q: components x of this package are ``x @ Q`` in the order l, -l, ..., 0.

    Degree 1 is x, y, z in both. Found by comparing the harmonics themselves.
    """
    points = np.random.default_rng(0).normal(size=(200, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    ours = spherical_harmonics(torch.from_numpy(points), degree).numpy()[:, degree**2 :]
    theirs = _harmonics(points, degree)
    change = np.linalg.lstsq(ours / math.sqrt(2 * degree + 1), theirs, rcond=None)[0]
    left, _, right = np.linalg.svd(change)  # orthogonal to the last bit
    out = left @ right
    out[np.abs(out) < 1e-13] = 0.0
    return out


def _orders(degree: int) -> list[int]:
    return [sign * m for m in range(degree, 0, -1) for sign in (1, -1)] + [0]


def _harmonics(points: np.ndarray, degree: int) -> np.ndarray:
    """``[K, 2 l + 1]`` harmonics of unit vectors with squares that sum to one, no Condon-Shortley sign."""
    x, y, z = points.T
    columns = []
    for order in _orders(degree):
        m = abs(order)
        zonal = np.zeros_like(z)
        for k in range((degree - m) // 2 + 1):
            power = degree - 2 * k - m
            factor = (-1) ** k * math.comb(degree, k) * math.comb(2 * degree - 2 * k, degree) / 2**degree
            zonal += factor * math.perm(degree - 2 * k, m) * z**power
        zonal *= math.sqrt(math.factorial(degree - m) / math.factorial(degree + m))
        around = (x + 1j * y) ** m
        columns.append(zonal if m == 0 else math.sqrt(2) * zonal * (around.real if order > 0 else around.imag))
    return np.stack(columns, axis=1)


def _complex_rows(degree: int) -> np.ndarray:
    """Weights of the complex components (order -l..l) in every real one."""
    rows = np.zeros((2 * degree + 1, 2 * degree + 1), dtype=complex)
    for row, order in enumerate(_orders(degree)):
        m, sign = abs(order), (-1) ** abs(order)
        if order == 0:
            rows[row, degree] = 1
        elif order > 0:
            rows[row, degree + m], rows[row, degree - m] = sign / math.sqrt(2), 1 / math.sqrt(2)
        else:
            rows[row, degree - m], rows[row, degree + m] = 1j / math.sqrt(2), -1j * sign / math.sqrt(2)
    return rows


def _clebsch_gordan(l1: int, l2: int, l3: int) -> np.ndarray:
    """Complex (Condon-Shortley) coefficients <l1 a; l2 b | l3 a+b> by Racah's formula."""
    f = math.factorial
    table = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
    triangle = f(l1 + l2 - l3) * f(l1 - l2 + l3) * f(-l1 + l2 + l3) / f(l1 + l2 + l3 + 1)
    for a in range(-l1, l1 + 1):
        for b in range(max(-l2, -l3 - a), min(l2, l3 - a) + 1):
            c = a + b
            size = f(l1 + a) * f(l1 - a) * f(l2 + b) * f(l2 - b) * f(l3 + c) * f(l3 - c)
            total = 0.0
            for k in range(max(0, l2 - l3 - a, l1 - l3 + b), min(l1 + l2 - l3, l1 - a, l2 + b) + 1):
                below = f(k) * f(l1 + l2 - l3 - k) * f(l1 - a - k) * f(l2 + b - k)
                total += (-1) ** k / (below * f(l3 - l2 + a + k) * f(l3 - l1 - b + k))
            table[a + l1, b + l2, c + l3] = math.sqrt((2 * l3 + 1) * triangle * size) * total
    return table
