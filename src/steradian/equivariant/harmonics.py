"""Real spherical harmonics of unit vectors ("component" normalisation) as a polynomial, and how they couple."""

from __future__ import annotations

import math
from functools import cache

import cuequivariance as cue
import numpy as np
import torch
from torch import Tensor

from steradian.polynomials import Operand, Polynomial, Terms, evaluate

__all__ = [
    "coupling",
    "harmonics_polynomial",
    "spherical_harmonics",
    "to_cartesian_order",
    "unit_vectors",
]


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


# ----------------------------------------------------------------------------------------------------------- couplings


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
