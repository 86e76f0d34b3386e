"""Euclidean fast attention in a crystal: wave vectors of the reciprocal lattice in place of a sphere of directions.

In a molecule the plane waves of a pair of channels have one length w (its frequency) and all directions; their mean is
``sin(w r) / (w r)``. In a crystal only waves with the lattice's period give every image of an atom the same value. Each
pair of channels sums those in a smooth shell around its frequency,

.. math:: K_n(r) = \\frac{(2π)^3}{V} \\sum_k g_n(|k|) \\, e^{i k·r}, \\quad \\int g_n \\, d^3k = 1,

which by Poisson's formula is the sum over all images of ``∫ g_n(k) sin(k r) / (k r) d^3k``: the kernel of the molecule,
damped beyond the inverse width of the shell. It is exactly periodic, invariant under translations and rotations (of
atoms and cell), the same per atom in a supercell, and smooth as the cell changes, because a wave vector enters with
weight zero. The number of wave vectors grows with the volume, so the cost grows with the square of the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steradian.compiler.capture import constant
from steradian.equivariant.harmonics import spherical_harmonics, unit_vectors
from steradian.graph.sharing import Share
from steradian.operators.efa.attention import Waves, attend_one_system
from steradian.radial import safe_norm

__all__ = ["lattice_vectors", "reciprocal_attention", "shell_weights", "waves_of_cells"]


def shell_weights(wave_numbers: Tensor, frequencies: Tensor, width: float) -> Tensor:
    """Density g_n of the shell around every frequency, ``[K, n]`` [Å^3]; its integral over all wave vectors is one.

    Args:
        wave_numbers: ``[K]`` lengths of wave vectors [1/Å].
        frequencies: ``[n]`` [1/Å].
        width: half width of the shells [1/Å]; beyond it value, slope and curvature are zero.
    """
    points, weights = (constant(values, frequencies.dtype, frequencies.device) for values in _gauss_legendre(8))
    low, high = (frequencies - width).clamp(min=0.0), frequencies + width
    half = 0.5 * (high - low)
    k = low + half * (1 + points.unsqueeze(-1))  # [nodes, n]
    volume = 4 * math.pi * half * (weights.unsqueeze(-1) * k.square() * _window((k - frequencies) / width)).sum(0)
    return _window((wave_numbers.unsqueeze(-1) - frequencies) / width) / volume


def _window(x: Tensor) -> Tensor:
    return (1 - x.square()).clamp(min=0.0).pow(3)


@cache
def _gauss_legendre(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return tuple(nodes.tolist()), tuple(weights.tolist())


def _degrees(highest: int) -> list[int]:
    """Degree of every component of the harmonics."""
    return [degree for degree in range(highest + 1) for _ in range(2 * degree + 1)]


def _inverse(cell: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of a matrix ``[3, 3]`` and its volume, without asking whether there is one: a GPU would be waited for."""
    a, b, c = cell.unbind(0)
    across = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=1)
    volume = (a * across[:, 0]).sum()
    return across / volume, volume.abs()


_WAVES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def waves_of_cells(cells: Tensor, systems: Sequence[int], longest: float) -> dict[int, Tensor]:
    """:func:`lattice_vectors` of some systems, from cells ``[S, 3, 3]``; kept as long as these live unchanged.

    Raises:
        ValueError: a cell has no volume.
    """
    state = (tuple(systems), longest, None if cells.is_inference() else cells._version)
    known = _WAVES.get(cells)
    if known is None or known[0] != state:
        on_host = cells.detach().cpu()
        made = {number: lattice_vectors(on_host[number], longest).to(cells.device) for number in systems}
        if cells.requires_grad or cells.is_inference():  # a tensor of one step, or one whose changes cannot be seen
            return made
        known = _WAVES[cells] = state, made
    found: dict[int, Tensor] = known[1]
    return found


def lattice_vectors(cell: Tensor, longest: float) -> Tensor:
    """``[K, 3]`` integers m of the wave vectors ``2 pi m cell^-T`` shorter than ``longest`` [1/Å]; zero comes first.

    Of two opposite vectors one is listed.

    Args:
        cell: ``[3, 3]`` lattice vectors as rows [Å].

    Raises:
        ValueError: the cell has no volume.
    """
    matrix = cell.detach().cpu().double().numpy()
    if not abs(np.linalg.det(matrix)) > 0:
        raise ValueError("a periodic system needs three independent lattice vectors")
    reach = np.floor(longest * np.linalg.norm(matrix, axis=1) / (2 * math.pi)).astype(int)
    axes = [np.arange(0, reach[0] + 1), np.arange(-reach[1], reach[1] + 1), np.arange(-reach[2], reach[2] + 1)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    first = (grid[:, 0] > 0) | ((grid[:, 0] == 0) & ((grid[:, 1] > 0) | ((grid[:, 1] == 0) & (grid[:, 2] > 0))))
    vectors = 2 * math.pi * grid @ np.linalg.inv(matrix).T
    chosen = grid[first & (np.linalg.norm(vectors, axis=1) < longest)]
    return torch.from_numpy(np.concatenate([np.zeros((1, 3), dtype=chosen.dtype), chosen])).to(cell.device)


def _scaled_harmonics(vectors: Tensor, lengths: Tensor, degree_scaling: list[float]) -> list[Tensor]:
    """Harmonics of the wave vectors, ``[A, K]`` those of even degree and ``[O, K]`` those of odd degree."""
    degrees, device = _degrees(len(degree_scaling) - 1), vectors.device
    factors = tuple(degree_scaling[degree] * (2 * degree + 1) ** -0.5 for degree in degrees)
    functions = spherical_harmonics(unit_vectors(vectors, lengths), len(degree_scaling) - 1).T
    functions = functions * constant(factors, vectors.dtype, device).unsqueeze(-1)
    chosen = [tuple(place for place, degree in enumerate(degrees) if degree % 2 == parity) for parity in (0, 1)]
    return [functions.index_select(0, constant(rows, torch.int64, device)) for rows in chosen]


def reciprocal_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cell: Tensor,
    frequencies: Tensor,
    width: float,
    *,
    size: int | None = None,
    degree_scaling: list[float] | None = None,
    share: Share | None = None,
    low: torch.dtype | None = None,
    integers: Tensor | None = None,
) -> Tensor:
    """Attention of every atom of a crystal to all atoms and their images.

    Args:
        queries, keys: ``[N, D, F]``, F even.
        values: ``[N, D_v, F_v]``.
        positions: ``[N, 3]`` [Å], anywhere.
        cell: ``[3, 3]`` lattice vectors as rows [Å], differentiable; periodic in all three directions.
        frequencies: ``[F / 2]`` [1/Å].
        width: half width of the shells of wave numbers [1/Å].
        size: numbers per query that the square root is taken of; None for D F.
        degree_scaling: integrate the product with the harmonics of the wave vector up to ``len - 1``, whose squares sum
            to the squared factor of their degree.
        share: sum keys and values over processes.
        low: as in :func:`steradian.operators.efa.attention.rotary_attention`.
        integers: what :func:`lattice_vectors` gives for the cell, where it is known already.

    Returns:
        ``[N, D_v, F_v]``, or with harmonics ``[N, A, D_v, F_v]``, those of even degree first.

    Raises:
        ValueError: the cell has no volume.
    """
    if integers is None:
        integers = lattice_vectors(cell, float(frequencies.detach().max()) + width)
    inverse, volume = _inverse(cell)
    inside = positions - torch.floor(positions @ inverse).detach() @ cell  # small phases have more digits
    integers = integers.to(cell)
    vectors = 2 * math.pi * integers @ inverse.T
    lengths = safe_norm(vectors)
    counted = 1 + integers.any(1).to(cell)  # for the opposite vector
    density = shell_weights(lengths, frequencies, width) * ((2 * math.pi) ** 3 / volume * counted).unsqueeze(-1)
    even, odd = density.unsqueeze(0), None
    if degree_scaling is not None:
        even, odd = (values.unsqueeze(-1) * density for values in _scaled_harmonics(vectors, lengths, degree_scaling))
    waves = Waves(vectors, torch.ones_like(lengths[:1]), even, odd, symmetric=True, share=share, low=low)
    scale = (size or queries.shape[1] * queries.shape[2]) ** -0.5
    out = attend_one_system(queries * scale, keys, values, inside, waves)
    return out.squeeze(1) if degree_scaling is None else out
