"""Euclidean fast attention in a crystal: wave vectors of the reciprocal lattice in place of a sphere of directions.

In a molecule the plane waves of a pair of channels have one length w (its frequency) and all directions; their mean is
``sin(w r) / (w r)``. In a crystal only waves with the lattice's period give every image of an atom the same value. Each
pair of channels sums those in a smooth shell around its frequency,

.. math:: K_n(r) = \\frac{(2π)^3}{V} \\sum_k g_n(|k|) \\, e^{i k·r}, \\quad \\int g_n \\, d^3k = 1,

which by Poisson's formula is the sum over all images of ``∫ g_n(k) sin(k r) / (k r) d^3k``: the kernel of the molecule,
damped beyond the inverse width of the shell. It is exactly periodic, invariant under translations and rotations (of
atoms and cell), the same per atom in a supercell, and smooth as the cell changes, because a wave vector enters with
weight zero. The number of wave vectors grows with the volume, so the cost grows with the square of the size.

Steps, of which each is a function below: which wave vectors the cell has (:func:`lattice_vectors`, whole numbers, not
differentiated), where they lie for this strain and how far apart they are (:func:`reciprocal_cell`), how much each one
counts for each frequency (:func:`shell_weights`), with which harmonics of its direction (:func:`parity_harmonics`), and
the sums over atoms with these waves (:func:`steradian.operators.efa.attention.attend_block`).
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from steradian.compiler.folding import constant
from steradian.equivariant.harmonics import spherical_harmonics, unit_vectors
from steradian.graph.share import Share
from steradian.operators.efa.attention import Waves, attend_block
from steradian.operators.efa.paper import QKV
from steradian.radial import safe_norm

__all__ = ["lattice_vectors", "parity_harmonics", "reciprocal_attention", "reciprocal_cell", "shell_weights"]


def reciprocal_attention(
    atoms: QKV,
    cell: Tensor,
    frequencies: Tensor,
    width: float,
    *,
    longest: float | None = None,
    degree_scaling: list[float] | None = None,
    share: Share | None = None,
    low: torch.dtype | None = None,
) -> Tensor:
    """Attention of every atom of a crystal to all atoms and their images.

    Args:
        atoms: queries, keys, values; positions [Å] anywhere.
        cell: ``[3, 3]`` lattice vectors as rows [Å], differentiable; periodic in all three directions.
        frequencies: ``[F / 2]`` [1/Å].
        width: half width of the shells of wave numbers [1/Å].
        longest: the largest frequency [1/Å] where it is known: asking a GPU takes time.
        degree_scaling: integrate the product with the harmonics of the wave vector up to ``len - 1``, whose squares sum
            to the squared factor of their degree.
        share, low: as in :class:`steradian.operators.efa.attention.Waves`.

    Returns:
        ``[N, L, D_v, F_v]``: one result, or one per harmonic, those of even degree first.

    Raises:
        ValueError: the cell has no volume.
    """
    longest = float(frequencies.detach().max()) if longest is None else longest
    integers = lattice_vectors(cell, longest + width)
    vectors, to_fractions, volume = reciprocal_cell(cell, integers)
    lengths = safe_norm(vectors)
    # each listed vector stands for its opposite too, except zero; (2π)^3 / V is the share of k-space of one vector
    counted = 1 + integers.any(1).to(cell)
    density = shell_weights(lengths, frequencies, width) * ((2 * math.pi) ** 3 / volume * counted).unsqueeze(-1)
    even, odd = density.unsqueeze(0), None
    if degree_scaling is not None:
        directions = unit_vectors(vectors, lengths)
        even, odd = (values.unsqueeze(-1) * density for values in parity_harmonics(directions, degree_scaling))
    waves = Waves(vectors, torch.ones_like(lengths[:1]), even, odd, share=share, low=low)
    # a wave of the lattice does not see by which lattice vector an atom was moved, and small phases have more digits
    inside = atoms.positions - torch.floor(atoms.positions @ to_fractions).detach() @ cell
    queries, keys, values, x = (tensor.unsqueeze(0) for tensor in atoms._replace(positions=inside))
    out = attend_block(queries, keys, values.flatten(2), x, waves)
    return out.reshape(len(inside), waves.num_results, *atoms.values.shape[1:])


# -------------------------------------------------------------------------------------------- wave vectors of a lattice


def lattice_vectors(cell: Tensor, longest: float) -> Tensor:
    """``[K, 3]`` integers m of the wave vectors ``2 pi m cell^-T`` shorter than ``longest`` [1/Å]; zero comes first.

    Of two opposite vectors one is listed. Cells seen lately are known by their numbers.

    Args:
        cell: ``[3, 3]`` lattice vectors as rows [Å].
        longest: [1/Å].

    Raises:
        ValueError: the cell has no volume.
    """
    numbers = cell.detach().to("cpu", torch.float64).numpy()
    return torch.from_numpy(_lattice_vectors(numbers.tobytes(), longest)).to(cell.device)


@lru_cache(maxsize=64)
def _lattice_vectors(numbers: bytes, longest: float) -> np.ndarray:
    cell = np.frombuffer(numbers).reshape(3, 3)
    if not abs(np.linalg.det(cell)) > 0:
        raise ValueError("a periodic system needs three independent lattice vectors")
    # m_a = k . a / 2π: no wave vector shorter than K has a component beyond K |a| / 2π
    reach = np.floor(longest * np.linalg.norm(cell, axis=1) / (2 * math.pi)).astype(int)
    axes = [np.arange(0, reach[0] + 1), np.arange(-reach[1], reach[1] + 1), np.arange(-reach[2], reach[2] + 1)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    first = (grid[:, 0] > 0) | ((grid[:, 0] == 0) & ((grid[:, 1] > 0) | ((grid[:, 1] == 0) & (grid[:, 2] > 0))))
    vectors = 2 * math.pi * grid @ np.linalg.inv(cell).T
    chosen = grid[first & (np.linalg.norm(vectors, axis=1) < longest)]
    return np.concatenate([np.zeros((1, 3), dtype=chosen.dtype), chosen])


def reciprocal_cell(cell: Tensor, integers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Wave vectors ``[K, 3]`` [1/Å], the matrix that turns positions into fractions of the cell, and the volume [Å^3].

    Differentiable by the cell. The inverse is written out: a library would ask a GPU whether there is one.

    Args:
        cell: ``[3, 3]`` lattice vectors a, b, c as rows [Å].
        integers: ``[K, 3]`` of :func:`lattice_vectors`.
    """
    a, b, c = cell.unbind(0)
    across = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=1)
    volume = (a * across[:, 0]).sum()
    inverse = across / volume  # its columns are the reciprocal vectors over 2π
    return 2 * math.pi * integers.to(cell) @ inverse.T, inverse, volume.abs()


# ----------------------------------------------------------------------------------------------- how much a wave counts


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


def parity_harmonics(directions: Tensor, degree_scaling: list[float]) -> list[Tensor]:
    """``[A, K]`` harmonics of even degree and ``[O, K]`` of odd degree; the squares of a degree sum to the square of
    its factor.

    Args:
        directions: ``[K, 3]`` unit vectors (or zero).
        degree_scaling: a factor per degree, from 0.
    """
    degrees = [degree for degree in range(len(degree_scaling)) for _ in range(2 * degree + 1)]
    factors = tuple(degree_scaling[degree] * (2 * degree + 1) ** -0.5 for degree in degrees)
    functions = spherical_harmonics(directions, len(degree_scaling) - 1).T
    functions = functions * constant(factors, directions.dtype, directions.device).unsqueeze(-1)
    places = [tuple(place for place, degree in enumerate(degrees) if degree % 2 == parity) for parity in (0, 1)]
    return [functions.index_select(0, constant(chosen, torch.int64, directions.device)) for chosen in places]
